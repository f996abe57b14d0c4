"""The driver for CUDA tensors: the exchange is enqueued on a side stream, and the host waits for nothing.

One host thread calls the hooks in bucket order, so the order of collectives is equal on all ranks by itself, and the
model's own NCCL group serves. A collective's ``wait`` makes the side stream wait, not the host. Peers of a rank that
fails are ended by NCCL's watchdog after the group's timeout: a collective in flight on a device cannot be recalled.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from commhub._errors import HookError
from commhub.protocol._collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    Collective,
    ReduceScatter,
    Subgroup,
)

from ._failure import own_error
from ._job import Job, way

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._network import Network
    from ._task import Task
    from ._timeline import Recorder


class CudaStreams:
    """A side stream of a device, and the ways to and from it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)

    def enter(self, tensor: Tensor) -> contextlib.AbstractContextManager[object]:
        """Work enqueued inside runs on the side stream, after what was enqueued before; it uses ``tensor``."""
        if torch.cuda.is_current_stream_capturing():
            raise HookError("a CUDA graph is being captured, and a hook cannot be part of it. Capture forward only.")
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        tensor.record_stream(self._side)
        return torch.cuda.stream(self._side)

    def leave(self) -> None:
        """Work enqueued from now on, on the current stream, runs after all that is on the side stream."""
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    def future(self) -> torch.futures.Future[Tensor]:
        """A future whose waiters' streams wait for the stream on which it was completed."""
        return torch.futures.Future(devices=[self.device])


class StreamDriver:
    """Drives each task to its end as it is submitted; see ``ThreadDriver`` for the meaning of the methods.

    Args:
        group: the model's process group.
        streams: where to enqueue.
        meter: keeps what happened when: the host's times, which enqueues and does not wait.
        label: the hook's name, distribution and version, for errors.
    """

    confirms = False  # nothing is known on the host when a step ends there, nor waited for

    def __init__(self, group: dist.ProcessGroup, streams: CudaStreams, meter: Recorder, *, label: str) -> None:
        self.meter, self.label = meter, label
        self.network: Network | None = None
        self.failure: HookError | None = None
        self._streams = streams
        self._groups: dict[Subgroup | None, dist.ProcessGroup] = {None: group}
        self._ranks = dist.get_process_group_ranks(group)
        self.partitions = 0

    def connect(self, groups: Sequence[Sequence[int]]) -> tuple[Subgroup, ...]:
        """Communicators among each of the groups; every rank calls this with the same ones, in the same order."""
        self.partitions += 1
        made = tuple(Subgroup(tuple(ranks), self.partitions) for ranks in groups)
        for subgroup in made:
            members = [self._ranks[rank] for rank in subgroup.ranks]
            if dist.get_rank() in members:
                self._groups[subgroup] = dist.new_group(members, use_local_synchronization=True)
        return made

    def future(self) -> torch.futures.Future[Tensor]:
        """A future for one bucket."""
        return self._streams.future()

    def submit(self, task: Task) -> None:
        """Enqueue the bucket's whole exchange."""
        if self.failure is not None:
            task.cancel()
            return
        try:
            with self._streams.enter(task.bucket.flat):
                task.start()
                while not task.finished:
                    if task.record is not None:
                        task.record.stages[-1].issued = time.monotonic()
                    task.resume([self._carry_out(job) for job in task.jobs])
                task.complete()
        except BaseException as error:  # noqa: BLE001 - a hook may raise anything
            self.failure = own_error(self.label, task.bucket, error)
            task.cancel()

    def _carry_out(self, job: Job) -> Tensor:
        """Enqueue one collective and what waits for it; subgroups' communicators are never in flight together."""
        enqueue = way(WAYS, job.kind, "by the stream driver, over NCCL")
        payload = job.payload
        if job.p == 1 or not payload.numel():
            return job.alone()
        in_place = job.kind.in_place
        out = payload if in_place else payload.new_empty(job.kind.result_numel(payload.numel(), job.p))
        enqueue(job, out, self._groups[job.group])
        return out

    def end_round(self) -> None:
        """Nothing is left to say: every task is enqueued."""

    def wait(self) -> None:
        """Make the current stream wait for the exchanges."""
        self._streams.leave()

    def in_use(self) -> str:
        """Nothing: what is enqueued on a device runs before whatever is enqueued later."""
        return ""

    def tell(self, text: str) -> None:
        """Nothing: the groups are the process group's own, made with its timeout."""

    def close(self, leaving: str = "") -> None:  # noqa: ARG002 - NCCL's watchdog tells the peers
        """Free the subgroups; the model's own group is not ours."""
        for subgroup, group in list(self._groups.items()):
            if subgroup is not None:
                del self._groups[subgroup]
                with contextlib.suppress(RuntimeError, ValueError):
                    dist.destroy_process_group(group)


def _all_reduce(_job: Job, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(dist.all_reduce(out, group=group, async_op=True))


def _reduce_scatter(job: Job, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(dist.reduce_scatter_single(out, job.payload, group=group, async_op=True))


def _all_gather(job: Job, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(dist.all_gather_single(_octets(out), _octets(job.payload), group=group, async_op=True))


def _all_to_all(job: Job, out: Tensor, group: dist.ProcessGroup) -> None:
    _wait(dist.all_to_all_single(_octets(out), _octets(job.payload), group=group, async_op=True))


def _broadcast(job: Job, out: Tensor, group: dist.ProcessGroup) -> None:
    src = cast("Broadcast", job.asked).src
    _wait(dist.broadcast(_octets(out), group=group, async_op=True, group_src=src))


def _octets(tensor: Tensor) -> Tensor:
    """What is only moved may have any dtype."""
    return tensor.view(torch.uint8)


def _wait(work: dist.Work) -> None:
    """Make the side stream wait; the host does not."""
    work.wait()


WAYS: dict[type[Collective], Callable[[Job, Tensor, dist.ProcessGroup], None]] = {
    AllReduce: _all_reduce,
    ReduceScatter: _reduce_scatter,
    AllGather: _all_gather,
    AllToAll: _all_to_all,
    Broadcast: _broadcast,
}
"""How each kind is enqueued, given where its result goes: for one in place the payload, for others a new tensor."""
