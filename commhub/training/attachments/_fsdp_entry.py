"""Where FSDP2 lets others in: between its reduce-scatter and the gradients, in place of that, and at its end.

All that is said here about PyTorch's private names was seen in torch 2.13.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ._fsdp import state_of, states_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn

    from ._fsdp import Unit

    Leave = Callable[[], None]
    Scattering = Callable[[Tensor, Tensor, int, float], None]

_CALLBACK = "_root_post_backward_final_callback"


def enter_between(unit: Unit, before: Callable[[], None], reduce: Callable[[Tensor], None]) -> Leave:
    """Have ``reduce`` called with each buffer that was reduced over the shards, and ``before`` ahead of that.

    Returns:
        What puts everything back.
    """
    group = unit.group
    former: Callable[[Tensor], None] | None = group._all_reduce_hook
    group._all_reduce_hook = reduce

    def leave(group: Any) -> None:
        group._all_reduce_hook = former

    return _watched(group, before, leave)


def enter_inside(unit: Unit, before: Callable[[], None], reduce: Scattering) -> Leave:
    """Have ``reduce`` called in place of each reduce-scatter, and ``before`` ahead of that.

    ``reduce`` gets the input, 1-D, a part for each rank; the output, as long as a part; what the sum is to be divided
    by, and the quotient to be multiplied by. Where there is one rank, FSDP has no reduce-scatter, and its buffer is
    both.

    Returns:
        What puts everything back.
    """
    group = unit.group
    if unit.shard_group.size() == 1:
        return enter_between(unit, before, lambda buffer: reduce(buffer.clone(), buffer, 1, 1.0))
    former = group._reduce_scatter_comm
    group._reduce_scatter_comm = _ReduceScatter(former, unit, reduce)

    def leave(group: Any) -> None:
        group._reduce_scatter_comm = former

    return _watched(group, before, leave)


class _ReduceScatter:
    """What FSDP calls for a reduce-scatter; buffers come from where they came from before."""

    def __init__(self, former: Any, unit: Unit, reduce: Scattering) -> None:
        self._former, self._unit, self._reduce = former, unit, reduce

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made: Tensor = self._former.allocate(size, dtype=dtype, device=device)
        return made

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,  # noqa: ARG002 - FSDP's own signature
    ) -> None:
        divisor, factor = group.size(), 1.0
        if op == dist.ReduceOp.SUM:  # FSDP divides before and after
            divisor = 1
        elif op != dist.ReduceOp.AVG:  # a product with one over what the user has set, and the sum
            factor = divisor / (self._unit.divide_factor or 1.0)
        self._reduce(input_tensor, output_tensor, divisor, factor)


def _watched(group: Any, before: Callable[[], None], leave: Callable[[Any], None]) -> Leave:
    post_backward = group.post_backward

    def watched(*unused: Any) -> None:
        before()
        post_backward(*unused)

    group.post_backward = watched
    there = weakref.ref(group)

    def leave_all() -> None:
        found = there()
        if found is not None:
            leave(found)
            del found.post_backward

    return leave_all


def is_backward_unended(root: nn.Module) -> bool:
    """Whether FSDP waits for the end of a backward; where none is under way, one has ended in an exception.

    FSDP then ends no backward any more: it asks for its callback only once in each.
    """
    return bool(state_of(root)._state_ctx.post_backward_final_callback_queued)


def at_end_of_backward(root: nn.Module, function: weakref.WeakMethod[Callable[[], None]]) -> Callable[[], None]:
    """Have ``function`` called when FSDP has ended a backward: gradients are then where the user reads them.

    Returns:
        What ends that.
    """
    states = [state for _, state in states_of(root)]

    def wrap(original: Callable[[], None]) -> Callable[[], None]:
        def ended() -> None:
            original()
            then = function()
            if then is not None:
                then()

        return ended

    for state in states:
        setattr(state, _CALLBACK, wrap(getattr(state, _CALLBACK)))

    there = [weakref.ref(state) for state in states]

    def leave() -> None:
        for state in there:
            found = state()
            if found is not None:
                found.__dict__.pop(_CALLBACK, None)

    return leave
