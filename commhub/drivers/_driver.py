"""What an engine asks of a driver, and which driver it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from commhub._errors import described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

    from commhub._errors import HookError
    from commhub.protocol._collectives import Subgroup

    from ._network import Network
    from ._task import Task
    from ._timeline import Recorder


class Driver(Protocol):
    """What carries tasks out; see HOW_IT_WORKS.md in this folder."""

    meter: Recorder
    failure: HookError | None
    network: Network | None
    partitions: int
    """How often groups were made: ``connect`` waits for other ranks."""
    confirms: bool
    """Whether a round can end on this rank before it is known to have ended well on the others."""

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among disjoint groups of ranks."""

    def submit(self, task: Task) -> None:
        """Take the round's next bucket."""

    def end_round(self) -> None:
        """No more buckets come until ``wait`` has returned."""

    def wait(self) -> None:
        """Return when every task is complete."""

    def future(self) -> torch.futures.Future[Tensor]:
        """A future for a bucket, to be completed from ``Task``'s ``done``."""

    def in_use(self) -> str:
        """Why memory of its buckets may still be written to, for people; empty if it is not."""

    def tell(self, text: str) -> None:
        """Say to peers that connect their groups, or train on, why this rank does not."""

    def close(self, leaving: str = "") -> None:
        """Give up threads and groups; ``leaving`` tells peers that go on how this rank leaves them."""


def make_driver(
    *,
    device: torch.device,
    group: ProcessGroup,
    rank: int,
    size: int,
    timeout: float,
    label: str,
    branch: Callable[[str], Store],
) -> Driver:
    """The driver for gradients on a device; collective.

    Args:
        device: where the gradients are.
        group: the model's process group.
        rank, size: in that group.
        timeout: seconds after which a collective has failed, and a hook that has not returned.
        label: the hook's name, distribution and version, for errors.
        branch: gives a part of the group's store by name, the same on every rank, that nothing else uses.

    Raises:
        RegistrationError: if the ranks cannot be connected.
    """
    make: Callable[..., Driver] = BY_DEVICE.get(device.type, _on_threads)
    return make(device=device, group=group, rank=rank, size=size, timeout=timeout, label=label, branch=branch)


def _on_threads(
    *, rank: int, size: int, timeout: float, label: str, branch: Callable[[str], Store], **_: Any
) -> Driver:
    from ._board import FailureBoard
    from ._gloo import GlooCommunicator
    from ._meeting import Unmet
    from ._signature import Signatures
    from ._thread import ThreadDriver
    from ._timeline import Recorder

    board, signatures = FailureBoard(branch("board"), rank, size), Signatures(branch("signatures"), rank, size)
    patience = timeout + 5.0  # the driver's own timeout comes first, and knows what it was waiting for
    try:
        communicator = GlooCommunicator(branch("gloo"), rank, size, patience, board, connects_within=timeout)
    except Unmet:
        raise
    except BaseException as error:
        board.post(described(error))
        raise
    driver = ThreadDriver(communicator, board, signatures, Recorder(_name(label)), timeout=timeout, label=label)
    if size > 1:
        driver.listen()
    return driver


def _on_streams(*, device: torch.device, group: ProcessGroup, label: str, **_: Any) -> Driver:
    from ._stream import CudaStreams, StreamDriver
    from ._timeline import Recorder

    return StreamDriver(group, CudaStreams(device), Recorder(_name(label), enqueues=True), label=label)


def _name(label: str) -> str:
    """The hook's name, of its name, distribution and version."""
    return label.partition(" ")[0]


BY_DEVICE: dict[str, Callable[..., Driver]] = {"cpu": _on_threads, "cuda": _on_streams}
"""What makes a driver, given what ``make_driver`` is given, by the type of the device; any other is taken for a CPU."""
