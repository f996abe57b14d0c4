"""The simulator gives results in memory of their own, and spoils what was yielded."""

import itertools

import pytest
import torch

import commhub
from commhub import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
WHOLE = (torch.int32, torch.int64, torch.int8, torch.uint8)


class Yields:
    """Sends two payloads of ones, side by side, and looks at them afterwards."""

    def __init__(self, kind, dtype, wire=None):
        self.kind, self.dtype, self.wire = kind, dtype, wire

    def reduce(self, bucket):
        shape = (2, 3) if self.kind in (AllReduce, Broadcast) else (2 * bucket.world_size,)
        payloads = [torch.ones(shape, dtype=self.dtype), torch.ones((2, *shape), dtype=self.dtype)[1]]
        more = {"op": "sum"} if self.kind in (AllReduce, ReduceScatter) else {}
        results = yield tuple(self.kind(payload, wire=self.wire, **more) for payload in payloads)
        for payload, result in zip(payloads, results, strict=True):
            assert payload.untyped_storage().data_ptr() != result.untyped_storage().data_ptr()
            self.check(payload, result, bucket.world_size)
        assert not torch.equal(*(result.fill_(value) for value, result in enumerate(results)))
        bucket.flat.zero_()

    def check(self, payload, result, p):
        assert (result.dtype, payload.dtype) == (self.dtype, self.dtype)
        if self.kind in (AllReduce, Broadcast):
            assert result.shape == payload.shape
        assert result.eq(p if self.kind in (AllReduce, ReduceScatter) else 1).all()
        assert payload.isnan().all() if self.dtype in DTYPES else payload.abs().ge(100).all()


@pytest.mark.parametrize("kind", [AllReduce, ReduceScatter, AllGather, AllToAll, Broadcast])
def test_what_was_yielded_is_spoiled_and_the_result_lies_elsewhere(kind):
    for dtype, p in itertools.product((*DTYPES, *WHOLE), (1, 2, 3)):
        commhub.simulate(Yields(kind, dtype), [[torch.ones(1)]] * p)
    commhub.simulate(Yields(kind, torch.float32, torch.float16), [[torch.ones(1)]] * 2)


class InPlace:
    def reduce(self, bucket):
        yield AllReduce(bucket.flat)


def test_a_hook_that_leaves_the_result_unused_is_found_out():
    assert commhub.simulate(InPlace(), [[torch.ones(3)]] * 2).gradients[0][0].isnan().all()
