"""The same with a sharded optimizer: who owns a parameter steps it, and sends it to the others at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from commhub import AllReduce, Broadcast, RegistrationError

from ._overlap import Overlap
from ._standin import Members, Update, step_some
from ._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from commhub import Bucket, Exchange, Setup

_PRIVATE = ("_param_to_rank", "_sync_params", "_sync_param_groups", "_overlap_with_ddp", "optim")


class ZeroWatch(Watch):
    """Watches a ZeroRedundancyOptimizer: ``step()`` sends only the parameters that were not sent in backward."""

    def _install(self, optimizer: Any) -> None:
        super()._install(optimizer)
        optimizer._sync_params = self._send_what_is_left

    def _uninstall(self) -> None:
        super()._uninstall()
        optimizer = self._optimizer()
        if optimizer is not None:
            vars(optimizer).pop("_sync_params", None)

    def _send_what_is_left(self) -> None:
        zero: Any = self._optimizer()
        with torch.no_grad():
            for parameter, owner in zero._param_to_rank.items():
                if id(parameter) not in self.stepped:
                    values = parameter.detach().contiguous()
                    dist.broadcast(values, group=zero.process_group, group_src=owner)
                    parameter.copy_(values)


@attrs.define(eq=False, kw_only=True, slots=False)
class ZeroOverlap(Overlap):
    """Average gradients with another hook; each parameter's owner steps it and sends it, in backward.

    With ``torch.distributed.optim.ZeroRedundancyOptimizer`` (ZeRO stage 1; Rajbhandari et al. 2020, arXiv 1910.02054).
    For each bucket, or for all of them once the last one's gradients are there (``mode="stepwise"``):

    1. average the gradients with the inner hook
    2. step the parameters that this rank owns, with the local optimizer
    3. every owner broadcasts its parameters: one message per owner
    """

    mode: str = attrs.field(default="interleaved", validator=attrs.validators.in_(("interleaved", "stepwise")))
    _zero: Any = attrs.field(init=False, repr=False, default=None)
    _local: Any = attrs.field(init=False, repr=False, default=None)
    _all: Any = attrs.field(init=False, repr=False, default=None)
    _expected: int = attrs.field(init=False, repr=False, default=0)
    _latest: tuple[int, int] = attrs.field(init=False, repr=False, default=(-1, -1))
    _buckets: int = attrs.field(init=False, repr=False, default=0)
    _seen: int = attrs.field(init=False, repr=False, default=0)
    _arrived: int = attrs.field(init=False, repr=False, default=0)
    _awaiting: list[tuple[Bucket, tuple[bool, ...]]] = attrs.field(init=False, repr=False, factory=list)

    def prepare(self, setup: Setup) -> None:
        """Prepare the inner hook and watch the optimizer.

        Raises:
            RegistrationError: if it is no ZeroRedundancyOptimizer of this model's ranks, or cannot be overlapped.
        """
        super().prepare(setup)
        if not setup.parameters:
            return
        (self._zero,) = setup.optimizers
        self._local, self._all = Members([self._zero.optim]), Members([self._zero])
        self._expected = len(setup.names)

    def _watch(self, optimizer: torch.optim.Optimizer) -> Watch:
        return ZeroWatch.on(optimizer, is_scaled=not self._is_early)

    def _check(self, setup: Setup) -> None:
        if len(setup.optimizers) != 1 or not isinstance(setup.optimizers[0], ZeroRedundancyOptimizer):
            raise RegistrationError("zero_overlap takes one torch.distributed.optim.ZeroRedundancyOptimizer.")
        zero: Any = setup.optimizers[0]
        missing = [name for name in _PRIVATE if not hasattr(zero, name)]
        if "_overlap_with_ddp" not in missing and zero._overlap_with_ddp:
            raise RegistrationError("this ZeroRedundancyOptimizer has overlap_with_ddp=True. Leave that out.")
        if missing:
            raise RegistrationError(f"this torch's ZeroRedundancyOptimizer has no {missing[0]}. Use it without a hook.")
        if (zero.rank, zero.world_size) != (setup.rank, setup.world_size):
            raise RegistrationError(
                f"the optimizer is sharded over {zero.world_size} ranks, and gradients are averaged over "
                f"{setup.world_size}. Give both the same process_group."
            )
        super()._check(setup)

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average with the inner hook, then step and send what is due."""
        if self._zero is None:
            yield from self._simulate(bucket)
            return
        is_last = self._is_last(bucket)
        used = yield from self._reduced(bucket)
        chosen = used if self._overlaps else (False,) * len(used)
        self._arrived += 1
        if not self._watches:
            return
        if self.mode == "interleaved" or not self._overlaps:
            yield from self._update([(bucket, chosen)])
            return
        self._awaiting.append((bucket, chosen))
        if is_last:
            yield from self._all_there(bucket)
            yield from self._update(sorted(self._awaiting, key=lambda pair: pair[0].index))
            self._awaiting.clear()

    def _simulate(self, bucket: Bucket) -> Exchange:
        """Without parameters, send as many bytes as they would be."""
        yield from self._reduced(bucket)
        yield from _send([(bucket.index % bucket.world_size, [bucket.flat.clone()])], bucket.rank)

    def _is_last(self, bucket: Bucket) -> bool:
        """Whether all parameters have come with this bucket. Buckets come in order, and end in any."""
        if bucket.step != self._latest[0] or bucket.index <= self._latest[1]:
            self._buckets = self._seen = self._arrived = 0
            self._awaiting.clear()
        self._latest = bucket.step, bucket.index
        self._buckets += 1
        self._seen += len(bucket.parameters)
        return self._seen == self._expected

    def _all_there(self, bucket: Bucket) -> Generator[Any, Any, None]:
        """Wait until every bucket is reduced on every rank. All ranks decide alike, from what they send each other."""
        while True:
            missing = torch.tensor([self._buckets - self._arrived], dtype=torch.int32, device=bucket.flat.device)
            if not (yield AllReduce(missing, op="sum")).item():
                return

    def _update(self, due: Sequence[tuple[Bucket, Sequence[bool]]]) -> Generator[Any, Any, None]:
        """Step what this rank owns of the chosen parameters, and have every owner send its own."""
        zero = self._zero
        zero._sync_param_groups(zero.param_groups, zero.optim.param_groups)  # schedulers set the former
        owners, local, all_groups = zero._param_to_rank, self._local(), self._all()
        updates: list[Update] = []
        parts: list[tuple[int, list[Tensor]]] = []
        for bucket, chosen in due:
            ours = [
                (parameter, gradient, is_chosen)
                for parameter, gradient, is_chosen in zip(bucket.parameters, bucket.gradients, chosen, strict=True)
                if parameter in owners
            ]
            some = [(p, all_groups[id(p)][1]) for p, _, is_chosen in ours if is_chosen]
            left = [parameter for parameter, _, is_chosen in ours if not is_chosen]
            self._watches[0].claim(some, left, took_part=any(bucket.used))
            updates += [Update(local[id(p)][1], p, g) for p, g, is_chosen in ours if is_chosen and id(p) in local]
            by_owner: dict[int, list[Tensor]] = {}
            for parameter, _ in some:
                by_owner.setdefault(owners[parameter], []).append(parameter)
            parts += sorted(by_owner.items())
            if self.undo:
                self._undo.note(bucket.step, zero.optim, [(parameter, None) for parameter, _ in some])
        step_some(zero.optim, updates)
        yield from _send(parts, zero.rank)


def _send(parts: Sequence[tuple[int, Sequence[Tensor]]], rank: int) -> Generator[Any, Any, None]:
    """Send parameters from their owners: ``parts`` are (owner, parameters), the same on all ranks.

    They travel in their own dtype, whatever the registration's wire is.
    """
    requests = []
    for owner, parameters in parts:
        if owner == rank:
            values = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        else:
            values = parameters[0].new_empty(sum(parameter.numel() for parameter in parameters))
        real = torch.view_as_real(values).dtype if values.is_complex() else values.dtype
        requests.append(Broadcast(values, src=owner, wire=real))
    if not requests:
        return
    received = yield tuple(requests)
    for (owner, parameters), values in zip(parts, received, strict=True):
        if owner != rank:
            for parameter, mine in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(mine.view(parameter.shape))
