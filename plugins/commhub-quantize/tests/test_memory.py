"""After the first step nothing of a bucket's size is allocated, nor of its codes' but for what a driver receives."""

import pytest
import torch
from commhub_quantize import QuantizePerChannel, QuantizePerTensor

import commhub
from commhub.testing import Largest, Watched


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("kind", [QuantizePerChannel, QuantizePerTensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bits": 4, "symmetric": False}, {"stochastic_rounding": True}])
def test_a_later_step_allocates_no_more_than_a_twentieth_of_the_bucket(kind, dtype, options):
    gradients = [torch.ones(1300, 1300, dtype=dtype) for _ in range(6)] + [torch.ones(9, dtype=dtype)]
    result = commhub.simulate(Watched(kind(**options), Largest, since=1), [gradients] * 2, steps=3)
    assert 0 < result.hooks[0].seen.nbytes <= 0.05 * 4 * sum(g.numel() for g in gradients)
