"""Agreement in several groups at once: those that average the parts of one model, each part in a group of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ._agree import agree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._rendezvous import Rendezvous

LATER: Final = 2.0
"""Timeouts that a rank waits for those of other groups, which may have waited for one in their own already."""
HASTE: Final = 5.0
"""Seconds that a rank waits for them whose own group has failed, and has taken its time to."""


def agree_everywhere(
    rendezvous: Rendezvous,
    others: Rendezvous | None,
    topic: str,
    facts: Mapping[str, Any],
    failure: BaseException | None,
    *,
    verify: bool = True,
    more: bool = False,
) -> None:
    """Meet the ranks of one group as ``agree`` does, then those of the other groups; all go on or all raise.

    Args:
        rendezvous: of the group.
        others: where this rank meets some of the other groups; ``None`` where there are none.
        topic, facts, failure, verify, more: as for ``agree``.

    Raises:
        HookMismatchError, RegistrationError: as ``agree``.
        BaseException: ``failure`` itself, on its rank.
    """
    try:
        agree(rendezvous, topic, facts, failure, verify=verify, more=more)
    except BaseException as error:
        if others is not None:
            others.timeout = min(rendezvous.timeout, HASTE)  # whoever comes at all is there by now
            agree(others, topic, {}, error)
        raise
    if others is not None:
        agree(others, topic, facts, None, verify=verify, more=more)
