"""Agreement in several groups at once: those that average the parts of one model, each part in a group of its own."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from commhub._errors import RegistrationError

from ._agree import agree
from ._rendezvous import Rendezvous
from ._unanswered import connected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LATER: Final = 2.0
"""Timeouts that a rank waits for those of other groups, which may have waited for one in their own already."""
HASTE: Final = 5.0
"""Seconds that a rank waits for them whose own group has failed, and has taken its time to."""


def among(ranks: Sequence[int], timeout: float) -> Rendezvous:
    """The next rendezvous of these ranks of all, in ascending order, for which there need not be a group.

    Raises:
        RegistrationError: as ``Rendezvous.of``.
    """
    world = dist.group.WORLD
    if world is None:
        raise RegistrationError("the process group is gone. Registrations end before it is destroyed.")
    name = f"among {hashlib.sha256(repr(tuple(ranks)).encode()).hexdigest()[:16]}"
    rank, size = ranks.index(dist.get_rank()), len(ranks)

    def given() -> Store:
        return PrefixStore(name, dist.distributed_c10d._get_process_group_store(world))

    return Rendezvous(name, rank, size, timeout, connected(world, given, rank, size, timeout), tuple(ranks))


def agree_everywhere(
    rendezvous: Rendezvous,
    everyone: Rendezvous | None,
    topic: str,
    facts: Mapping[str, Any],
    failure: BaseException | None,
    *,
    verify: bool = True,
    more: bool = False,
) -> None:
    """Meet the ranks of one group as ``agree`` does, then all of all groups, whose verdict is one: all go on or raise.

    Args:
        rendezvous: of the group.
        everyone: of the ranks of all groups; ``None`` where there is one group.
        topic, facts, failure, verify, more: as for ``agree``.

    Raises:
        HookMismatchError, RegistrationError: as ``agree``.
        BaseException: ``failure`` itself, on its rank.
    """
    try:
        agree(rendezvous, topic, facts, failure, verify=verify, more=more)
    except BaseException as error:
        if everyone is not None:
            everyone.timeout = min(rendezvous.timeout, HASTE)  # whoever comes at all is there by now
            agree(everyone, topic, {}, error)
        raise
    if everyone is not None:
        agree(everyone, topic, facts, None, verify=verify, more=more)


def all_ranks(others: Rendezvous, group: Sequence[int]) -> tuple[int, ...]:
    """The ranks of all groups, in ascending order, when this rank's ``others`` have agreed and a round is to follow.

    Args:
        others: of one rank of each group.
        group: the ranks of this rank's own.

    Raises:
        RegistrationError: if somebody does not come, or the groups are not the columns of a mesh.
    """
    verdict = others.round(json.dumps(list(group)), others.timeout, lambda _: False)
    columns = [json.loads(text) for text in verdict.brought.values()]
    found = sorted({rank for column in columns for rank in column})
    if len(columns) < others.size:
        raise RegistrationError(f"not all ranks of the other shards came to register within {others.timeout:g} s.")
    if len(found) != others.size * len(group):
        raise RegistrationError(f"ranks {', '.join(map(str, found))} form no mesh of replicas and shards.")
    return tuple(found)
