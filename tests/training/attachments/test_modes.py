"""`allreduce` is DDP's own average, bit for bit, in every mode that a DDP model is trained in."""

import contextlib
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import commhub
from commhub.testing import Branches, EveryKind, assert_equal_across_ranks, batches, bitwise_equal, mlp, train

ONE, MANY = 25.0, 1 / 1024  # bucket_cap_mb: all in one bucket; a bucket per layer, from the second step on
SIZES = pytest.mark.parametrize("cap", [ONE, MANY], ids=["one bucket", "many buckets"])
DEEP = [16] * 7


def same(a, b):
    """Whether two lists of {name: tensor} agree bit by bit."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(bitwise_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def grads(model):
    module = getattr(model, "module", model)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def compare(make, body, *, cap=ONE, **ddp):
    """Run `body` on a bare model and on a hooked one; it returns a list of {name: tensor}."""
    bare, hooked = (DistributedDataParallel(make(), bucket_cap_mb=cap, **ddp) for _ in range(2))
    registration = commhub.register(hooked, "allreduce")
    expected, found = body(bare), body(hooked)
    assert any(expected)
    assert same(expected, found)
    return registration


def whole_run(model, steps=5, **kwargs):
    run = train(model, steps, **kwargs)
    return [*run.gradients, run.parameters]


def loop(model, steps=4, *, forward=None, lr=0.1, zero=True, width=16):
    """A training loop of one's own: `forward(model, x, step)` returns the loss."""
    rank, batch, seen = dist.get_rank(), batches(width), []
    forward = forward or (lambda model, x, step: model(x).square().mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=zero)
        forward(model, *batch(rank, step), step).backward()
        seen.append(grads(model))
        optimizer.step()
    return seen


# Modes of DDP itself.

MODES = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "batched_grad_copy": {"batched_grad_copy": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph with bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "find_unused with bucket views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


def in_mode(mode, cap):
    registration = compare(deep, whole_run, cap=cap, **MODES[mode])
    assert registration.step == registration.stats.steps == 5


def deep():
    return mlp(DEEP)


@SIZES
@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_allreduce_is_bit_equal_to_a_model_without_a_hook(ranks, nproc, cap):
    ranks(in_mode, nproc, "plain", cap)


@SIZES
@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_allreduce_is_bit_equal_in_mode(ranks, mode, cap):
    ranks(in_mode, 2, mode, cap)


@pytest.mark.parametrize("mode", MODES)
def test_allreduce_divides_as_ddp_does_where_one_over_p_is_inexact(ranks, mode):
    ranks(in_mode, 3, mode, MANY)


def every_kind(ddp):
    compare(EveryKind, lambda model: whole_run(model, batch=EveryKind.batch), cap=MANY, **ddp)


@pytest.mark.parametrize("ddp", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_every_kind_of_parameter_is_bit_equal(ranks, ddp):
    if "gradient_as_bucket_view" in ddp:
        ranks(every_kind_as_views, 2)
    else:
        ranks(every_kind, 2, ddp)


def every_kind_as_views():
    # A sparse gradient cannot be a view of a bucket: DDP refuses the embedding in this mode.
    def make():
        model = EveryKind()
        model.embedding.weight.requires_grad_(False)
        return model

    compare(make, lambda m: whole_run(m, batch=EveryKind.batch), cap=MANY, gradient_as_bucket_view=True)


def rebuilt(cap):
    """The buckets that the hook saw, per step: one in registration order, then by arrival."""
    model = DistributedDataParallel(deep(), bucket_cap_mb=cap)
    hook = Watching()
    commhub.register(model, hook)
    train(model, 3)
    return hook.seen


class Watching:
    """Averages, and notes which parameters came in which bucket."""

    def __init__(self):
        self.seen = {}

    def reduce(self, bucket):
        self.seen.setdefault(bucket.step, []).append((bucket.index, bucket.names))
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def test_buckets_are_numbered_by_arrival_before_and_after_they_are_rebuilt(ranks):
    (seen, other) = ranks(rebuilt, 2, MANY)
    assert seen == other
    assert [len(seen[step]) for step in range(3)] == [1, 6, 6]
    assert all([index for index, _ in seen[step]] == list(range(len(seen[step]))) for step in range(3))
    assert set(seen[1][0][1]) == {"10.bias", "10.weight"}
    every = {name for name, _ in mlp(DEEP).named_parameters()}
    assert all({n for _, names in seen[step] for n in names} == every for step in range(3))


# Parameters that a backward leaves out.


class Routed(nn.Module):
    """Layers of which each call uses those it is told to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(mlp([16, 16], seed=i)[0] for i in range(4))

    def forward(self, x, chosen):
        for i in chosen:
            x = self.layers[i](x).tanh()
        return x


ROUTES = {  # (rank, step) -> the layers in use; layer 3 is used by nobody in steps 0 and 2
    (0, 0): [0, 1], (1, 0): [0, 2], (0, 1): [3], (1, 1): [0, 1, 2, 3],
    (0, 2): [0], (1, 2): [0], (0, 3): [2, 1], (1, 3): [3],
}  # fmt: skip


def routes(model, x, step):
    return model(x, ROUTES[dist.get_rank() % 2, step]).square().mean()


def unused(cap, ddp):
    compare(Routed, lambda model: loop(model, forward=routes), cap=cap, find_unused_parameters=True, **ddp)
    model = DistributedDataParallel(Routed(), bucket_cap_mb=cap, find_unused_parameters=True, **ddp)
    commhub.register(model, "allreduce")
    first = loop(model, 1, forward=routes)[0]
    return sorted(first)


@SIZES
@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_parameters_unused_on_some_ranks_or_on_all_are_bit_equal(ranks, cap, ddp):
    seen = ranks(unused, 2, cap, ddp)
    # What nobody used has no gradient, as in DDP without a hook.
    assert seen[0] == seen[1] == [f"layers.{i}.{p}" for i in (0, 1, 2) for p in ("bias", "weight")]


def skipped(cap):
    # With skip_all_reduce_unused_params a bucket that nobody used is never reduced.
    ddp = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}
    registration = compare(Routed, lambda m: loop(m, forward=alike), cap=cap, **ddp)
    assert registration.step == 4


def alike(model, x, step):
    return model(x, [[0, 1], [0, 2], [3], [0, 1, 2, 3]][step]).square().mean()


@SIZES
def test_skip_all_reduce_unused_params_is_bit_equal_and_counts_each_step_once(ranks, cap):
    ranks(skipped, 2, cap)


def static_unused():
    compare(Branches, lambda model: loop(model, width=8), cap=MANY, static_graph=True)


def test_a_parameter_that_a_static_graph_never_reaches_is_no_obstacle(ranks):
    ranks(static_unused, 2)


# Accumulation, uneven inputs.


def accumulate(cap, ddp):
    def body(model):
        seen, batch, rank = [], batches(16), dist.get_rank()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            with model.no_sync():
                for part in range(step):  # none before the first step, three before the last
                    model(*batch(rank, 10 * step + part)).square().mean().backward()
            model(*batch(rank, 10 * step + 9)).square().mean().backward()
            seen.append(grads(model))
            optimizer.step()
        return seen

    assert compare(deep, body, cap=cap, **ddp).step == 4


@SIZES
@pytest.mark.parametrize("mode", ["plain", "gradient_as_bucket_view", "find_unused_parameters"])
def test_no_sync_accumulates_and_counts_synchronised_backwards_only(ranks, mode, cap):
    ranks(accumulate, 2, cap, MODES[mode])


def uneven(cap, initial, ddp):
    def body(model):
        seen, batch, rank = [], batches(16), dist.get_rank()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join(divide_by_initial_world_size=initial):
            for step in range(2 + 2 * rank):
                optimizer.zero_grad()
                model(*batch(rank, step)).square().mean().backward()
                seen.append(grads(model))
                optimizer.step()
        assert_equal_across_ranks([p.detach() for p in model.parameters()])
        return [*seen, *whole_run(model, 2)]

    compare(deep, body, cap=cap, **ddp)


@SIZES
@pytest.mark.parametrize("initial", [True, False], ids=["initial world size", "active ranks"])
def test_join_with_uneven_inputs_is_bit_equal_dividing_by(ranks, cap, initial):
    ranks(uneven, 2, cap, initial, {})


@pytest.mark.parametrize("mode", ["gradient_as_bucket_view", "find_unused_parameters"])
def test_join_on_three_ranks_is_bit_equal_with(ranks, mode):
    ranks(uneven, 3, MANY, False, MODES[mode])


# Groups and several models.


def subgroups():
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    mine = pairs[rank // 2]
    if rank < 2:  # these two train, meanwhile the others train another model with another hook
        compare(deep, whole_run, cap=MANY, process_group=mine)
    else:
        model = DistributedDataParallel(mlp([16, 8]), process_group=mine)
        commhub.register(model, "fp16")
        train(model, 3)
        assert_equal_across_ranks([p.detach() for p in model.parameters()], mine)
    some = dist.new_group([1, 3])
    if rank in (1, 3):  # and here nobody else does anything
        compare(deep, whole_run, cap=MANY, process_group=some)


def test_models_on_subgroups_average_over_their_own_ranks_only(ranks):
    ranks(subgroups, 4)


def interleaved():
    def both():
        return [DistributedDataParallel(mlp(DEEP, seed=i), bucket_cap_mb=MANY) for i in range(2)]

    bare, hooked = both(), both()
    for model in hooked:
        commhub.register(model, "allreduce")
    batch, rank = batches(16), dist.get_rank()
    for step in range(4):
        (x,) = batch(rank, step)
        for a, b in (bare, hooked):
            for model in (a, b):
                model.zero_grad()
            outputs = [a(x), b(x)]
            for output in reversed(outputs):
                output.square().mean().backward()
        for plain, mine in zip(bare, hooked, strict=True):
            assert same([grads(plain)], [grads(mine)])


def test_models_of_one_process_may_interleave_forward_and_backward(ranks):
    ranks(interleaved, 2)


def in_one_graph(cap, ddp):
    def both():
        return [DistributedDataParallel(mlp(DEEP, seed=i), bucket_cap_mb=cap, **ddp) for i in range(2)]

    bare, hooked = both(), both()
    for model in hooked:
        commhub.register(model, "allreduce")
    batch, rank = batches(16), dist.get_rank()
    for step in range(4):
        (x,) = batch(rank, step)
        for a, b in (bare, hooked):
            for model in (a, b):
                model.zero_grad()
            b(a(x)).square().mean().backward()
        for plain, mine in zip(bare, hooked, strict=True):
            assert same([grads(plain)], [grads(mine)])
    assert [commhub.registration(model).step for model in hooked] == [4, 4]


@SIZES
@pytest.mark.parametrize("mode", ["plain", "static_graph"])
def test_two_models_in_one_graph_share_a_backward(ranks, cap, mode):
    ranks(in_one_graph, 2, cap, MODES[mode])


# What wraps forward or backward.


def compiled(backend):
    def body(model):
        torch._dynamo.reset()
        return whole_run(torch.compile(model, backend=backend), 3, batch=batches(512))

    # Dynamo splits the graph by bucket; it wants at least 1 MiB in each.
    bare, hooked = (DistributedDataParallel(mlp([512] * 4), bucket_cap_mb=1) for _ in range(2))
    registration = commhub.register(torch.compile(hooked, backend=backend), "allreduce")
    assert registration is commhub.registration(hooked)
    expected, found = body(bare), body(hooked)
    assert same(expected, found)
    assert registration.step == 3


NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_a_compiled_model_is_bit_equal(ranks, backend):
    ranks(compiled, 2, backend)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList(mlp([16, 16], seed=i)[0] for i in range(4))
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant:
            x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return x


def checkpointed(reentrant, cap, ddp):
    compare(lambda: Checkpointed(reentrant), lambda model: loop(model), cap=cap, **ddp)


@SIZES
@pytest.mark.parametrize("mode", ["plain", "static_graph"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_is_bit_equal(ranks, reentrant, mode, cap):
    ranks(checkpointed, 2, reentrant, cap, MODES[mode])


class Twice(nn.Module):
    """Uses its layer in two checkpoints, which DDP serves in a static graph only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (mlp([16, 16], seed=i)[0] for i in range(2))

    def forward(self, x):
        x = x.requires_grad_()
        for layer in (self.first, self.second, self.first):
            x = checkpoint(layer, x, use_reentrant=True).tanh()
        return x


def reused():
    assert compare(Twice, lambda model: loop(model), cap=MANY, static_graph=True).step == 4


def test_a_layer_that_is_checkpointed_twice_in_a_static_graph_is_bit_equal(ranks):
    ranks(reused, 2)


def autocast():
    def forward(model, x, step):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    compare(deep, lambda model: loop(model, forward=forward), cap=MANY)


def test_training_under_autocast_is_bit_equal(ranks):
    ranks(autocast, 2)


def delayed():
    def make(hook):
        module = deep()
        late = [(n, p) for n, p in module.named_parameters() if n.startswith("10.")]
        model = DistributedDataParallel(
            module,
            bucket_cap_mb=MANY,
            delay_all_reduce_named_params=late,
            param_to_hook_all_reduce=module[0].weight,
        )
        if hook:
            commhub.register(model, hook)
        return model

    # PyTorch does not wait for the delayed gradients' own all-reduce, so only the others can be compared, and no
    # optimizer may use them (bare models differed from one another in 3 of 60 runs).
    bare, hooked = make(None), make(hook := Watching())
    for step in range(3):
        seen = []
        for model in (bare, hooked):
            model.zero_grad()
            model(*batches(16)(dist.get_rank(), step)).square().mean().backward()
            seen.append({name: g for name, g in grads(model).items() if not name.startswith("10.")})
        assert same(seen[:1], seen[1:])
    assert {name for _, names in hook.seen[1] for name in names} == {
        name for name, _ in deep().named_parameters() if not name.startswith("10.")
    }


def test_delayed_parameters_bypass_the_hook(ranks):
    ranks(delayed, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = mlp([16, 16])[0], mlp([16, 16], seed=1)[0]
        self.second.weight = self.first.weight
        self.frozen = mlp([16, 16], seed=2)[0].requires_grad_(False)

    def forward(self, x):
        return self.second(self.frozen(self.first(x)).tanh())


def tied():
    for mode in ("plain", "static_graph", "find_unused_parameters"):
        compare(Tied, lambda model: loop(model), cap=MANY, **MODES[mode])


def test_tied_and_frozen_parameters_are_bit_equal(ranks):
    ranks(tied, 2)


def kept_zeros(ddp):
    compare(Routed, lambda m: loop(m, zero=False, forward=routes), cap=MANY, find_unused_parameters=True, **ddp)
    compare(deep, lambda model: loop(model, zero=False), cap=MANY, **ddp)


@pytest.mark.parametrize("mode", ["plain", "gradient_as_bucket_view"])
def test_gradients_that_are_zeroed_in_place_are_bit_equal(ranks, mode):
    ranks(kept_zeros, 2, MODES[mode])


def one_rank_modes():
    for mode in MODES:
        in_mode(mode, MANY)
    compare(Routed, lambda m: loop(m, forward=routes), cap=MANY, find_unused_parameters=True)


def test_a_single_rank_trains_in_every_mode(ranks):
    ranks(one_rank_modes, 1)


# When a hook comes and what may come in between.


def midway(cap, ddp):
    def body(model, register):
        seen = []
        for step in range(6):
            if register and step == 3:
                commhub.register(model, "allreduce")
            seen += whole_run(model, 1, first_step=step)
        return seen

    bare, hooked = (DistributedDataParallel(deep(), bucket_cap_mb=cap, **ddp) for _ in range(2))
    assert same(body(bare, False), body(hooked, True))
    assert commhub.registration(hooked).step == 3


@SIZES
@pytest.mark.parametrize("mode", list(MODES)[:5])
def test_a_hook_may_come_in_the_middle_of_training(ranks, mode, cap):
    ranks(midway, 2, cap, MODES[mode])


class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError("user code")


def broken_backward(ddp):
    def body(model):
        seen = []
        for step in range(5):
            model.zero_grad()
            (x,) = batches(16)(dist.get_rank(), step)
            output = model(x)
            if step in (0, 2):
                with contextlib.suppress(ZeroDivisionError):
                    Bomb.apply(output).square().mean().backward()
                    raise AssertionError("backward raised nothing")
            else:
                output.square().mean().backward()
                seen.append(grads(model))
        return seen

    compare(deep, body, cap=MANY, **ddp)


@pytest.mark.parametrize("mode", ["plain", "static_graph", "find_unused_parameters"])
def test_training_goes_on_after_a_backward_that_raised_in_user_code(ranks, mode):
    ranks(broken_backward, 2, MODES[mode])


class Fused(nn.Module):
    """Raises in the middle of backward, when some buckets are on their way, if told to."""

    def __init__(self):
        super().__init__()
        self.layers, self.armed = deep(), False

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = Bomb.apply(layer(x)) if self.armed and i == 5 else layer(x)
        return x


def broken_midway(ddp):
    def story(hook):
        model = DistributedDataParallel(Fused(), bucket_cap_mb=MANY, **ddp)
        if hook:
            commhub.register(model, hook)
        told = []
        for step in range(5):
            model.zero_grad()
            model.module.armed = step == 2
            try:
                model(*batches(16)(dist.get_rank(), step)).square().mean().backward()
            except Exception as error:
                told.append((type(error).__name__, str(error).partition("\n")[0]))
        return model.module, told

    (_, expected), (module, found) = story(None), story("allreduce")
    assert [name for name, _ in expected] == ["ZeroDivisionError", "RuntimeError", "RuntimeError"]
    assert found == expected
    module.armed = False
    again = DistributedDataParallel(module, bucket_cap_mb=MANY, **ddp)  # PyTorch's own way out
    commhub.register(again, "allreduce")
    whole_run(again, 2, batch=batches(16))
    assert_equal_across_ranks([p.detach() for p in again.parameters()])


@pytest.mark.parametrize("mode", ["plain", "static_graph", "find_unused_parameters"])
def test_a_backward_that_raised_midway_ends_as_without_a_hook(ranks, mode):
    ranks(broken_midway, 2, MODES[mode])
