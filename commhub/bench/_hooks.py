"""The one place where the bench touches hooks: check a hook string, attach a hook, read what a step cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from commhub._hookstring import parse
from commhub._network import Network
from commhub._spec import RESERVED

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from commhub import Registration
    from commhub.bench._options import Settings

DENSE_PHASE = "start_step"
"""The option by which hooks that begin with plain all-reduces say when they start to compress."""


@attrs.frozen(kw_only=True)
class StepCost:
    """One step's communication on this rank: bytes, and seconds for which the training thread stood still.

    `reference_bytes` is what a plain all-reduce of the same gradients would have sent.
    """

    sent_bytes: float
    reference_bytes: float
    encode: float
    wait: float
    decode: float


def network(settings: Settings) -> Network | None:
    """The link to emulate, if any; ValueError where its text is not understood."""
    return Network.parse(settings.bandwidth, settings.latency) if settings.emulated else None


def in_canonical_form(text: str) -> str:
    """`text` as register would print it, its name and options checked. Imports no torch.

    A hook that begins with a dense phase (`start_step`, thousands of steps long in real training) would be
    measured as a plain all-reduce, so an unset `start_step` becomes 0: what is compared is its steady state.

    Raises CommhubError when there is no such hook or an option is wrong.
    """
    from commhub._registry import resolve

    wanted = parse(text)
    # `wire` and its like belong to register, not to the hook, and a hook string may hold them too.
    general = {key: value for key, value in wanted.options.items() if key in RESERVED}
    own = {key: value for key, value in wanted.options.items() if key not in RESERVED}
    choice = resolve(str(attrs.evolve(wanted, options={})), own)
    if choice.spec.option(DENSE_PHASE) and DENSE_PHASE not in {*own, *choice.spec.preset}:
        general[DENSE_PHASE] = 0
    chosen = parse(choice.canonical)
    return str(attrs.evolve(chosen, options={**chosen.options, **general}))


def attach(
    model: DistributedDataParallel, hook: str, *, optimizer: torch.optim.Optimizer, link: Network | None
) -> Registration:
    """Register `hook` on `model`, on the emulated link if there is one. Collective."""
    import commhub

    registration = commhub.register(model, hook, optimizer=optimizer)
    if link is not None:
        registration.emulate(link)
    return registration


def last_cost(registration: Registration) -> StepCost:
    """What the step that has just ended cost."""
    last = registration.stats.last
    return StepCost(
        sent_bytes=last.sent_bytes,
        reference_bytes=last.logical_bytes,
        encode=last.exposed["encode"],
        wait=last.exposed["wait"],
        decode=last.exposed["decode"],
    )
