"""Post-local SGD's gradients: averaged among all ranks, then within a group or not at all.

commhub's ``post_local_sgd`` averages parameters too; PyTorch's hook leaves these to an averager that the script calls.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch.distributed as dist

import commhub
from commhub import AllReduce

from ._order import Order, as_comm_hook, group_of

if TYPE_CHECKING:
    from commhub import Bucket, Exchange, Registration, Setup, Subgroup


class PostLocalSGDState:
    """The settings of ``post_localSGD_hook``, read when that registers.

    Args:
        process_group: the ranks to average over at first; ``None`` is the model's own.
        subgroup: those to average over later, this rank among them; ``None`` is the ranks of its host.
        start_localSGD_iter: steps of plain averages first.
        post_local_gradient_allreduce: average within the subgroup then; otherwise each rank keeps its own gradients.
    """

    def __init__(
        self,
        process_group: Any,
        subgroup: Any,
        start_localSGD_iter: int,  # noqa: N803 - PyTorch's name
        post_local_gradient_allreduce: bool = True,
    ) -> None:
        self.process_group = process_group
        self.subgroup = subgroup
        self.start_localSGD_iter = start_localSGD_iter
        self.post_local_gradient_allreduce = post_local_gradient_allreduce
        self._registration: weakref.ref[Registration] | None = None

    @property
    def iter(self) -> int:
        """Synchronised backward passes so far, counted until local steps begin, as PyTorch does."""
        registration = None if self._registration is None else self._registration()
        return 0 if registration is None else min(registration.step, self.start_localSGD_iter)

    def _take(self, registration: Registration) -> None:
        self._registration = weakref.ref(registration)


@attrs.define(kw_only=True)
class LocalGradients:
    """A hook that averages gradients among all ranks before ``start_step``, and within a group from then on.

    Args:
        start_step: steps of plain averages, 0 or more.
        local_gradients: average within the group; otherwise every rank keeps its own.
        subgroup: the process group of the local averages; ``None`` is the ranks of one host.
    """

    start_step: int
    local_gradients: bool
    subgroup: dist.ProcessGroup | None = attrs.field(repr=False)
    _host: Subgroup | None = attrs.field(init=False, repr=False, default=None)

    def prepare(self, setup: Setup) -> None:
        """Find the ranks on this host, where these are asked for."""
        if self.local_gradients and self.subgroup is None:
            hosts = [[r for r, host in enumerate(setup.hosts) if host == one] for one in sorted(set(setup.hosts))]
            self._host = setup.partition(hosts)

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average over all ranks, later over the group's."""
        if bucket.step < self.start_step:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
        elif self.local_gradients and self.subgroup is None:
            bucket.flat.copy_((yield AllReduce(bucket.flat, group=self._host)))
        elif self.local_gradients:
            # Only this rank's own group is known here, while commhub makes subgroups of all ranks at once.
            bucket.flat.mul_(1.0 / dist.get_world_size(self.subgroup))
            dist.all_reduce(bucket.flat, group=self.subgroup)


@as_comm_hook
def post_localSGD_hook(state: Any) -> Order:  # noqa: N802 - PyTorch's name
    """Gradients of post-local SGD: for ``model.register_comm_hook(PostLocalSGDState(...), post_localSGD_hook)``.

    An averager or ``PostLocalSGDOptimizer`` averages the parameters, as with PyTorch. ``commhub.register(model,
    "post_local_sgd", optimizer=optimizer)`` does both.
    """
    if not isinstance(state, PostLocalSGDState):
        raise commhub.HookOptionError(
            f"the state is {type(state).__name__}. Give a commhub_compat.PostLocalSGDState; PyTorch's own is not read."
        )
    subgroup = state.subgroup
    if subgroup is dist.GroupMember.NON_GROUP_MEMBER:
        raise commhub.HookOptionError("subgroup is one that this rank is not in. Give each rank its own.")
    hook = LocalGradients(
        start_step=state.start_localSGD_iter,
        local_gradients=bool(state.post_local_gradient_allreduce),
        subgroup=group_of(subgroup),
    )
    return Order(hook=hook, process_group=group_of(state.process_group), registered=state._take)
