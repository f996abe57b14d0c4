"""allreduce: every rank's share of the mean, summed in rank order, in the gradients' own dtype."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import EveryKind, assert_equal_across_ranks, bitwise_equal, mlp, train


def reference(gradients):
    """The algorithm in plain torch."""
    shares = [g * (1 / len(gradients)) for g in gradients]
    total = shares[0].clone()
    for share in shares[1:]:
        total = total + share
    return total


def normal(rank, dtype=torch.float32):
    return torch.randn(1000, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_it_is_the_reference_bit_by_bit(p, dtype):
    gradients = [normal(rank, dtype) for rank in range(p)]
    result = commhub.simulate("allreduce", [[g] for g in gradients])
    assert all(bitwise_equal(mine[0], reference(gradients)) for mine in result.gradients)


@pytest.mark.parametrize("p", [1, 2, 4, 64])
def test_each_rank_sends_what_a_ring_sends(p):
    result = commhub.simulate("allreduce", [[normal(rank)] for rank in range(p)])
    assert result.sent_bytes == pytest.approx([2 * (p - 1) / p * 4000] * p)
    assert result.compression == 1


def test_wire_halves_the_bytes_of_the_plain_average_too():
    result = commhub.simulate("allreduce", [[normal(rank)] for rank in range(2)], wire="bf16")
    assert result.compression == 2


def every_mode(make, batch, cap):
    """Train with and without the hook; gradients and parameters."""
    runs = []
    for hook in (None, "allreduce"):
        model = DistributedDataParallel(make(), bucket_cap_mb=cap)
        if hook is not None:
            commhub.register(model, hook)
        run = train(model, 3, batch=batch)
        runs.append([*run.gradients, run.parameters])
    assert_equal_across_ranks(runs[1][-1])
    return runs


def deep():
    return mlp([16] * 5)


MODELS = pytest.mark.parametrize(
    ("make", "batch"), [(deep, None), (EveryKind, EveryKind.batch)], ids=["layers", "every kind of parameter"]
)


@MODELS
@pytest.mark.parametrize("cap", [25, 1 / 1024], ids=["one bucket", "many buckets"])
def test_two_real_ranks_train_bit_for_bit_as_without_a_hook(ranks, make, batch, cap):
    for bare, hooked in ranks(every_mode, 2, make, batch, cap):
        for expected, found in zip(bare, hooked, strict=True):
            assert expected.keys() == found.keys()
            assert all(bitwise_equal(_dense(expected[name]), _dense(found[name])) for name in expected)


def _dense(tensor):
    return tensor.to_dense() if tensor.is_sparse else tensor


def test_it_takes_no_options():
    with pytest.raises(commhub.HookOptionError, match="allreduce"):
        commhub.create("allreduce", rank=2)
