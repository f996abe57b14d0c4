"""What DDP averages: the parameters it was wrapped with, whatever was frozen, unfrozen, added or replaced since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from commhub.training._trained import named

from ._coming import Coming
from ._way_in import known_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    from commhub.training._trained import Named

_SHOWN = 6
"""How many names one message lists."""


class _Nothing(TorchDispatchMode):
    """Within it, whatever would allocate gets an empty tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        return torch.empty(0)


def wrapped(model: DistributedDataParallel | Coming) -> tuple[Named, ...]:
    """The parameters that DDP's reducer holds, or will: in the module's order, by the names they have in it now.

    One that the module no longer holds comes last, named after its place among those that were wrapped.
    """
    if isinstance(model, Coming):
        return model.parameters
    if model._delay_all_reduce_all_params:
        return ()
    reduced = {id(p): p for p in known_parameters(model) or _asked(model)}
    held = [(name, p) for name, p in named(model, ignored=True) if reduced.pop(id(p), None) is not None]
    taken = {name for name, _ in held}
    places = {id(p): place for place, p in enumerate(model._module_parameters)}
    for place, parameter in sorted((places.get(i, len(places)), p) for i, p in reduced.items()):
        name = f"gone.{place}"
        while name in taken:
            name += "_"
        taken.add(name)
        held.append((name, cast("nn.Parameter", parameter)))
    return tuple(held)


def _asked(model: DistributedDataParallel) -> list[Tensor]:
    nothing: Any = _Nothing
    with torch.inference_mode(), nothing():  # the reducer names them beside zeros of the gradients' size
        buckets = model.reducer._get_zeros_like_grad_buckets()
    return [p for bucket in buckets for p in bucket.parameters()]


def outside(model: DistributedDataParallel | Coming, reduced: Sequence[Named], *, gradients: bool) -> str:
    """What the user should know of parameters that DDP averages and that do not train, or the reverse.

    Args:
        model: the DDP model.
        reduced: what ``wrapped`` said.
        gradients: whether those that DDP does not average matter; to local steps they do not.
    """
    if isinstance(model, Coming):
        return ""
    inside, here = {id(p) for _, p in reduced}, dict(named(model, ignored=True))
    held = {id(p) for p in here.values()}
    missed = [name for name, p in named(model) if p.requires_grad and id(p) not in inside]
    frozen = [name for name, p in reduced if id(p) in held and not p.requires_grad]
    gone = [name for name, p in reduced if id(p) not in held]
    told = []
    if missed and gradients:
        told.append(
            f"DDP does not average the gradients of {_listed(missed)}, so nor does this hook: they were added, "
            "replaced or unfrozen after the model was wrapped, and each rank keeps its own."
        )
    waits = "" if model.find_unused_parameters or model.static_graph else ", and waits for them in every backward"
    if frozen:
        told.append(f"DDP still averages {_listed(frozen)}, frozen after the model was wrapped{waits}.")
    if gone:
        told.append(f"The module no longer holds {len(gone)} of the parameters that DDP averages{waits}.")
    if len(frozen) + len(gone) == len(reduced):
        told.append(
            "Nothing that DDP averages is trained now, so that no backward counts as a step until something is."
        )
    return " ".join([*told, "Wrap it again after such changes."]) if told else ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
