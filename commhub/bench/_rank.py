"""A rank's process: join the others, train under one hook after another, tell what happens as events.

An event is a dict with a ``kind``: ``"setup"`` (what was found here); ``"start"``, ``"step"``, ``"done"`` and
``"failed"`` (training under the hook at ``index``); ``"race"``, ``"timed"``, ``"dropped"``, ``"raced"`` and
``"race failed"`` (steps of all hooks in turn); or ``"fatal"`` (no hook can be run). Started by
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

from commhub.bench import _format

from ._hooks import in_steady_state, sending_nothing
from ._lifeline import die_with
from ._machine import threads_per_rank
from ._options import Settings
from ._timed import FLOOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

    from ._results import StepRecord

_TIMEOUT = timedelta(minutes=5)


def run_rank(
    settings: Settings,
    indexes: Sequence[int],
    emit: Callable[[dict[str, Any]], None],
    *,
    go_on: bool,
    raced: Sequence[int] = (),
) -> bool:
    """Train under the hooks at ``indexes``, each in a process group of its own: one that fails leaves nothing behind.

    Then time steps of those that finished.

    Args:
        settings: what to do.
        indexes: of the hooks in ``settings.hooks``.
        emit: called with each event.
        go_on: whether to try the next hook after a failure, or to leave that to a fresh set of processes.
        raced: indexes of hooks that are timed too, because they have finished in other processes.

    Returns:
        Whether all of them finished.
    """
    # Heavy imports come after the lifeline is watched.
    import torch
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    from ._data import Text
    from ._exchange import check_same_text
    from ._race import race
    from ._sizes import SIZES
    from ._text import read_text
    from ._train import train

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if settings.hosts > 1:
        os.environ["COMMHUB_HOST"] = f"host{rank * settings.hosts // world_size}"
    torch.set_num_threads(threads_per_rank(settings.threads, world_size if settings.hosts > 1 else local_ranks))
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
    finished, raced = True, list(raced)
    for index in indexes:
        emit({"kind": "start", "index": index})
        try:
            own_store = PrefixStore(f"commhub-bench-{index}", store)
            with _process_group(own_store, rank, world_size, device):
                check_same_text(content, device)
                on_step = partial(_emit_step, emit, index)
                loss = train(settings, in_steady_state(settings.hooks[index]), text, device, on_step)
            emit({"kind": "done", "index": index, "validation_loss": loss})
            raced.append(index)
        except Exception as err:  # noqa: BLE001 - whatever a hook raises becomes its row
            emit({"kind": "failed", "index": index, "error": _format.error(err), "time": time.time()})
            finished = False
            if not go_on:
                return False
    if not settings.repeats or not raced:
        return finished
    hooks = _to_time(settings, raced)
    emit({"kind": "race", "hooks": len(hooks)})
    try:
        with _process_group(PrefixStore("commhub-bench-race", store), rank, world_size, device):
            race(settings, hooks, text, device, emit)
    except Exception as err:  # noqa: BLE001 - what was trained is told all the same
        emit({"kind": "race failed", "error": _format.error(err), "time": time.time()})
        return False
    emit({"kind": "raced"})
    return finished


def _to_time(settings: Settings, indexes: Iterable[int]) -> dict[int, str]:
    """Hook strings by index, with a step without communication if none of them is that and it can be had."""
    hooks = {index: in_steady_state(settings.hooks[index]) for index in sorted(indexes)}
    floor = sending_nothing()
    return hooks if floor is None or floor in hooks.values() else {**hooks, FLOOR: floor}


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


def _device(settings: Settings, local_ranks: int) -> torch.device:
    """One GPU per rank, or the CPU. A link is emulated by waiting on the CPU, so only there.

    Raises:
        ValueError: if GPUs were asked for and cannot be used.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shaped = settings.emulated or settings.hosts > 1
    if settings.device == "cpu" or (settings.device == "auto" and (found < local_ranks or shaped)):
        return torch.device("cpu")
    if settings.hosts > 1:
        raise ValueError("hosts on one machine train on the CPU only: leave --device cuda, or --hosts")
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
            raced=job["raced"],
        )
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
