"""Time encoding and decoding a bucket against copying it: one thread, steps interleaved, medians and their ratio.

    python against_copy.py [--mib 25] [--steps 60] [--device cuda]

Compiled first, then uncompiled, then PyTorch's per-channel quantization. Last, what a whole step of the hook works on
each of two ranks, on the host: all gradients encoded, a half of what both sent decoded, summed and encoded, the mean
decoded, and messages filled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from commhub_quantize import QuantizePerChannel
from commhub_quantize._coding import Coding, marks_of
from commhub_quantize._work import work_on
from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks

import commhub
from commhub.testing import Watched

if TYPE_CHECKING:
    from collections.abc import Callable

CODINGS = {
    "int8, groups of 256": Coding(bits=8, row=256),
    "int8, groups of 256, affine": Coding(bits=8, row=256, symmetric=False),
    "int4, groups of 256": Coding(bits=4, row=256),
    "int2, groups of 256": Coding(bits=2, row=256),
    "int8, one scale": Coding(bits=8, row=256, whole=True),
}


def both_ways(coding: Coding, x: torch.Tensor, *, keeping: bool = False) -> Callable[[], None]:
    """Encode and decode ``x``, as a hook does with a bucket."""
    work = work_on(coding, x.dtype, x.device, x.numel(), keeping=keeping)
    values = x.view(-1, coding.row)
    marks, extents = (values.new_empty(len(values), coding.marks) for _ in range(2))
    codes = torch.empty(len(values), coding.row_bytes, dtype=torch.int8, device=x.device)
    out = torch.empty_like(values)

    def run() -> None:
        if coding.whole:
            work.extents(values, extents)
            marks.copy_(marks_of(extents.amax(0, keepdim=True), coding).expand_as(marks))
        work.encode(values, marks, codes, None, keeping=keeping)
        work.decode(codes, marks, out, adding=False)

    return run


class Stopwatch:
    """The seconds of each ``with`` block."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.laps.append(time.perf_counter() - self._began)


def whole_hook(options: dict[str, object], mib: int, steps: int) -> float:
    """Seconds of a step's work on one of two ranks: the sum of its stages' medians."""
    gradients = [[torch.randn(mib * 2**8, 2**10)] for _ in range(2)]
    hook = Watched(QuantizePerChannel(**options), Stopwatch, since=2)
    laps = commhub.simulate(hook, gradients, steps=steps + 2).hooks[0].seen.laps
    stages = len(laps) // steps
    return sum(statistics.median(laps[stage::stages]) for stage in range(stages))


def seconds(function: Callable[[], object], device: str) -> float:
    """Of one call."""
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(name: str, function: Callable[[], None], copy: Callable[[], object], device: str, steps: int) -> None:
    """Print medians and the median of the ratios of neighbours."""
    pairs = [(seconds(copy, device), seconds(function, device)) for _ in range(steps + 5)][5:]
    ratio = statistics.median(b / a for a, b in pairs)
    first, second = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{name:44} copy {first:8.3f} ms   both ways {second:8.3f} ms   ratio {ratio:6.2f}", flush=True)


def torch_per_channel(x: torch.Tensor) -> None:
    """What PyTorch's hook does to a bucket."""
    groups = quantization_hooks._quantize_per_channel_backend(
        x.view(-1, 512), *_scales(x.view(-1, 512))
    )  # fmt: skip
    quantization_hooks._dequantize_per_channel_backend(groups, *_scales(x.view(-1, 512)))


def _scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale = (high - low) / 255
    return scale, (-low / scale).round().to(torch.int32)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=25)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(given.mib * 2**18, device=given.device)
    y = torch.empty_like(x)
    copy = partial(y.copy_, x)
    with torch.no_grad():
        for compiled in ("1", "0"):
            os.environ["COMMHUB_COMPILE"] = compiled
            label = "compiled" if compiled == "1" else "eager"
            for name, coding in CODINGS.items():
                compare(f"{name}, {label}", both_ways(coding, x), copy, given.device, given.steps)
            residual = both_ways(CODINGS["int8, groups of 256"], x.clone(), keeping=True)
            compare(f"int8, groups of 256, residual, {label}", residual, copy, given.device, given.steps)
        compare("PyTorch, per channel", partial(torch_per_channel, x), copy, given.device, 3)
        if given.device == "cpu":
            os.environ["COMMHUB_COMPILE"] = "1"
            for options in ({}, {"symmetric": False}, {"bits": 4}, {"bits": 2}):
                label = ", ".join(f"{name}={value}" for name, value in options.items()) or "as it comes"
                both = 1e3 * whole_hook(options, given.mib, given.steps)
                print(f"the whole hook, {label}: {both:.1f} ms a step")


if __name__ == "__main__":
    main()
