"""noop: every rank keeps its own gradient, nothing is sent, and rank 0 says what that means."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches, bitwise_equal, mlp, train


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_every_rank_keeps_its_own_gradient_undivided(dtype):
    gradients = [torch.full((3,), float(rank + 1), dtype=dtype) for rank in range(3)]
    result = commhub.simulate("noop", [[g] for g in gradients])
    assert all(bitwise_equal(mine[0], g) for mine, g in zip(result.gradients, gradients, strict=True))


def test_nothing_is_sent():
    result = commhub.simulate("noop", [[torch.ones(5)]] * 4, steps=3)
    assert (result.sent_bytes, result.compression) == ((0.0,) * 4, float("inf"))


def test_its_spec_admits_that_ranks_differ():
    spec = commhub.info("noop").spec
    assert (spec.exact, spec.agrees) == (False, False)


def test_rank_0_alone_warns_that_ranks_drift_apart(caplog):
    with caplog.at_level(logging.WARNING, logger="commhub"):
        commhub.simulate("noop", [[torch.ones(1)]] * 3)
    assert ["drift apart" in record.getMessage() for record in caplog.records] == [True]


def drift():
    """Whether the hooked gradients are this rank's own, bit by bit, and the parameters after three steps."""
    bare, model = mlp([16] * 4), DistributedDataParallel(mlp([16] * 4), bucket_cap_mb=1 / 1024)
    registration = commhub.register(model, "noop")
    bare(*batches(16)(dist.get_rank(), 0)).square().mean().backward()
    run = train(model, 3)
    own = {name: p.grad for name, p in bare.named_parameters()}
    assert all(bitwise_equal(run.gradients[0][name], own[name]) for name in own)
    assert registration.stats.sent_bytes == 0
    return run.parameters


def test_two_real_ranks_train_apart(ranks):
    mine, other = ranks(drift, 2)
    assert not any(torch.equal(mine[name], other[name]) for name in mine)
