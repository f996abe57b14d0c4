"""After the first step nothing of a bucket's size is allocated, nor of its codes' but for what a driver receives."""

import pytest
import torch
from commhub_quantize import QuantizePerChannel, QuantizePerTensor
from commhub_quantize._coding import Coding, coder
from torch.profiler import ProfilerActivity, profile

import commhub
from commhub.testing import Largest, Watched


@pytest.mark.parametrize("kind", [QuantizePerChannel, QuantizePerTensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bits": 4, "symmetric": False}, {"stochastic_rounding": True}])
def test_a_later_step_allocates_no_more_than_a_twentieth_of_the_bucket(kind, dtype, options, monkeypatch):
    """Uncompiled: what a compiled kernel allocates, a dispatch mode does not see."""
    monkeypatch.setenv("COMMHUB_COMPILE", "0")
    coder.cache_clear()
    gradients = [torch.ones(1300, 1300, dtype=dtype) for _ in range(6)] + [torch.ones(9, dtype=dtype)]
    result = commhub.simulate(Watched(kind(**options), Largest, since=1), [gradients] * 2, steps=3)
    assert 0 < result.hooks[0].seen.nbytes <= 0.05 * 4 * sum(g.numel() for g in gradients)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_kernel_allocates_no_more_than_a_twentieth_of_its_values(bits, monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    coder.cache_clear()
    coding, values = Coding(bits=bits, row=256), torch.randn(4096, 256)
    kernels, codes = coder(coding), torch.zeros(4096, coding.row_bytes, dtype=torch.int8)
    marks, inverses = torch.zeros(4096, 1), torch.zeros(4096, 1)
    kernels.warm(torch.float32, values.device, 0, keeping=True)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kernels.measure(values, marks, inverses)
        kernels.encode_keeping(values, marks, inverses, codes)
        kernels.decode(codes, marks, values)
        kernels.accumulate(codes, marks, values)
    coder.cache_clear()
    assert max(event.cpu_memory_usage for event in seen.events()) <= 0.05 * values.nbytes
