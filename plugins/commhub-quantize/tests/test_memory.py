"""After the first step nothing of a bucket's size is allocated, nor of its codes' but for what a driver receives."""

import pytest
import torch
from commhub_quantize import QuantizePerChannel, QuantizePerTensor
from commhub_quantize._coding import Coding, coder
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import commhub


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that an operation made and that shares no memory with what it was given."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and id_of(one) not in given:
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return out


def id_of(tensor):
    return tensor.untyped_storage().data_ptr()


class Watched:
    """Looks at every operation of a step but the first, whose memory is kept."""

    def __init__(self, hook):
        self.hook, self.largest = hook, 0

    def prepare(self, setup):
        self.hook.prepare(setup)

    def reduce(self, bucket):
        exchange, value = self.hook.reduce(bucket), None
        while True:
            with Largest() as seen:
                try:
                    request = exchange.send(value)
                except StopIteration:
                    return
                finally:
                    if bucket.step:
                        self.largest = max(self.largest, seen.nbytes)
            value = yield request


@pytest.mark.parametrize("kind", [QuantizePerChannel, QuantizePerTensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "symmetric": False}, {"stochastic_rounding": True}])
def test_a_later_step_allocates_no_more_than_a_twentieth_of_the_bucket(kind, dtype, options, monkeypatch):
    """Uncompiled: what a compiled kernel allocates, a dispatch mode does not see."""
    monkeypatch.setenv("COMMHUB_COMPILE", "0")
    coder.cache_clear()
    gradients = [torch.ones(1300, 1300, dtype=dtype) for _ in range(6)] + [torch.ones(9, dtype=dtype)]
    result = commhub.simulate(Watched(kind(**options)), [gradients] * 2, steps=3)
    assert 0 < result.hooks[0].largest <= 0.05 * 4 * sum(g.numel() for g in gradients)


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
