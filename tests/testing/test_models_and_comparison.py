"""The models are the same everywhere, and bit comparison finds what `==` does not."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from commhub.testing import (
    Branches,
    EveryKind,
    RankError,
    assert_equal_across_ranks,
    bitwise_equal,
    mlp,
    train,
)


def test_models_depend_on_their_seed_only():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for make in (mlp, Branches, EveryKind):
        first, second = make(seed=3).state_dict(), make(seed=3).state_dict()
        assert all(bitwise_equal(first[name], second[name]) for name in first)
    assert bitwise_equal(state, torch.get_rng_state())
    assert not bitwise_equal(mlp(seed=0)[0].weight, mlp(seed=1)[0].weight)


def twelve_buckets():
    model = DistributedDataParallel(mlp([16] * 13), bucket_cap_mb=1 / 1024)
    run = train(model, 3)
    assert_equal_across_ranks(run.gradients[-1])
    assert_equal_across_ranks(run.parameters)
    return len(model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))


def test_a_small_mlp_makes_twelve_buckets(ranks):
    assert ranks(twelve_buckets, 2) == [12, 12]


def every_kind():
    run = train(DistributedDataParallel(EveryKind()), 3, batch=EveryKind.batch)
    for gradients in run.gradients:
        assert_equal_across_ranks(gradients)
    return run.gradients[0]


def test_every_kind_of_parameter_trains_under_ddp(ranks):
    gradients = ranks(every_kind, 2)[0]
    parameters = dict(EveryKind().named_parameters())
    assert gradients.keys() == parameters.keys()
    assert gradients["embedding.weight"].is_sparse
    for name in ("channels_last", "transposed"):
        assert gradients[name].stride() == parameters[name].stride() != gradients[name].contiguous().stride()
    # Scales are 1 and 2, so the mean of 2 * scale * parameter is 3 * parameter.
    assert torch.allclose(gradients["matrix"], 3 * parameters["matrix"])


def test_an_unused_branch_gets_no_gradient():
    assert set(train(Branches(), 1).gradients[0]) == {"used.weight", "used.bias"}


def test_bit_equality_tells_zeros_apart_and_accepts_nan():
    nan = torch.tensor([float("nan")])
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(torch.tensor(0.0), torch.tensor(-0.0))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(1, 2))
    assert bitwise_equal(torch.zeros(0, 3), torch.zeros(0, 3))
    assert bitwise_equal(torch.arange(6).view(2, 3).t(), torch.arange(6).view(2, 3).t().contiguous())


def different():
    tensor = torch.arange(6.0).view(2, 3)
    tensor[1, 0] += 0.5 * (dist.get_rank() == 2)
    assert_equal_across_ranks({"same": torch.ones(2), "layer.weight": tensor})


def test_tensors_that_differ_are_named_with_ranks_and_values(ranks):
    with pytest.raises(RankError) as caught:
        ranks(different, 3)
    assert len({e.message for e in caught.value.errors.values()}) == 1
    assert caught.value.errors[0].message == (
        "layer.weight on rank 2 differs from rank 0 in 1 of 6 elements, first at [1, 0]\n"
        "rank 0: 3.0\nrank 1: 3.0\nrank 2: 3.5"
    )


def different_kinds(what):
    odd = dist.get_rank() == 1
    if what == "names":
        assert_equal_across_ranks({"b" if odd else "a": torch.ones(1)})
    assert_equal_across_ranks(torch.ones(1, dtype=torch.float64 if odd else torch.float32))


@pytest.mark.parametrize(("what", "text"), [("names", "compare different tensors"), ("dtype", r"torch.float64 \[1\]")])
def test_different_names_or_dtypes_are_told(ranks, what, text):
    with pytest.raises(RankError, match="failed on 2 of 2") as caught:
        ranks(different_kinds, 2, what)
    caught.match(text)
