"""FSDP2 (``fully_shard``) as commhub sees it: units, the shards of their parameters, and where gradients pass by.

All that is said here about PyTorch's private names was seen in torch 2.13.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from commhub._errors import RegistrationError
from commhub.training._trained import local, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

_STATE = "_get_fsdp_state"


class Shard:
    """The part of one parameter that this rank keeps.

    Attributes:
        name: the parameter's, in the model.
        size: shape of the part.
        numel: its elements.
        padded_size: that of the first rank's part, as which each takes room in a buffer of its unit.
        padded: so many elements.
        ranks: how many have a part.
    """

    def __init__(self, name: str, kept: Any, ranks: int) -> None:
        self.name, self._there, self.ranks = name, weakref.ref(kept), ranks
        self.size = tuple(kept.sharded_size)
        self.numel = kept.sharded_size.numel()
        self.padded_size = tuple(kept.padded_sharded_param_size)
        self.padded = kept.padded_sharded_param_size.numel()

    @property
    def _kept(self) -> Any:
        return _alive(self._there())

    @property
    def parameter(self) -> nn.Parameter:
        """The model's parameter as the optimizer has it: a DTensor, of which this is the local part."""
        parameter: nn.Parameter = self._kept.sharded_param
        return parameter

    @property
    def local(self) -> Tensor:
        """The part itself; users may load another into the model."""
        return local(self.parameter)

    @property
    def is_trained(self) -> bool:
        """Whether it requires a gradient now."""
        return self.parameter.requires_grad

    @property
    def has_gradient(self) -> bool:
        """Whether backward has left a gradient that is not reduced yet."""
        if self._kept.unsharded_accumulated_grad is not None:
            return True
        whole = getattr(self._kept, "_unsharded_param", None)
        return whole is not None and whole.grad is not None

    @property
    def is_zero_filled(self) -> bool:
        """Whether FSDP can reduce zeros for it where it has none."""
        whole = getattr(self._kept, "_unsharded_param", None)
        return whole is not None and bool(whole.requires_grad)


class Unit:
    """What one call of ``fully_shard`` manages: parameters whose gradients are reduced in one buffer.

    Attributes:
        name: of its module in the model; empty for the root.
        shards: of all its parameters, frozen ones too, in the buffer's order.
    """

    def __init__(self, name: str, group: Any, names: dict[int, str]) -> None:
        self.name, self._there = name, weakref.ref(group)
        self.shards = tuple(Shard(_name(kept, names), kept, self.shard_group.size()) for kept in group.fsdp_params)

    @property
    def group(self) -> Any:
        """FSDP's own object for it."""
        return _alive(self._there())

    @property
    def device(self) -> torch.device:
        """Where its gradients are reduced."""
        device: torch.device = self.group.device
        return device

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that the parameters are sharded over."""
        group: dist.ProcessGroup = self.group.mesh_info.shard_process_group
        return group

    @property
    def divide_factor(self) -> float | None:
        """What the user has set for FSDP to divide by in place of the number of ranks."""
        factor: float | None = self.group.gradient_divide_factor
        return factor

    @property
    def sends(self) -> bool:
        """Whether the user wants gradients exchanged between replicas now: ``set_requires_all_reduce``."""
        return bool(self.group.all_reduce_grads)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its buffers; ``None`` where nothing is trained."""
        policy = self.group.mp_policy
        trained = [shard.local.dtype for shard in self.shards if shard.is_trained]
        if not trained:
            return None
        computed: torch.dtype = (
            policy.param_dtype if policy.param_dtype and trained[0].is_floating_point else trained[0]
        )
        reduced: torch.dtype = policy.reduce_dtype or computed
        return reduced

    def takes_part(self) -> list[tuple[Shard, bool]]:
        """The shards whose gradients are about to be reduced, and for each whether backward has reached it."""
        fills = self.group.reduce_scatter_unused_params
        return [(s, s.has_gradient) for s in self.shards if s.has_gradient or (fills and s.is_zero_filled)]

    @property
    def has_hook(self) -> bool:
        """Whether an all-reduce hook of somebody else is set."""
        return self.group._all_reduce_hook is not None

    @property
    def has_reduce_scatter(self) -> bool:
        """Whether a reduce-scatter of somebody else is set."""
        return not type(self.group._reduce_scatter_comm).__module__.startswith("torch.")


def _alive(found: Any) -> Any:
    if found is None:
        raise RegistrationError("the model that this registration belongs to is gone.")
    return found


def root_of(model: object) -> nn.Module | None:
    """The outermost module in ``model`` that ``fully_shard`` was applied to, if there is any.

    Raises:
        RegistrationError: if there are several, none of which holds the others.
    """
    if "torch.distributed.fsdp" not in sys.modules or not isinstance(model, nn.Module):
        return None
    roots = list(_outermost(model, sys.modules["torch.distributed.fsdp"].FSDPModule))
    if len(roots) > 1:
        raise RegistrationError(
            f"{type(model).__name__} holds {len(roots)} modules that fully_shard was applied to, and no one around "
            "them. Apply fully_shard to the whole model too, as the last call."
        )
    return roots[0] if roots else None


def _outermost(module: nn.Module, kind: type) -> Iterator[nn.Module]:
    if isinstance(module, kind):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kind)


def units_of(root: nn.Module) -> list[Unit]:
    """Its units, in the order of the model's modules.

    Raises:
        RegistrationError: if no hook can work between replicas of it.
    """
    names = {id(module): unwrapped(name) for name, module in root.named_modules()}
    units = []
    for name, state in states_of(root):
        groups = state._fsdp_param_groups
        if len(groups) > 1:
            raise RegistrationError(
                f"{name or 'the root'!r} is sharded in {len(groups)} groups of parameters (shard_placement_fn), and "
                "FSDP takes no hook there. Shard those modules by calls of their own."
            )
        units += [Unit(name, group, names) for group in groups]
    for unit in units:
        _refuse(unit)
    return units


def gather_anew(units: Iterable[Unit]) -> None:
    """Have the next forward gather the parameters from the shards as they are now; no forward is under way."""
    for unit in units:
        unit.group.wait_for_unshard()  # of an ``unshard()`` that the user has begun
        unit.group._to_sharded()


def _refuse(unit: Unit) -> None:
    info = unit.group.mesh_info
    if info.shard_mesh_dim is not None and info.replicate_mesh_dim is not None:
        raise RegistrationError(
            "fully_shard was given a mesh of two dimensions: FSDP then averages between replicas itself, and no hook "
            'can take its place. Give it the shards alone, fully_shard(module, mesh=mesh["shard"]), and register with '
            'process_group=mesh["replicate"].'
        )


def state_of(module: object) -> Any:
    """FSDP's state of a module that ``fully_shard`` was applied to."""
    return getattr(module, _STATE)()


def states_of(root: nn.Module) -> list[tuple[str, Any]]:
    """FSDP's states, each under the name of the first module that has it."""
    kind: type = sys.modules["torch.distributed.fsdp"].FSDPModule
    found: dict[int, tuple[str, Any]] = {}
    for name, module in root.named_modules():
        if isinstance(module, kind):
            state = state_of(module)
            found.setdefault(id(state), (unwrapped(name), state))
    return list(found.values())


def _name(kept: Any, names: dict[int, str]) -> str:
    info = kept._module_info
    prefix = names.get(id(info.module), "")
    return f"{prefix}.{info.param_name}" if prefix else str(info.param_name)
