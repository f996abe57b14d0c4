"""After the first step nothing of a bucket's size is allocated, nor of its codes' but for what a driver receives."""

import os
from itertools import product

import pytest
import torch
from commhub_quantize import QuantizePerChannel, QuantizePerTensor

import commhub
from commhub.testing import Largest, Watched

KINDS, DTYPES = (QuantizePerChannel, QuantizePerTensor), (torch.float32, torch.bfloat16)
OPTIONS = ({}, {"bits": 4, "symmetric": False}, {"stochastic_rounding": True})
CASES = [(KINDS[0], DTYPES[0], OPTIONS[1]), (KINDS[1], DTYPES[1], OPTIONS[2])]
if os.environ.get("COMMHUB_EVERY_CHECK"):
    CASES = list(product(KINDS, DTYPES, OPTIONS))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_a_later_step_allocates_no_more_than_a_twentieth_of_the_bucket(kind, dtype, options):
    gradients = [torch.ones(1300, 1300, dtype=dtype) for _ in range(6)] + [torch.ones(9, dtype=dtype)]
    result = commhub.simulate(Watched(kind(**options), Largest, since=1), [gradients] * 2, steps=3)
    assert 0 < result.hooks[0].seen.nbytes <= 0.05 * 4 * sum(g.numel() for g in gradients)
