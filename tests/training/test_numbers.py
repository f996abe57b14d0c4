"""The numbers: equal on all ranks to the last bit, right for every kind of parameter, clean after an Inf."""

import os
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce
from commhub.testing import EveryKind, assert_equal_across_ranks, batches, bitwise_equal, mlp, train

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
MANY = 1e-6  # a bucket for each parameter, from the second step on
HOOKS = ["allreduce", "fp16", "bf16"]
TOLERANCE = {
    "allreduce": {},
    "fp16": {torch.float32: 2e-3, torch.float64: 2e-3, torch.complex64: 2e-3},
    "bf16": {torch.float32: 2e-2, torch.float64: 2e-2, torch.complex64: 2e-2},
}
OWN = {torch.float32: 1e-6, torch.float64: 1e-14, torch.complex64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def every_kind(hook, cap, ddp):
    """Gradients of three steps against the mean of the ranks' own gradients in float64."""
    model = DistributedDataParallel(EveryKind(), bucket_cap_mb=cap, **ddp)
    commhub.register(model, hook)
    rank, p, alone = dist.get_rank(), dist.get_world_size(), EveryKind()
    for step in range(3):
        for module in (alone, model):
            module.zero_grad()
            module(*EveryKind.batch(rank, step)).backward()
        found = {name: q.grad for name, q in model.module.named_parameters()}
        assert_equal_across_ranks(found)
        for name, q in alone.named_parameters():
            own = q.grad.to_dense() if q.grad.is_sparse else q.grad
            exact = own.to(torch.complex128 if own.is_complex() else torch.float64).contiguous()
            dist.all_reduce(torch.view_as_real(exact) if own.is_complex() else exact)
            got = found[name]
            assert (got.dtype, got.shape, got.is_sparse) == (q.grad.dtype, q.shape, q.grad.is_sparse), name
            if not got.is_sparse:
                assert got.stride() == q.stride(), name
            # What is sparse is averaged exactly, whatever the hook.
            rtol = max(OWN[q.dtype], 0.0 if got.is_sparse else TOLERANCE[hook].get(q.dtype, 0.0))
            got = got.to_dense() if got.is_sparse else got
            torch.testing.assert_close(got.to(exact.dtype), exact / p, rtol=rtol, atol=rtol * 1e-2, msg=name)


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("nproc", [1, 2, 4] if EVERYTHING else [1, 2])
def test_every_kind_of_parameter_averages_right_and_equal_on_all_ranks(ranks, hook, nproc, cap):
    ranks(every_kind, nproc, hook, cap, {})


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("mode", ["static_graph", "find_unused_parameters"])
def test_every_kind_of_parameter_averages_right_in_mode(ranks, hook, mode):
    ranks(every_kind, 2, hook, MANY, {mode: True})


def trained(hook):
    model = DistributedDataParallel(mlp([16] * 7), bucket_cap_mb=1 / 1024)
    commhub.register(model, hook)
    run = train(model, 10)
    for gradients in run.gradients:
        assert_equal_across_ranks(gradients)
    assert_equal_across_ranks(run.parameters)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("nproc", [3, 4] if EVERYTHING else [3])
def test_gradients_and_parameters_stay_equal_on_all_ranks(ranks, hook, nproc):
    ranks(trained, nproc, hook)


class Given(nn.Module):
    """Parameters whose gradient is what `forward` is given."""

    def __init__(self, *parameters):
        super().__init__()
        self.weights = nn.ParameterList(parameters or [torch.zeros(4), torch.zeros(3)])

    def forward(self, *gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def step(model, *gradients):
    """One backward with these gradients on this rank; what came of them."""
    model.zero_grad()
    model(*gradients).backward()
    return [w.grad.clone() for w in getattr(model, "module", model).weights]


def big_and_nothing(hook):
    model = DistributedDataParallel(Given())
    commhub.register(model, hook)
    mine = 1e5 if dist.get_rank() == 0 else 0.0
    return step(model, torch.full((4,), mine), torch.full((3,), mine))


@pytest.mark.parametrize("hook", ["fp16", "allreduce(wire=fp16)"])
def test_a_mean_that_fits_fp16_does_not_overflow_on_the_way(ranks, hook):
    simulated = commhub.simulate(hook, [[torch.full((4,), 1e5)], [torch.zeros(4)]]).gradients
    for tensors in (*ranks(big_and_nothing, 2, hook), *simulated):
        for tensor in tensors:
            assert tensor.dtype == torch.float32
            assert tensor.tolist() == pytest.approx([5e4] * tensor.numel(), rel=2**-11)


def zeros(hook):
    model = DistributedDataParallel(Given(), bucket_cap_mb=MANY)
    commhub.register(model, hook)
    rank = dist.get_rank()
    for _ in range(5):
        first, second = step(model, torch.zeros(4), torch.full((3,), 1.0 + rank))
        assert not first.any()
        assert second.any()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_gradient_that_is_always_zero_stays_zero(ranks, hook):
    ranks(zeros, 2, hook)


def poison(hook, cap, value):
    model = DistributedDataParallel(Given(), bucket_cap_mb=cap)
    commhub.register(model, hook)
    seen = []
    for number in range(4):
        one, two = torch.ones(4), torch.full((3,), 2.0)
        if number == 2 and dist.get_rank() == 1:
            one[1] = value
        seen.append(step(model, one, two))
    clean = [torch.ones(4), torch.full((3,), 2.0)]
    for number in (0, 1, 3):
        assert all(bitwise_equal(a, b) for a, b in zip(seen[number], clean, strict=True)), number
    first, second = seen[2]
    assert not torch.isfinite(first[1])
    assert torch.isfinite(first[[0, 2, 3]]).all()
    assert bitwise_equal(second, clean[1])


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_non_finite_gradient_reaches_all_ranks_and_the_next_step_is_clean(ranks, hook, cap):
    for value in (float("inf"), float("-inf"), float("nan")):
        ranks(poison, 2, hook, cap, value)


def generators(hook):
    random.seed(7)
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate()
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    registration = commhub.register(model, hook)
    train(model, 3)
    registration.swap("allreduce")
    train(model, 1)
    registration.remove()
    assert bitwise_equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("hook", [*HOOKS, "noop"])
def test_global_random_numbers_are_left_alone(ranks, hook):
    ranks(generators, 2, hook)


def noop():
    model = DistributedDataParallel(Given())
    registration = commhub.register(model, "noop")
    first, _ = step(model, torch.full((4,), float(dist.get_rank())), torch.ones(3))
    return first.tolist(), registration.stats.sent_bytes, registration.stats.compression


def test_noop_leaves_each_rank_its_own_gradient_and_sends_nothing(ranks):
    assert ranks(noop, 2) == [([float(r)] * 4, 0.0, float("inf")) for r in range(2)]


# What a hook is told about its bucket.


class Notes:
    """Averages and writes down what it was given."""

    def __init__(self):
        self.buckets, self.gradients = [], {}

    def reduce(self, bucket):
        seen = {k: getattr(bucket, k) for k in ("index", "step", "rank", "world_size", "divisor", "names", "used")}
        self.buckets.append(seen)
        for name, parameter, gradient, segment in zip(
            bucket.names, bucket.parameters, bucket.gradients, bucket.segments, strict=True
        ):
            assert gradient.shape == parameter.shape
            assert (segment.dim(), segment.numel()) == (1, parameter.numel())
            assert not parameter.numel() or gradient.data_ptr() == segment.data_ptr()
            self.gradients[name] = gradient.clone()
        bucket.flat.copy_((yield AllReduce(bucket.flat)))

    def used(self, step):
        """{name: flag} of one step."""
        return {
            name: flag
            for b in self.buckets
            if b["step"] == step
            for name, flag in zip(b["names"], b["used"], strict=True)
        }


def strides(cap, ddp):
    every = torch.arange(24.0)
    weights = [
        torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.zeros(4, 6).t(),
        torch.zeros(2, 3, 4).permute(2, 0, 1),
        torch.zeros(6, 8)[:, ::2],  # with gaps
        torch.zeros(4, 12)[:, ::2].t(),  # with gaps, transposed
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(24),
    ]
    gradients = [every[: w.numel()].reshape(w.shape) for w in weights]
    model = DistributedDataParallel(Given(*map(nn.Parameter, weights)), bucket_cap_mb=cap, **ddp)
    commhub.register(model, hook := Notes())
    for _ in range(2):
        found = step(model, *gradients)
        for i, gradient in enumerate(gradients):
            assert torch.equal(hook.gradients[f"weights.{i}"], gradient), i
            assert torch.equal(found[i], gradient), i
    for i in range(3):
        assert hook.gradients[f"weights.{i}"].stride() == weights[i].stride()


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_gradients_of_a_bucket_have_each_parameter_s_shape_and_strides(ranks, cap, ddp):
    ranks(strides, 2, cap, ddp)


def places():
    model = DistributedDataParallel(mlp([16] * 4), bucket_cap_mb=1 / 1024)
    commhub.register(model, hook := Notes())
    train(model, 3)
    rank, p = dist.get_rank(), dist.get_world_size()
    assert all((b["rank"], b["world_size"], b["divisor"]) == (rank, p, p) for b in hook.buckets)
    assert all(all(b["used"]) for b in hook.buckets)
    return [(b["step"], b["index"]) for b in hook.buckets]


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_a_bucket_tells_its_step_its_place_in_it_and_the_ranks(ranks, nproc):
    wanted = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert ranks(places, nproc) == [wanted] * nproc


class Routed(nn.Module):
    """Each call uses the layers it is told to; one is never used."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(mlp([8, 8], seed=i)[0] for i in range(4))

    def forward(self, x, chosen):
        for i in chosen:
            x = self.layers[i](x)
        return x.square().mean()


def routed(model, number, chosen):
    model(*batches(8)(dist.get_rank(), number), chosen).backward()


def layers(flags):
    """The layers whose parameters are all used; those partly used would show as neither."""
    by_layer = {}
    for name, flag in flags.items():
        by_layer.setdefault(int(name.split(".")[1]), set()).add(flag)
    assert all(len(flags) == 1 for flags in by_layer.values())
    return sorted(layer for layer, flags in by_layer.items() if flags == {True})


def flags_of_unused(cap):
    model = DistributedDataParallel(Routed(), find_unused_parameters=True, bucket_cap_mb=cap)
    commhub.register(model, hook := Notes())
    chosen = [[[0], [1, 2]], [[0, 1, 2], [0]], [[1], [1]]]
    for number, by_rank in enumerate(chosen):
        routed(model, number, by_rank[dist.get_rank()])
        assert layers(hook.used(number)) == by_rank[dist.get_rank()]
    assert len(hook.buckets) == 3 * (8 if cap == MANY else 1)
    assert all(p.grad is None for p in model.module.layers[3].parameters())


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
def test_used_tells_which_parameters_this_rank_s_backward_reached(ranks, cap):
    ranks(flags_of_unused, 2, cap)


def flags_of_static_graph(cap):
    model = DistributedDataParallel(Routed(), static_graph=True, bucket_cap_mb=cap)
    commhub.register(model, hook := Notes())
    for number in range(4):
        routed(model, number, [0, 1, 2])
        assert layers(hook.used(number)) == [0, 1, 2]


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
def test_used_is_right_in_a_static_graph(ranks, cap):
    ranks(flags_of_static_graph, 2, cap)


def flags_under_no_sync():
    model = DistributedDataParallel(Routed(), find_unused_parameters=True, bucket_cap_mb=MANY)
    commhub.register(model, hook := Notes())
    with model.no_sync():
        routed(model, 0, [0])
        routed(model, 1, [1])
    routed(model, 2, [2])
    assert layers(hook.used(0)) == [0, 1, 2]
    assert {b["step"] for b in hook.buckets} == {0}
    routed(model, 3, [1])
    assert layers(hook.used(1)) == [1]


def test_used_counts_the_backwards_that_were_accumulated(ranks):
    ranks(flags_under_no_sync, 2)


def joined(initial, cap):
    model = DistributedDataParallel(mlp(), bucket_cap_mb=cap)
    commhub.register(model, hook := Notes())
    rank = dist.get_rank()
    with model.join(divide_by_initial_world_size=initial):
        for number in range(2 * rank + 1):
            model(*batches(8)(rank, number)).sum().backward()
    divisors = {b["step"]: b["divisor"] for b in hook.buckets}
    used = {number: set(hook.used(number).values()) for number in divisors}
    assert all(used[number] == {number < 2 * rank + 1} for number in used)
    return divisors


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
def test_the_divisor_counts_the_ranks_that_join_still_waits_for(ranks, cap):
    assert ranks(joined, 3, False, cap) == [{0: 3, 1: 2, 2: 2, 3: 1, 4: 1}] * 3
    assert ranks(joined, 3, True, cap) == [dict.fromkeys(range(5), 3)] * 3
