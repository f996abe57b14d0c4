"""What a hook is registered on: the model's parameters, the ranks, and what the user gave beside the hook."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub._errors import RegistrationError
from commhub._printable import shown
from commhub.protocol._spans import lay_out

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Mapping

    import torch.distributed as dist

LONGEST = 1e8
"""The seconds that a timeout may be, three years; clocks and stores count no further than some times that."""


def part_between(shard: int, shards: int) -> str:
    """The name of the part that one shard is, in ``Target.part``."""
    return f"shard{shard}-of-{shards}"


def part_inside(shards: int) -> str:
    """The name of what a hook works on in place of the reduce-scatter of so many shards."""
    return f"inside-{shards}-shards"


def is_part(name: str) -> bool:
    """Whether it is one of these."""
    return re.fullmatch(r"shard\d+-of-\d+|inside-\d+-shards", name) is not None


@attrs.frozen(kw_only=True, eq=False)
class Target:
    """What a hook works on. When the hook is swapped it stays the same, but for a bare module's ``parameters``.

    Attributes:
        group: the ranks to average over.
        device: where the gradients lie.
        module: whose gradients they are: the DDP model, or the bare module. It holds what holds this.
        parameters: whose gradients they are, by name, in the model's order.
        unused: whether backward may leave parameters out.
        traits: what else must be equal on all ranks.
        after_optimizers: whether an averager by itself is asked after the optimizers' steps, when the user says so.
        optimizers, scaler, timeout, verify: as given to ``register``.
        dtypes: by name, those of gradients that come in another dtype than their parameter's.
        shapes: by name, those of gradients that come in another shape than their parameter's.
        scatters: where ``reduce_scatter`` is called, inside the group that a model is sharded over: what can be done
            with a hook that has none. Empty elsewhere.
        others: ranks that hold other parts of the same model, each part averaged in a group of its own; what takes all
            ranks succeeds in all of these groups or in none.
        everyone: all ranks that average any part, by their numbers among all, once they have met.
        part: which part this is, for a folder that all of them save into; empty if it is the whole model.
        kept: gives the parameters by name as optimizers have them, frozen ones too, where they are not simply the
            module's.
        written: has the module compute with what was written into them, where it may have a copy.
        no_optimizer: why the optimizer cannot be stepped in backward, if that is so.
    """

    group: dist.ProcessGroup
    device: torch.device
    module: weakref.ref[torch.nn.Module]
    parameters: tuple[tuple[str, torch.nn.Parameter], ...]
    unused: bool = False
    traits: Mapping[str, Any]
    after_optimizers: bool = False
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    scaler: Any = None
    timeout: float = 1800.0
    verify: bool = True
    dtypes: Mapping[str, torch.dtype] = attrs.Factory(dict)
    shapes: Mapping[str, tuple[int, ...]] = attrs.Factory(dict)
    scatters: str = ""
    others: dist.ProcessGroup | None = None
    everyone: tuple[int, ...] = ()
    part: str = ""
    kept: Callable[[], tuple[tuple[str, torch.nn.Parameter], ...]] | None = None
    written: Callable[[], None] | None = None
    no_optimizer: str = ""

    def shape(self, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        """Of the gradient of one of the parameters."""
        return self.shapes.get(name, tuple(parameter.shape))

    def stride(self, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        """Of that gradient by itself."""
        shape = self.shapes.get(name)
        like = parameter if shape is None else torch.empty(shape, device="meta")
        return lay_out([name], [like])[0].stride

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by now."""
        return float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else 1.0


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """The group's own timeout in seconds."""
    try:
        return min(float(group._get_backend(device).options._timeout.total_seconds()), LONGEST)
    except (RuntimeError, AttributeError, ValueError):
        return 1800.0


def check_timeout(timeout: object) -> None:
    """Raise RegistrationError for what is neither ``None`` nor a positive number up to ``LONGEST``."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= LONGEST:
        raise RegistrationError(
            f"timeout is {shown(timeout)}; give seconds above 0 and at most {LONGEST:g}, or None for the group's own."
        )


def checked_timeout(timeout: float | None, group: dist.ProcessGroup, device: torch.device) -> float:
    """``timeout`` in seconds, the group's own by default.

    Raises:
        RegistrationError: if it is no positive number, or more than ``LONGEST``.
    """
    check_timeout(timeout)
    return group_timeout(group, device) if timeout is None else float(timeout)


def usable_timeout(timeout: float | None, group: dist.ProcessGroup, device: torch.device) -> float:
    """The same; the group's own where ``timeout`` will not do, so that the peers can hear of that."""
    try:
        return checked_timeout(timeout, group, device)
    except RegistrationError:
        return group_timeout(group, device)
