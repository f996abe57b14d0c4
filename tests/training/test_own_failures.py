"""What fails on one rank outside of any exchange, as a gradient that cannot be read does, is told to all ranks."""

import time

import pytest
import torch
import torch.distributed as dist

import commhub
from commhub.testing import assert_equal_across_ranks


def raised(function):
    began = time.monotonic()
    with pytest.raises(commhub.HookError) as error:
        function()
    assert time.monotonic() - began < 8
    return str(error.value)


class TwoKinds(torch.nn.Module):
    """Its gradients lie in two buckets, and those of ``late`` in the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.late = torch.nn.Linear(4, 4, dtype=torch.float64)
        self.early = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.early(self.late(x.double()).float())


def train(module, registration):
    module.zero_grad()
    module(torch.full((2, 4), 1.0 + dist.get_rank())).sum().backward()
    registration.average()
    assert_equal_across_ranks([p.grad for p in module.parameters()])


def spoilt_gradient(wrong):
    module = TwoKinds()
    registration = commhub.manual(module, "powersgd_rank2", timeout=20)
    train(module, registration)
    module(torch.ones(2, 4)).sum().backward()
    if dist.get_rank() == wrong:
        module.late.weight.grad = module.late.weight.grad.to_sparse()
    told = raised(registration.average)
    registration.swap("allreduce")
    for _ in range(2):
        train(module, registration)
    registration.remove()
    return told


@pytest.mark.parametrize("nproc", [2, 3])
def test_a_gradient_that_cannot_be_read_on_one_rank_is_an_error_on_all(ranks, nproc):
    for rank, told in enumerate(ranks(spoilt_gradient, nproc, 1)):
        assert f"rank {rank}: " in told
        assert "the gradients cannot be averaged: RuntimeError: copy_() between dense and sparse" in told
        assert rank == 1 or "rank 1 failed: " in told


def spoilt_parameter(wrong):
    torch.manual_seed(dist.get_rank())
    module = torch.nn.Linear(4, 4)
    registration = commhub.manual(module, "periodic(period=1)", timeout=20)
    registration.average()
    kept = module.weight
    if dist.get_rank() == wrong:
        with torch.inference_mode():
            module.weight = torch.nn.Parameter(torch.ones(4, 4))
        told = raised(registration.average)
    else:
        registration.average()  # it is this rank's values that could not be written there
        told = raised(registration.average)
    module.weight = kept
    registration.swap("allreduce")
    assert_equal_across_ranks([p.data for p in module.parameters()])
    return told


@pytest.mark.parametrize("nproc", [2, 3])
def test_a_parameter_that_cannot_be_averaged_on_one_rank_is_an_error_on_all(ranks, nproc):
    for told in ranks(spoilt_parameter, nproc, 1):
        assert "the parameters cannot be averaged: RuntimeError: Inplace update to inference tensor" in told


def sparse():
    module = torch.nn.Linear(4, 4)
    registration = commhub.manual(module, "allreduce")
    module.weight = torch.nn.Parameter(torch.zeros(4, 4).to_sparse())
    told = []
    for call in (lambda: commhub.manual(module, "fp16"), lambda: registration.swap("fp16"), registration.average):
        with pytest.raises(commhub.CommhubError) as error:
            call()
        told.append(str(error.value))
    return told


def test_parameters_that_are_sparse_themselves_are_refused(ranks):
    (told,) = ranks(sparse, 1)
    assert all(
        "'weight' is a parameter of layout torch.sparse_coo; only dense ones are averaged" in one for one in told
    )


def grows():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LazyLinear(4))
    registration = commhub.manual(module, "allreduce")
    torch.manual_seed(0)
    for _ in range(2):
        train(module, registration)
    return [name for name, _ in registration._session.target.parameters]


def test_a_lazy_module_is_averaged_from_its_first_forward_on(ranks):
    assert ranks(grows, 2) == [["0.weight", "0.bias"]] * 2
