"""The promises about numbers on real ranks: two and four of them, one bucket and many."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks

ONE, MANY = 25, 0.004

RANKS = [(k, true_rank) for k in (1, 2, 3, 4) for true_rank in sorted({1, k})]


class Given(torch.nn.Module):
    """Has whatever gradients it is given: the loss is the sum of parameters times these."""

    def __init__(self, count=6, shape=(24, 32)):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.zeros(shape) for _ in range(count))
        self.biases = torch.nn.ParameterList(torch.zeros(5) for _ in range(count))

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


def build(cap, hook, **options):
    model = DistributedDataParallel(Given(), bucket_cap_mb=cap)
    return model, commhub.register(model, hook, **options)


def give(model, gradients):
    model.zero_grad()
    model(gradients).backward()
    return [p.grad for p in model.parameters()]


def drawn(rank, step, k=None):
    """Gradients of a rank in a step; the matrices of rank k where k is given."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    gradients = []
    for parameter in Given().parameters():
        if parameter.dim() == 2 and k is not None:
            rows, cols = parameter.shape
            left, right = torch.randn(rows, k, generator=generator), torch.randn(k, cols, generator=generator)
            gradients.append(left @ right)
        else:
            gradients.append(torch.randn(parameter.shape, generator=generator))
    return gradients


def limit_of_float32(matrix, start, true_rank):
    """The relative error to which P = M Q, rounded to float32, can know the columns of M: eps times P's condition.

    It is above 1e-4 only where a random start hardly sees one of M's directions; one matrix here has such a start.
    """
    singular = torch.linalg.svdvals(matrix.double() @ start.double())[:true_rank]
    return float(torch.finfo(torch.float32).eps * singular[0] / singular[-1])


def reproduce(cap):
    """Ranks differ by what cancels in the mean, whose matrices have rank k, and then a lower one."""
    p, rank = dist.get_world_size(), dist.get_rank()
    weight = rank - (p - 1) / 2  # sums to zero over the ranks
    for k, true_rank in RANKS:
        mean, noise = drawn(99, true_rank, true_rank), drawn(98, k)
        model, registration = build(cap, "powersgd", rank=k, start_step=0, min_compression_rate=0.5)
        starts = registration.state_dict()["shared"]
        given = [m + weight * n for m, n in zip(mean, noise, strict=True)]
        for (name, _), mine, wanted in zip(model.module.named_parameters(), give(model, given), mean, strict=True):
            bound = max(1e-4, limit_of_float32(wanted, starts[name]["q"], true_rank) if name in starts else 0.0)
            assert (mine - wanted).norm() <= bound * wanted.norm(), (name, bound)
        give(model, given)  # makes up for what the first step left unsent
        got = give(model, given)
        for mine, wanted in zip(got, mean, strict=True):
            assert (mine - wanted).norm() <= 1e-4 * wanted.norm()
        assert_equal_across_ranks(got)


@pytest.mark.parametrize(("nproc", "cap"), [(2, ONE), (2, MANY), (4, MANY)])
def test_a_mean_gradient_of_rank_at_most_k_is_reproduced_at_rank_k(ranks, nproc, cap):
    ranks(reproduce, nproc, cap)


def reproduce_at_once(cap):
    """The same means, to 1e-4 in the first step: the second iteration starts from where the first one led."""
    p, rank = dist.get_world_size(), dist.get_rank()
    weight = rank - (p - 1) / 2
    for k, true_rank in RANKS:
        mean, noise = drawn(99, true_rank, true_rank), drawn(98, k)
        options = {"rank": k, "start_step": 0, "min_compression_rate": 0.5, "num_power_iterations": 2}
        model, _ = build(cap, "powersgd", **options)
        got = give(model, [m + weight * n for m, n in zip(mean, noise, strict=True)])
        for mine, wanted in zip(got, mean, strict=True):
            assert (mine - wanted).norm() <= 1e-4 * wanted.norm()
        assert_equal_across_ranks(got)


@pytest.mark.parametrize(("nproc", "cap"), [(2, ONE), (2, MANY), (4, MANY)])
def test_with_two_iterations_it_is_reproduced_in_the_first_step(ranks, nproc, cap):
    ranks(reproduce_at_once, nproc, cap)
