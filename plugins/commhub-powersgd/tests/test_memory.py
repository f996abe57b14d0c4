"""Nothing near the size of a bucket is allocated in a step."""

import os
from itertools import cycle, product

import pytest
import torch
from commhub_powersgd import PowerSGD

import commhub
from commhub.testing import Largest, Living, Watched

pytestmark = pytest.mark.usefixtures("passes")

POWER, RANKS, FIRST = (1, 2, 4), (1, 2), (1, 16)
OPTIONS = ({}, {"alternating": True}, {"num_power_iterations": 2})
CASES = list(zip(POWER, cycle(RANKS), OPTIONS, cycle(FIRST), strict=False))  # each value of each
if os.environ.get("COMMHUB_EVERY_CHECK"):
    CASES = list(product(POWER, RANKS, OPTIONS, FIRST))


@pytest.mark.parametrize("rank", [1, 2, 12])
@pytest.mark.parametrize("first", [1, 16], ids=["misaligned", "aligned"])
def test_a_step_allocates_at_most_a_tenth_of_the_bucket(rank, first):
    """Here 26 MiB; also where no matrix lies at an aligned address."""
    gradients = [torch.ones(1300, 1300) for _ in range(4)] + [torch.ones(first)]
    result = commhub.simulate(Watched(PowerSGD(rank=rank, start_step=0), Largest), [gradients], steps=2)
    assert 0 < result.hooks[0].seen.nbytes <= 0.1 * sum(g.nbytes for g in gradients)


@pytest.mark.parametrize(("rank", "ranks", "options", "first"), CASES)
def test_beyond_residuals_and_factors_at_most_a_tenth_of_the_bucket_is_alive_at_once(rank, ranks, options, first):
    """All that is made from registration on, gradients and the simulator's own copies apart."""
    gradients = [torch.ones(1300, 1300) for _ in range(4)] + [torch.ones(first)]
    bucket = sum(g.nbytes for g in gradients)
    factors = 4 * 4 * 2 * 1300 * rank
    hook = Watched(PowerSGD(rank=rank, start_step=0, **options), Living, since=-1)
    for watched in commhub.simulate(hook, [gradients] * ranks, steps=3).hooks:
        assert bucket - 64 <= watched.seen.peak - factors <= 1.1 * bucket  # the residual is as large as the bucket


def test_the_messages_are_kept_between_steps():
    gradients = [torch.ones(40, 30), torch.ones(5), torch.ones(30, 40)]
    hook = commhub.simulate(PowerSGD(start_step=0), [gradients], steps=3, buckets=3).hooks[0]
    elements = {names: plan.first.numel() for names, plan in hook._plans.made.items()}
    assert elements == {("2",): 30, ("1",): 0, ("0",): 40}
