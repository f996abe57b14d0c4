"""A rank's process: join the others, train under one hook after another, tell what happens as events.

An event is a dict with a ``kind``: ``"setup"`` (what was found here), ``"start"``, ``"step"``, ``"done"`` and
``"failed"`` (of the hook at ``index``), or ``"fatal"`` (no hook can be run). Started by
``python -m commhub.bench._rank FOLDER`` from the launcher, it writes them to a file; under a torchrun that the user
started, rank 0 hands them on directly.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from commhub._printable import message_of, type_name

from ._lifeline import die_with
from ._machine import threads_per_rank
from ._options import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

    from ._results import StepRecord

_TIMEOUT = timedelta(minutes=5)


def run_rank(
    settings: Settings, indexes: Sequence[int], emit: Callable[[dict[str, Any]], None], *, go_on: bool
) -> bool:
    """Train under the hooks at ``indexes``, each in a process group of its own: one that fails leaves nothing behind.

    Args:
        settings: what to do.
        indexes: of the hooks in ``settings.hooks``.
        emit: called with each event.
        go_on: whether to try the next hook after a failure, or to leave that to a fresh set of processes.

    Returns:
        Whether all of them finished.
    """
    # Heavy imports come after the lifeline is watched.
    import torch
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    from ._data import Text
    from ._hooks import in_steady_state
    from ._sizes import SIZES
    from ._text import read_text
    from ._train import check_same_text, train

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    torch.set_num_threads(threads_per_rank(settings.threads, local_ranks))
    try:
        device = _device(settings, local_ranks)
        content = read_text(settings.data)
        text = Text.cut(content, context=SIZES[settings.model].context)
        text.batch(0, rank=rank, world_size=world_size, size=settings.batch, seed=settings.seed)
    except (OSError, ValueError) as err:
        emit({"kind": "fatal", "error": str(err)})
        return False
    emit({"kind": "setup", **_setup(settings, device, world_size, len(content))})
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=_TIMEOUT))
    finished = True
    for index in indexes:
        emit({"kind": "start", "index": index})
        try:
            own_store = PrefixStore(f"commhub-bench-{index}", store)
            with _process_group(own_store, rank, world_size, device):
                check_same_text(content, device)
                on_step = partial(_emit_step, emit, index)
                loss = train(settings, in_steady_state(settings.hooks[index]), text, device, on_step)
            emit({"kind": "done", "index": index, "validation_loss": loss})
        except Exception as err:  # noqa: BLE001 - whatever a hook raises becomes its row
            emit({"kind": "failed", "index": index, "error": describe(err), "time": time.time()})
            finished = False
            if not go_on:
                return False
    return finished


def _emit_step(emit: Callable[[dict[str, Any]], None], index: int, record: StepRecord) -> None:
    emit({"kind": "step", "index": index, "record": attrs.asdict(record)})


@contextlib.contextmanager
def _process_group(store: Store, rank: int, world_size: int, device: torch.device) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def describe(err: BaseException) -> str:
    """An error in one line, with its type where the text alone would not tell."""
    lines = message_of(err).strip().splitlines() or [""]
    return f"{type_name(err)}: {lines[0]}".rstrip(": ")


def _device(settings: Settings, local_ranks: int) -> torch.device:
    """One GPU per rank, or the CPU. A link is emulated by waiting on the CPU, so only there.

    Raises:
        ValueError: if GPUs were asked for and cannot be used.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device == "auto" and (found < local_ranks or settings.emulated)):
        return torch.device("cpu")
    if settings.emulated:
        raise ValueError("a link can be emulated on the CPU only: leave --device cuda, or --bandwidth and --latency")
    if found < local_ranks:
        raise ValueError(f"--device cuda needs a GPU per rank: {local_ranks} ranks here, {found} GPUs found")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _setup(settings: Settings, device: torch.device, world_size: int, text_bytes: int) -> dict[str, Any]:
    import torch

    from ._model import Transformer
    from ._sizes import SIZES

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(SIZES[settings.model]).parameters())
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "world_size": world_size,
        "machines": world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "text_bytes": text_bytes,
    }


def _main(folder: Path) -> int:
    die_with(folder)
    job = json.loads((folder / "job.json").read_text())
    with (folder / f"events-{os.environ['RANK']}.jsonl").open("a", buffering=1) as events:
        finished = run_rank(
            Settings.from_dict(job["settings"]),
            job["indexes"],
            lambda event: print(json.dumps(event), file=events, flush=True),
            go_on=False,
        )
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
