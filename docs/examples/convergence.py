"""Train under every compressing hook with several seeds and numbers of ranks, and compare the loss with allreduce's.

    python docs/examples/convergence.py [--optimizer adamw] [--steps 500] [--seeds 3] [--ranks 2,4]
        [--shard 1] [--skip TEXT,...] [--keep FOLDER]

Runs ``commhub bench`` on its default text once for each seed and number of ranks, the same 8 windows of text a step
whatever the ranks, and prints a table in Markdown. With --shard FSDP2 shards the model over that many ranks, and hooks
work between the replicas. Hooks whose string holds one of the TEXTs are left out. What is in FOLDER already is not run
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WINDOWS = 8  # a step, over all ranks


def hooks(steps: int) -> list[str]:
    """Hook strings; PowerSGD starts after a tenth of the steps."""
    start = steps // 10
    return [
        "allreduce",
        "fp16",
        "bf16",
        "quantize_per_tensor",
        "quantize_per_channel",
        "quantize_per_channel(bits=4)",
        f"powersgd(rank=4, start_step={start})",
        f"powersgd(num_power_iterations=2, rank=4, start_step={start})",
        f"powersgd_rank2(start_step={start})",
        f"batched_powersgd_rank2(start_step={start})",
    ]


def bench(given: argparse.Namespace, ranks: int, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """By hook string: loss, validation loss and compression of one run."""
    steps, optimizer = given.steps, given.optimizer
    chosen = [hook for hook in hooks(steps) if not any(text and text in hook for text in given.skip.split(","))]
    sharded = f"-shard{given.shard}" if given.shard > 1 else ""
    path = folder / f"{optimizer}-ranks{ranks}{sharded}-seed{seed}-steps{steps}.json"
    if not path.exists():
        command = [
            sys.executable, "-m", "commhub", "bench", "--no-report", "--json", str(path), "--nproc", str(ranks),
            "--repeats", "0", "--batch", str(WINDOWS // ranks), "--steps", str(steps), "--seed", str(seed),
            "--optimizer", optimizer, "--shard", str(given.shard), "--hooks", ",".join(chosen),
        ]  # fmt: skip
        subprocess.run(command, check=True)  # noqa: S603 - our own command
    return {run["hook"]: run for run in json.loads(path.read_text())["hooks"]}


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--shard", type=int, default=1, help="ranks in a group that the model is sharded over")
    parser.add_argument("--skip", default="", help="left out: hooks whose string holds one of these, by commas")
    parser.add_argument("--keep", type=Path, help="folder for the runs' figures")
    given = parser.parse_args()
    counts = [int(count) for count in given.ranks.split(",")]
    with tempfile.TemporaryDirectory() as passing:
        folder = given.keep or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        runs = {n: [bench(given, n, seed, folder) for seed in range(given.seeds)] for n in counts}
    titles = [f"{n} ranks: {what}" for n in counts for what in ("loss", "against allreduce", "bytes")]
    print("| hook | " + " | ".join(titles) + " |\n|---|" + "---|" * len(titles))
    for hook in runs[counts[0]][0]:
        cells = []
        for n in counts:
            losses = [run[hook]["validation_loss"] for run in runs[n]]
            changes = [
                100 * (run[hook]["validation_loss"] / run["allreduce"]["validation_loss"] - 1) for run in runs[n]
            ]
            bytes_sent = 1 / runs[n][0][hook]["compression"]
            spread = f"{statistics.mean(changes):+.2f} % ({min(changes):+.2f} to {max(changes):+.2f})"
            cells += [f"{statistics.mean(losses):.3f}", spread, f"{100 * bytes_sent:.1f} %"]
        print(f"| `{hook}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
