"""How far a hook between replicas is from the float64 mean of all ranks, and how far it may be.

What float32 costs is measured, on DDP over all ranks; what a hook costs beyond that is what its spec states, or what
the paper's algorithm does in float64.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhub.testing.conformance._material import ROUNDING, assert_mean, promised_error
from commhub.testing.conformance._subject import Subject

from .sharding import EVERY, Transformer, gradients, loss_of, mesh, sharded

STEPS = 4
COSTS = 4
"""How many times what float32 costs elsewhere it may cost here: sums are made in another order."""
POWERSGD = "powersgd(rank=2, start_step=0, min_compression_rate=1)"
MESHES = [(4, 2), (2, 1), (4, 1), (6, 3)]
"""Ranks, and shards of a replica."""


class Wide(Transformer):
    """Every matrix is large enough for every hook; some have an odd number of rows, and one has a single one."""

    def __init__(self):
        super().__init__(width=64, inner=65)
        self.gain = nn.Parameter(torch.ones(1, 64))

    def forward(self, numbers):
        x = self.embedding(numbers)
        for block in self.blocks:
            x = block(x)
        return self.head(self.gain * x)


def make(dtype=torch.float32):
    return Wide().to(dtype)


def gradients_of(model, step, rank):
    """Of this rank's shards that have elements."""
    model.zero_grad()
    loss_of(model, step, rank).backward()
    return {name: g for name, g in gradients(model).items() if g.numel()}


def between_replicas(hook, shards):
    """By step, this rank's shards of what the hook leaves, and this rank's own gradients without any exchange."""
    model, registration = sharded(mesh(shards), hook, make=make)
    alone, before = make(), registration.state_dict()
    found = [gradients_of(model, step, None) for step in range(STEPS)]
    own = [gradients_of(alone, step, None) for step in range(STEPS)]
    return found, own, copy.deepcopy(before), registration.state_dict(), registration.stats.last.sent_bytes


def on_all_ranks():
    """By step, the gradients of plain DDP."""
    model = DistributedDataParallel(make())
    found = [gradients_of(model, step, None) for step in range(STEPS)]
    return [{name.removeprefix("module."): g for name, g in step.items()} for step in found]


@functools.lru_cache(4)
def every_rank(world, dtype=torch.float64):
    """By step, the gradients of every rank, each computed alone."""
    model = make(dtype)
    return [[gradients_of(model, step, rank) for rank in range(world)] for step in range(STEPS)]


def mean_of(several):
    return {name: sum(one[name] for one in several) / len(several) for name in several[0]}


def of_replicas(every, shards):
    """What each replica brings: the mean of its own ranks."""
    return [mean_of(every[first : first + shards]) for first in range(0, len(every), shards)]


def part(whole, shards, rank):
    """The shards with elements that a rank keeps."""
    chunks = {name: tensor.chunk(shards) for name, tensor in whole.items()}
    return {name: own[rank % shards] for name, own in chunks.items() if rank % shards < len(own)}


def furthest(runs):
    """By name, how far the element is off that is furthest off, in several steps' gradients and exact ones."""
    far = {}
    for found, exact in runs:
        assert found.keys() == exact.keys()
        for name in exact:
            far[name] = max(far.get(name, 0.0), float((found[name].double() - exact[name]).abs().max()))
    return far


@pytest.mark.parametrize(("world", "shards"), MESHES if EVERY else MESHES[:1])
def test_allreduce_is_as_near_to_the_float64_mean_of_all_ranks_as_ddp(ranks, world, shards):
    exact = [mean_of(every) for every in every_rank(world)]
    costs = furthest(zip(ranks(on_all_ranks, world)[0], exact, strict=True))
    assert len(costs) == 27
    for rank, (found, *_) in enumerate(ranks(between_replicas, world, "allreduce", shards)):
        far = furthest((mine, part(one, shards, rank)) for mine, one in zip(found, exact, strict=True))
        assert {name: far[name] / costs[name] for name in far if far[name] > COSTS * costs[name]} == {}


@pytest.mark.parametrize(("world", "shards"), MESHES if EVERY else MESHES[1:2])
def test_allreduce_rounds_each_element_no_more_than_a_sum_in_float32_must(ranks, world, shards):
    """Of p numbers that is (p - 1) u of the sum of their sizes, u = 2^-24, in whatever order.

    Division rounds once more, unless it is by a power of two.
    """
    done = ranks(between_replicas, world, "allreduce", shards)
    rounded = (world - 1 + (world not in (2, 4))) * 2**-24
    allowed = rounded / (1 - rounded)
    for step in range(STEPS):
        own = [{name: g.double() for name, g in one[1][step].items()} for one in done]
        mean, size = mean_of(own), mean_of([{name: g.abs() for name, g in one.items()} for one in own])
        for rank, (found, *_) in enumerate(done):
            for name, wanted in part(mean, shards, rank).items():
                beyond = (found[step][name].double() - wanted).abs() - allowed * part(size, shards, rank)[name]
                assert beyond.max() <= 0, (step, rank, name)


PROMISING = [("quantize_per_channel", 0.4), ("fp16", 0.5), ("quantize_per_tensor", 0.4), ("bf16", 0.5)]
"""Hooks whose specs state a tolerance, and which part of ``allreduce``'s bytes they send at most."""


@pytest.mark.parametrize(("hook", "share"), PROMISING if EVERY else PROMISING[:1])
@pytest.mark.parametrize(("world", "shards"), MESHES if EVERY else MESHES[:1])
def test_a_hook_is_as_near_to_the_float64_mean_of_all_ranks_as_its_spec_states(ranks, hook, share, world, shards):
    promised, plain = promised_error(Subject(hook), torch.float32), ranks(on_all_ranks, world)[0]
    assert promised > ROUNDING[torch.float32]
    replicas = world // shards
    for rank, (found, own, *_, sent) in enumerate(ranks(between_replicas, world, hook, shards)):
        every = sum(g.numel() for g in part(own[0], shards, rank).values())
        assert 0 < sent <= share * 2 * (replicas - 1) / replicas * 4 * every
        for step, mine in enumerate(found):
            brought = [part(one, shards, rank) for one in of_replicas(every_rank(world)[step], shards)]
            for name, wanted in mean_of(brought).items():
                size = float(sum(one[name].abs() for one in brought).norm()) / replicas
                costs = float((part(plain[step], shards, rank)[name].double() - wanted).norm()) / size
                where = f"step {step}, rank {rank}: {name}"
                assert_mean(mine[name], [one[name] for one in brought], promised + COSTS * costs, where)


class Paper:
    """Algorithms 1 and 2 of the PowerSGD paper for one parameter, as they stand, in the dtype of what it is given.

    Args:
        q: the factor to start with, (columns, rank); ``None`` for what is averaged plainly.
    """

    def __init__(self, q):
        self.q, self.residuals = q, None

    def average(self, tensors):
        """The mean of the tensors' approximations; what each left unsent goes with the next."""
        if self.q is None:
            return sum(tensors) / len(tensors)
        waiting = self.residuals or [torch.zeros_like(tensor) for tensor in tensors]
        matrices = [tensor + residual for tensor, residual in zip(tensors, waiting, strict=True)]
        left = torch.linalg.qr(sum(m @ self.q.to(m.dtype) for m in matrices) / len(matrices)).Q
        own = [m.T @ left for m in matrices]
        self.q = sum(own) / len(own)
        self.residuals = [m - left @ q.T for m, q in zip(matrices, own, strict=True)]
        return left @ self.q.T


def papers(before, whole, shards, rank):
    """One for each parameter's shard on a rank, from the factors that the hook has drawn to start with."""
    starts = {name: entries["q"] for name, entries in before["shared"].items()}
    local = part(whole, shards, rank)
    matrices = {name: shard.shape for name, shard in local.items() if shard.dim() > 1}
    assert starts.keys() == {name for name, (n, m) in matrices.items() if (n + m) * min(n, m, 2) < n * m}
    assert all(q.shape == (matrices[name][1], 2) for name, q in starts.items())
    return {name: Paper(starts.get(name)) for name in local}


def by_the_paper(every, before, shards, rank):
    """By step, what PowerSGD leaves of the gradients of all ranks in one rank's shards."""
    own, steps = papers(before, every[0][0], shards, rank), []
    for step in every:
        brought = [part(one, shards, rank) for one in of_replicas(step, shards)]
        steps.append({name: own[name].average([one[name] for one in brought]) for name in own})
    return steps


@pytest.mark.parametrize(("world", "shards"), MESHES if EVERY else MESHES[:1])
def test_powersgd_is_the_papers_on_each_shard(ranks, world, shards):
    """Element by element in each of several steps: as near to float64 as the same algorithm in float32 is."""
    for rank, (found, _, before, *_) in enumerate(ranks(between_replicas, world, POWERSGD, shards)):
        exact, single = (
            by_the_paper(every_rank(world, dtype), before, shards, rank) for dtype in (torch.float64, torch.float32)
        )
        costs, far = furthest(zip(single, exact, strict=True)), furthest(zip(found, exact, strict=True))
        size = max(float(tensor.abs().max()) for tensor in exact[0].values())
        assert max(costs.values()) < 1e-5 * size  # of an algorithm that rounding upsets more, nothing could be told
        assert {name: far[name] / costs[name] for name in far if far[name] > COSTS * costs[name]} == {}


@pytest.mark.parametrize(("world", "shards"), MESHES if EVERY else MESHES[1:2])
def test_all_that_powersgd_has_sent_and_all_that_waits_is_the_float64_mean_of_all_ranks(ranks, world, shards):
    """Summed over steps and replicas: so the bias of one step is made good in the next ones."""
    done = ranks(between_replicas, world, POWERSGD, shards)
    plain, exact = ranks(on_all_ranks, world)[0], [mean_of(every) for every in every_rank(world)]
    for rank, (found, *_) in enumerate(done[:shards]):
        for name in found[0]:
            given = sum(part(one, shards, rank)[name] for one in exact)
            costs = sum(float((a[name].double() - b[name]).abs().max()) for a, b in zip(plain, exact, strict=True))
            states = [done[one][3]["local"] for one in range(rank, world, shards)]
            residuals = [state[f"rank{one}"].get(name, {}).get("residual") for one, state in enumerate(states)]
            waiting = 0 if residuals[0] is None else sum(r.double() for r in residuals) / len(residuals)
            off = float((sum(one[name].double() for one in found) + waiting - given).abs().max())
            assert (residuals[0] is None) == (given.dim() < 2 or given.shape[0] == 1)
            assert off <= COSTS * costs, (rank, name)


LONG, BATCHES, SEEDS = 20, 2, 4


def optimizer_for(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trained(hook, shards):
    """This rank's loss in each step of a run between replicas, or of plain DDP; the hook's state at the beginning."""
    model, registration = DistributedDataParallel(make()), None
    if hook is not None:
        model, registration = sharded(mesh(shards), hook, make=make)
    before = {"shared": {}} if registration is None else copy.deepcopy(registration.state_dict())
    optimizer, losses = optimizer_for(model), []
    for step in range(LONG):
        optimizer.zero_grad()
        loss = loss_of(model, step % BATCHES)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, before


def in_float64(world, shards, starts, error, seed=0):
    """The mean loss of all ranks in each step of a run in one process, in float64.

    Each replica's part of each gradient is off by ``error`` of its size, in a direction drawn from ``seed``. With
    ``starts``, by rank of a replica, PowerSGD of the paper is between them, else the mean.
    """
    model, generator, losses = make(torch.float64), torch.Generator().manual_seed(seed), []
    optimizer, parameters, own = optimizer_for(model), dict(model.named_parameters()), []
    for step in range(LONG):
        every = [gradients_of(model, step % BATCHES, rank) for rank in range(world)]
        with torch.no_grad():
            losses.append(sum(float(loss_of(model, step % BATCHES, rank)) for rank in range(world)) / world)
        own = own or [papers(start, every[0], shards, rank) for rank, start in enumerate(starts)]
        brought = of_replicas(every, shards)
        size = {name: sum(one[name].abs() for one in brought) / len(brought) for name in parameters}
        for one in brought:
            for name, tensor in one.items():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor += error * size[name].norm() / noise.norm() * noise
        for name, parameter in parameters.items():
            pieces = zip(*(one[name].chunk(shards) for one in brought), strict=True)
            means = [own[r][name].average(mine) if own else sum(mine) / len(mine) for r, mine in enumerate(pieces)]
            parameter.grad = torch.cat(means)
        optimizer.step()
    return losses


CASES = [POWERSGD, "quantize_per_channel", None, "allreduce", "fp16", "quantize_per_tensor", "bf16"]


@pytest.mark.parametrize("hook", CASES if EVERY else CASES[:1])
@pytest.mark.parametrize(("world", "shards"), MESHES if EVERY else MESHES[1:2])
def test_losses_are_those_of_float64_as_near_as_errors_of_the_promised_size_leave_them(ranks, hook, world, shards):
    """What such errors have done to a loss by any step is measured, in runs of several seeds; twice that may be."""
    done = ranks(trained, world, hook, shards)
    found = [sum(losses) / world for losses in zip(*(losses for losses, _ in done), strict=True)]
    starts = [before for _, before in done[:shards]] if hook == POWERSGD else []
    promised = ROUNDING[torch.float32] if hook in (None, POWERSGD) else promised_error(Subject(hook), torch.float32)
    exact = in_float64(world, shards, starts, error=0.0)
    off = [in_float64(world, shards, starts, promised, seed) for seed in range(SEEDS)]
    single = torch.finfo(torch.float32).eps * exact[0]  # what a loss in float32 is rounded to
    for step, loss in enumerate(found):
        allowed = 2 * max(abs(one[at] - exact[at]) for one in off for at in range(step + 1)) + single
        assert abs(loss - exact[step]) <= allowed, (step, loss, exact[step], allowed)
    assert exact[-1] < 0.8 * exact[0]
