"""Time what a cast costs the device, against copying the bucket: one thread, interleaved, medians and their ratio.

    python against_copy.py [--mib 25] [--steps 60]

Encoding is the mean's factor and the cast to 16 bits, decoding the cast back; nothing is sent. PyTorch's hooks cast,
divide, and copy back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from commhub import AllReduce, Bucket
from commhub.drivers._job import Scratch, make_job
from commhub.protocol._spans import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable


def bucket_of(x: torch.Tensor, ranks: int) -> Bucket:
    """A bucket over one parameter, among so many ranks."""
    spans = lay_out(["x"], [x])
    return Bucket(
        flat=x, parameters=(x,), used=(True,), index=0, step=0, divisor=ranks, rank=0, world_size=ranks, spans=spans
    )


def ours(bucket: Bucket, wire: torch.dtype, scratch: Scratch) -> None:
    """Encode and decode as the driver does."""
    job = make_job(AllReduce(bucket.flat, wire=wire), bucket, bucket.world_size, None, scratch)
    job.result(job.payload)


def theirs(x: torch.Tensor, wire: torch.dtype, ranks: int) -> None:
    """What PyTorch's hook does with a bucket."""
    x.copy_(x.to(wire).div_(ranks))


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=25)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, ranks, scratch = torch.randn(given.mib * 2**18), 2, Scratch()
    y = torch.empty_like(x)
    with torch.no_grad():
        for wire in (torch.float16, torch.bfloat16):
            calls = [
                partial(y.copy_, x),
                partial(ours, bucket_of(x.clone(), ranks), wire, scratch),
                partial(theirs, x.clone(), wire, ranks),
            ]
            rounds = [[seconds(call) for call in calls] for _ in range(given.steps + 5)][5:]
            copy, mine, other = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
            ratio = statistics.median(r[1] / r[0] for r in rounds)
            torchs = statistics.median(r[2] / r[0] for r in rounds)
            figures = f"commhub {mine:.3f} ms ({ratio:.2f} x), PyTorch {other:.3f} ms ({torchs:.2f} x)"
            print(f"{wire}: copy {copy:.3f} ms, {figures}")


if __name__ == "__main__":
    main()
