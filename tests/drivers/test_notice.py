"""A step that waits for long says whom it waits for, once, and where."""

import logging
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.drivers import _notice, _watch
from commhub.testing import assert_equal_across_ranks


def store():
    return dist.distributed_c10d._get_default_store()


class Lines(logging.Handler):
    """Collects what is logged, and lets a rank that is late come once all others have said so."""

    def __init__(self):
        super().__init__()
        self.lines, self.late = [], ""

    def emit(self, record):
        if "waits for" in record.getMessage():
            assert record.levelno == logging.WARNING
            self.lines.append(record.getMessage())
            if store().add(f"said {self.late}", 1) == dist.get_world_size() - 1:
                store().set(f"come {self.late}", "")


def train(model):
    model(torch.full((2, 4), 1.0 + dist.get_rank())).sum().backward()
    assert_equal_across_ranks([p.grad for p in model.parameters()])


def waits(late_steps, silent, steps=3):
    """Rank 1 begins the steps given only after all others have said that they wait for it."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    registration = commhub.register(model, "allreduce", timeout=60)
    lines = Lines()
    kept = _notice.SILENT, _watch._SELDOM
    _notice.SILENT, _watch._SELDOM = silent, 0.1
    logging.getLogger("commhub").addHandler(lines)
    try:
        for step in range(steps):
            lines.late = step
            if dist.get_rank() == 1 and step in late_steps:
                store().wait([f"come {step}"], timedelta(seconds=30))
            train(model)
    finally:
        _notice.SILENT, _watch._SELDOM = kept
        logging.getLogger("commhub").removeHandler(lines)
    registration.close()
    return lines.lines


@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_says_once_whom_it_waits_for(ranks, nproc, step):
    told = ranks(waits, nproc, [step], 0.2)
    assert told.pop(1) == []
    for lines, rank in zip(told, (0, 2), strict=False):
        (line,) = lines
        last = rf", and came last to AllReduce of commhub's own in step {step - 1}" if step else ""
        pattern = (
            rf"allreduce \(commhub-allreduce [\d.]+\), bucket 0, step {step}, rank {rank} waits for rank 1 of "
            rf"0..{nproc - 1} \(\d+\.\d s so far, until 60 s\); rank 1 asks for nothing at present{last}\."
        )
        assert re.fullmatch(pattern, line), line


def test_nobody_says_so_in_time(ranks):
    assert ranks(waits, 2, [], 10.0) == [[], []]
