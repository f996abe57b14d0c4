"""What a rank runs: ``main.py FOLDER PHASE`` runs every scenario of a phase and leaves its result in a file."""

import datetime
import io
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)
LOG = io.StringIO()


class Rank:
    """This rank, and what it may use."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.rank = int(os.environ.get("RANK", "0"))

    def said(self):
        """What was logged since this was asked last."""
        text = LOG.getvalue()
        LOG.seek(0)
        LOG.truncate()
        return text


def fresh():
    """Forget the frameworks' singletons: the next accelerator is the first one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]:
        del os.environ[name]  # TrainingArguments leave it there
    torch.manual_seed(0)


def main():
    folder, phase = sys.argv[1:3]
    logging.getLogger("commhub").addHandler(logging.StreamHandler(LOG))
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    sys.modules["main"] = sys.modules["__main__"]
    import accelerate_runs
    import docs_runs
    import misuse_runs
    import scaler_runs
    import schedule_runs
    import transformers_runs

    me = Rank(folder)
    for module in (accelerate_runs, misuse_runs, scaler_runs, transformers_runs, schedule_runs, docs_runs):
        for scenario in getattr(module, phase, ()):
            fresh()
            me.said()
            try:
                value, error = scenario(me), None
            except Exception:
                value, error = None, traceback.format_exc()
            path = me.folder / f"{phase}-{scenario.__name__}-{me.rank}.pt"
            torch.save({"value": value, "error": error}, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
