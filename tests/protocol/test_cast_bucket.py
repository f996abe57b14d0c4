"""A bucket in another dtype, for hooks that have an inner hook work in it."""

import pytest
import torch

import commhub
from commhub import AllReduce
from commhub.testing import bitwise_equal


class Wide:
    """Averages in another dtype with an inner hook, and remembers nothing where a value is not finite."""

    def __init__(self, dtype=torch.float32):
        self.dtype, self.inner = dtype, commhub.create("allreduce")
        self.finite = None

    def prepare(self, setup):
        setup.state.local("0")["kept"] = torch.zeros(1)  # whoever remembers is told of what is not finite

    def reduce(self, bucket):
        cast = bucket.to(self.dtype)
        assert cast.flat.dtype == self.dtype
        assert cast.flat.data_ptr() != bucket.flat.data_ptr()
        assert (cast.names, cast.index, cast.step, cast.used) == (bucket.names, bucket.index, bucket.step, bucket.used)
        for mine, theirs in zip(cast.gradients, bucket.gradients, strict=True):
            assert (mine.shape, mine.stride()) == (theirs.shape, theirs.stride())
            assert bitwise_equal(mine.to(theirs.dtype), theirs)
        yield from self.inner.reduce(cast)
        bucket.flat.copy_(cast.flat)
        self.finite = bool(bucket.finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_bucket_has_the_layout_of_the_other_and_memory_of_its_own(dtype):
    gradients = [
        [torch.full((3, 2), r + 1.0, dtype=torch.bfloat16).t(), torch.ones((), dtype=torch.bfloat16)] for r in (0, 1)
    ]
    result = commhub.simulate(Wide(dtype), gradients)
    expected = [torch.full((2, 3), 1.5, dtype=torch.bfloat16), torch.ones((), dtype=torch.bfloat16)]
    assert all(map(bitwise_equal, result.gradients[0], expected))
    assert result.hooks[0].finite


def test_what_is_not_finite_in_a_cast_bucket_is_known_in_the_other():
    result = commhub.simulate(Wide(), [[torch.tensor([float("nan")])], [torch.tensor([1.0])]])
    assert [hook.finite for hook in result.hooks] == [False, False]


def test_an_all_reduce_of_the_same_dtype_still_has_its_own_memory():
    class Same:
        def reduce(self, bucket):
            cast = bucket.to(bucket.flat.dtype)
            cast.flat.fill_(7)
            bucket.flat.copy_((yield AllReduce(bucket.flat)))

    assert commhub.simulate(Same(), [[torch.ones(2)]] * 2).gradients[0][0].tolist() == [1, 1]
