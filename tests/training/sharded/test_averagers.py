"""Local SGD between replicas: parameters of shards are averaged, against the same done by hand in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import commhub

from .sharding import EVERY, Transformer, gradients, loss_of, mesh, parameters, same, shard

TIMEOUT = 20.0
POST = "post_local_sgd(start_step=2, period=3, local_gradients=false)"


def mean_(tensors, group, dtype=torch.float64):
    """The mean over a group in float64, rounded to a dtype, in place."""
    for tensor in tensors:
        every = [torch.empty_like(tensor, dtype=torch.float64) for _ in range(dist.get_world_size(group))]
        if tensor.numel():
            dist.all_gather(every, tensor.detach().to(torch.float64).contiguous(), group=group)
            tensor.copy_(torch.stack(every).mean(0).to(dtype))


@torch.no_grad()
def by_hand(model, optimizer, on, steps, averages, *, exchanged=0, buffers=False, dtype=torch.float64):
    """FSDP on the shards alone, and the replicas' mean: of gradients in the first steps, of parameters after some."""
    group, seen = on["replicate"].get_group(), []
    for step in range(steps):
        with torch.enable_grad():
            loss_of(model, step).backward()
        if step < exchanged:
            mean_([p.grad.to_local() for p in model.parameters() if p.grad is not None], group, dtype)
        seen.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        if step in averages:
            mean_([p.to_local() for p in model.parameters()], group)
            if buffers:
                mean_([b for b in model.buffers() if b.is_floating_point()], group)
        seen.append(parameters(model))
    return seen


def trained(model, optimizer, steps, first=0):
    seen = []
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        seen.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(parameters(model))
    return seen


KINDS = {
    "blocks": (Transformer, {}),
    "kept whole after forward": (Transformer, {"reshard_after_forward": False}),
    "bfloat16": (Transformer, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}),
    "reduced in bfloat16": (Transformer, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}),
    "offloaded": (Transformer, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "tied": (lambda: Transformer(tied=True), {}),
    "frozen": (lambda: frozen(Transformer()), {}),
    "uneven": (lambda: Odd(inner=7), {}),
    "one unit": (lambda: Transformer(blocks=0), {}),
}


class Odd(Transformer):
    """Parts of different sizes, and none of the scale on the second rank."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        return super().forward(tokens) * self.scale


def frozen(model):
    model.blocks[0].requires_grad_(False)
    return model


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def against_the_hand(hook, steps, averages, exchanged, kind, shards=2):
    """Gradients and parameters after each step, here and by hand; how many replicas' parameters end apart."""
    on = mesh(shards)
    make, options = KINDS[kind]
    model = shard(make(), on["shard"], **options)
    optimizer = adam(model)
    registration = commhub.register(model, hook, process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT)
    native = shard(make(), on["shard"], **options)
    dtype = torch.bfloat16 if kind == "reduced in bfloat16" else torch.float64
    expected = by_hand(native, adam(native), on, steps, averages, exchanged=exchanged, dtype=dtype)
    found = trained(model, optimizer, steps)
    return same(found, expected), registration.step


SOME = ["blocks", "bfloat16", "uneven"]


@pytest.mark.parametrize("kind", list(KINDS) if EVERY else SOME)
def test_post_local_sgd_is_what_is_done_by_hand(ranks, kind):
    assert ranks(against_the_hand, 4, POST, 7, {2, 5}, 2, kind) == [(True, 7)] * 4


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("kind", list(KINDS) if EVERY else ["blocks"])
def test_an_averager_by_itself_is_what_is_done_by_hand(ranks, nproc, kind):
    assert (
        ranks(against_the_hand, nproc, "periodic(period=2)", 5, {0, 2, 4}, 0, kind, nproc // 2) == [(True, 5)] * nproc
    )


def in_groups(hook, shards):
    """After each step: how far from the float64 mean of some replicas' parameters, in parts of float32's rounding."""
    on = mesh(shards)
    model = shard(Transformer(), on["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = torch.optim.SGD(model.parameters(), lr=0.1)  # steps without averages
    replicas, own = on["replicate"].size(), on["replicate"].get_local_rank()
    commhub.register(model, hook, process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT)
    worst = []
    for step in range(4):
        loss_of(model, step).backward()
        before = [p.detach().to_local().clone() for p in model.parameters()]
        twin.step()
        stepped = [p.detach().to_local().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.to_local().copy_(value)
        optimizer.step()
        optimizer.zero_grad()
        errors = []
        for p, value in zip(model.parameters(), stepped, strict=True):
            every = [torch.empty_like(value) for _ in range(replicas)]
            dist.all_gather(every, value, group=on["replicate"].get_group())
            among = range(replicas) if step % 2 == 0 else [own - own % 2, own - own % 2 + 1]
            some = torch.stack([every[r].double() for r in among])
            # A sum of n numbers in float32, in whatever order, is off by n - 1 roundings of the sum of their sizes.
            bound = (len(some) - 1) * 2.0**-24 * some.abs().mean(0)
            off = (p.detach().to_local().double() - some.mean(0)).abs()
            errors.append(float((off / bound.clamp_min(1e-45)).max()))
        worst.append(max(errors))
    return worst


def test_a_hierarchy_of_replicas(ranks):
    for worst in ranks(in_groups, 4, "hierarchical(periods={1: 2, 2: 4})", 1):
        assert max(worst) <= 1.0, worst


def under_ddp(steps):
    """Shards of one rank, and the same model under DDP."""
    on = mesh(1)
    model = shard(Transformer(), on["shard"])
    twin = nn.parallel.DistributedDataParallel(Transformer())
    found = []
    for one, options in ((model, {"process_group": on["replicate"]}), (twin, {})):
        optimizer = adam(one)
        commhub.register(one, POST, optimizer=optimizer, timeout=TIMEOUT, **options)
        found.append(trained(one, optimizer, steps))
    return same(found[0], [{n.removeprefix("module."): t for n, t in step.items()} for step in found[1]])


def test_shards_of_one_rank_are_trained_as_under_ddp(ranks):
    assert ranks(under_ddp, 2, 7) == [True] * 2


def after_evaluations(reshard, prefetch, given):
    """A step is followed by an evaluation, which leaves the root unsharded, or by a gathering that is begun early."""
    on = mesh()
    options = {"reshard_after_forward": reshard}
    model, native = (shard(Transformer(), on["shard"], **options) for _ in range(2))
    optimizers = [adam(one) for one in (model, native)]
    registration = commhub.register(model, "periodic(period=2)", process_group=on["replicate"], timeout=TIMEOUT, **{
        "optimizer": optimizers[0]
    } if given else {})  # fmt: skip
    found = []
    for one, optimizer in zip((model, native), optimizers, strict=True):
        seen = []
        for step in range(4):
            if prefetch:
                one.unshard(async_op=True)
            loss_of(one, step).backward()
            seen.append(gradients(one))
            optimizer.step()
            optimizer.zero_grad()
            if one is native and step % 2 == 0:
                with torch.no_grad():
                    mean_([p.to_local() for p in one.parameters()], on["replicate"].get_group())
            if not prefetch:
                with torch.no_grad():
                    loss_of(one.eval(), step)
                one.train()
        found.append(seen)
    registration.finish()
    return same(*found)


CASES = [(False, False, False), (True, True, False), (True, False, False), (False, False, True)]


@pytest.mark.parametrize(("reshard", "prefetch", "given"), CASES if EVERY else CASES[:2])
def test_what_was_gathered_before_an_average_is_gathered_anew(ranks, reshard, prefetch, given):
    assert ranks(after_evaluations, 4, reshard, prefetch, given) == [True] * 4


class Normed(Transformer):
    """With running statistics, which every rank has of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, tokens):
        return self.norm(super().forward(tokens))


def with_buffers():
    on = mesh()
    model, native = (shard(Normed(), on["shard"]) for _ in range(2))
    optimizer = adam(model)
    hook = "periodic(period=2, buffers=true)"
    commhub.register(model, hook, process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT)
    expected = by_hand(native, adam(native), on, 3, {0, 2}, buffers=True)
    found = trained(model, optimizer, 3)
    mine, theirs = dict(model.named_buffers()), dict(native.named_buffers())
    every = [torch.empty_like(mine["norm.running_mean"]) for _ in range(4)]
    dist.all_gather(every, mine["norm.running_mean"])
    alike = [torch.equal(every[0], other) for other in every]
    return same(found, expected), all(torch.equal(mine[name], theirs[name]) for name in theirs), alike


def test_buffers_are_averaged_among_the_ranks_that_keep_the_same_shard(ranks):
    assert ranks(with_buffers, 4) == [(True, True, [True, False, True, False])] * 4


def with_state():
    """Momentum, which is averaged too."""
    on = mesh()
    group = on["replicate"].get_group()
    model, native = (shard(Odd(inner=7), on["shard"]) for _ in range(2))
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, native))
    hook = "periodic(period=2, optimizer_state=true)"
    commhub.register(model, hook, process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT)
    found, expected = trained(model, optimizer, 5), []
    for step in range(5):
        expected += trained(native, other, 1, first=step)
        if step % 2 == 0:
            with torch.no_grad():
                mean_([p.to_local() for p in native.parameters()], group)
                mean_([other.state[p]["momentum_buffer"].to_local() for p in native.parameters()], group)
            expected[-1] = parameters(native)
    return same(found, expected)


def test_the_optimizers_state_is_averaged_too(ranks):
    assert ranks(with_state, 4) == [True] * 4


def one_after_the_other(leave):
    """Plain averages, local steps, and plain averages or none again: by swap or by a schedule."""
    on = mesh()
    model, native = (shard(Transformer(), on["shard"]) for _ in range(2))
    optimizer = adam(model)
    options = {"process_group": on["replicate"], "optimizer": optimizer, "timeout": TIMEOUT}
    registration = commhub.register(model, "allreduce", **options)
    expected = by_hand(native, adam(native), on, 6, {2, 4}, exchanged=2)
    if leave == "schedule":
        registration.schedule({2: "periodic(period=4, warmup_steps=2)", 5: "allreduce"})
        found = trained(model, optimizer, 5)
    else:
        found = trained(model, optimizer, 2)
        registration.swap("periodic(period=4, warmup_steps=2)")
        found += trained(model, optimizer, 3, first=2)
        if leave == "swap":
            registration.swap("allreduce")
        elif leave == "register":
            registration = commhub.register(model, "allreduce", **options)
        else:
            registration.remove()
    # What follows step 4 is the last average, which the swap makes.
    after = parameters(model)
    return same(found[:9], expected[:9]), same([after], [expected[9]])


LEAVES = ["swap", "remove", "register", "schedule"]


@pytest.mark.parametrize("leave", LEAVES)
def test_what_follows_an_averager_begins_with_equal_parameters(ranks, leave):
    assert ranks(one_after_the_other, 4, leave) == [(True, True)] * 4


def resumed(folder, load):
    """Three steps, a checkpoint of the model for each replica, and three more; or those from the checkpoint."""
    on = mesh()
    model = shard(Odd(inner=7), on["shard"])
    optimizer = adam(model)
    options = {"process_group": on["replicate"], "optimizer": optimizer, "timeout": TIMEOUT}
    registration = commhub.register(model, "periodic(period=3, warmup_steps=1)", **options)
    if not load:
        trained(model, optimizer, 3)
        registration.save(folder / "hook")
    weights, state = get_state_dict(model, optimizer)
    whole = {"model": weights, "optimizer": state}
    own = {"checkpoint_id": folder / f"replica{dist.get_rank() // 2}", "process_group": on["shard"].get_group()}
    if load:
        dcp.load(whole, **own)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        registration.load(folder / "hook")
    else:
        dcp.save(whole, **own)
    return trained(model, optimizer, 3, first=3), registration.step


def test_local_steps_go_on_from_a_checkpoint(ranks, tmp_path):
    first, second = ranks(resumed, 4, tmp_path, False), ranks(resumed, 4, tmp_path, True)
    for (expected, steps), (found, again) in zip(first, second, strict=True):
        assert same(expected, found)
        assert steps == again == 6
