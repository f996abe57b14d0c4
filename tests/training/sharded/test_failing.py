"""A hook between replicas that fails, and replicas that differ: told on every rank of the mesh."""

import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commhub
from commhub import AllReduce

from .sharding import EVERY, Loop, Transformer, error_of, gradients, loss_of, mesh, same, shard, sharded

TIMEOUT = 20.0


class Raises:
    """The plain mean; on one rank of the world, in one bucket, an error."""

    def __init__(self, rank, step=1, bucket=1):
        self.where = rank, step, bucket

    def reduce(self, bucket):
        if (dist.get_rank(), bucket.step, bucket.index) == self.where:
            raise ValueError("no luck today")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def raising(victim, after):
    """A step that goes well, one that fails, and what follows `after`."""
    on = mesh()
    model, registration = sharded(on, Raises(victim), register={"timeout": TIMEOUT})
    native, _ = sharded(on, native=True)
    for one in (model, native):
        loss_of(one, 0).backward()
        one.zero_grad()
    began = time.monotonic()
    kind, text = error_of(loss_of(model, 1).backward)
    seconds, counted = time.monotonic() - began, registration.step
    if after == "swap":
        registration.swap("allreduce")
    else:
        registration = commhub.register(model, "allreduce", process_group=on["replicate"], timeout=TIMEOUT)
    model.zero_grad()
    found = [Loop(one).run(2) for one in (model, native)]
    return kind, text, seconds < TIMEOUT / 2, counted, registration.step - counted, same(*found)


@pytest.mark.parametrize(("victim", "after"), [(0, "swap"), (3, "register"), *[(0, "register"), (3, "swap")] * EVERY])
def test_a_hook_that_raises_ends_the_step_on_every_rank_of_the_mesh_and_fsdp_goes_on(ranks, victim, after):
    results = ranks(raising, 4, victim, after)
    assert [r[0] for r in results] == ["HookError"] * 4
    assert all("no luck today" in r[1] for r in results)
    assert all(f"shard {victim % 2}" in r[1] for rank, r in enumerate(results) if rank % 2 != victim % 2)
    assert [r[2:4] for r in results] == [(True, 1)] * 4
    assert [r[5] for r in results] == [True] * 4


def skipping(who):
    """The ranks in `who` leave a block out of the second of three steps."""
    on = mesh()
    model, registration = sharded(on, "allreduce", register={"timeout": TIMEOUT})
    found = []
    for step in range(3):
        skip = (0,) if step == 1 and dist.get_rank() in who else ()
        began = time.monotonic()
        found.append((*error_of(loss_of(model, step, skip=skip).backward), time.monotonic() - began < TIMEOUT / 2))
        if found[-1][0]:
            break
        model.zero_grad()
    return found, registration.step


def test_a_layer_that_has_no_part_in_a_step_on_any_replica(ranks):
    assert ranks(skipping, 4, (0, 1, 2, 3)) == [([(None, "", True)] * 3, 3)] * 4


@pytest.mark.parametrize("replica", [0, 1])
def test_replicas_that_leave_different_layers_out_are_told_before_anything_mixes(ranks, replica):
    for found, steps in ranks(skipping, 4, (2 * replica, 2 * replica + 1)):
        assert steps == 1
        kind, text, soon = found[-1]
        assert (kind, soon, len(found)) == ("HookError", True, 2)
        assert "asks for" in text


class Halves(nn.Module):
    """A unit of two layers, of which a step may use one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})])
        self.head = nn.Linear(16, 4)

    def forward(self, x, half):
        return self.head(self.half(x, half))

    def half(self, x, half):
        block = self.blocks[0]
        return block["first"](x) if half == "first" else block["second"](block["first"](x))


def in_part(halves, fill):
    """Steps in which a unit's parameters got gradients in part, against native HSDP."""
    on, found = mesh(), []
    for native in (True, False):
        model = Halves()
        where = on if native else on["shard"]
        fully_shard([*model.blocks[0].values()], mesh=where)
        fully_shard(model, mesh=where)
        model.set_reduce_scatter_unused_params(fill)
        if not native:
            registration = commhub.register(model, "allreduce", process_group=on["replicate"], timeout=TIMEOUT)
        seen = []
        for step, half in enumerate(halves):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x, half).square().sum().backward()
            seen.append(gradients(model))
            model.zero_grad()
        found.append(seen)
    return same(*found), registration.step


@pytest.mark.parametrize("fill", [False, True])
def test_a_unit_whose_parameters_got_gradients_in_part(ranks, fill):
    halves = ["second", "first", "first", "second", "second"]
    assert ranks(in_part, 4, halves, fill) == [(True, 5)] * 4


def differing(fill=False):
    """One replica uses half of a unit where the other uses all of it."""
    on = mesh()
    model = Halves()
    fully_shard([*model.blocks[0].values()], mesh=on["shard"])
    fully_shard(model, mesh=on["shard"])
    model.set_reduce_scatter_unused_params(fill)
    commhub.register(model, "allreduce", process_group=on["replicate"], timeout=TIMEOUT)
    x = torch.ones(4, 16)
    model(x, "second").sum().backward()
    alone = gradients(model)["blocks.0.second.bias"]
    model.zero_grad()
    error = error_of(model(x, "first" if dist.get_rank() < 2 else "second").sum().backward)
    return (*error, torch.equal(gradients(model).get("blocks.0.second.bias", alone), alone / 2))


def test_replicas_that_use_different_parameters_of_a_unit_are_told(ranks):
    for kind, text, _ in ranks(differing, 4):
        assert kind == "HookError"
        assert "asks for" in text


def test_replicas_may_use_different_parameters_where_fsdp_fills_in_zeros(ranks):
    assert ranks(differing, 4, fill=True) == [(None, "", True)] * 4


def asking(by_rank, call="register"):
    """Each rank registers, or swaps to, another hook."""
    on = mesh()
    wanted = by_rank[dist.get_rank()]
    began = time.monotonic()
    if call == "register":
        model = shard(Transformer(), on["shard"])
        error = error_of(commhub.register, model, wanted, process_group=on["replicate"], timeout=TIMEOUT)
        after = commhub.registration(model)
    else:
        model, registration = sharded(on, "allreduce", register={"timeout": TIMEOUT})
        error = error_of(registration.swap, wanted)
        after = str(registration)
        loss_of(model, 0).backward()
    soon = time.monotonic() - began < TIMEOUT / 2
    if call == "register":
        commhub.register(model, "fp16", process_group=on["replicate"], timeout=TIMEOUT)
        loss_of(model, 0).backward()
    return (*error, soon, after)


@pytest.mark.parametrize(("call", "after"), [("register", None), ("swap", "allreduce")])
def test_hooks_that_differ_are_refused_on_every_rank_of_the_mesh(ranks, call, after):
    for by_rank in (["fp16", "fp16", "bf16", "fp16"], ["fp16", "bf16", "fp16", "bf16"]):
        for kind, text, soon, left in ranks(asking, 4, by_rank, call):
            assert kind in ("HookMismatchError", "RegistrationError")
            assert "disagree on" in text
            assert (soon, left) == (True, after)


@pytest.mark.parametrize(("call", "after"), [("register", None), ("swap", "allreduce")])
def test_a_wrong_hook_on_one_rank_is_told_on_every_rank_of_the_mesh(ranks, call, after):
    results = ranks(asking, 4, ["fp16", "fp16", "fp16", "powersgd(rank=0)"], call)
    assert results[3][0] == "HookOptionError"
    for kind, text, soon, left in results[:3]:
        assert kind == "RegistrationError"
        assert "rank" in text
        assert (soon, left) == (True, after)


def refused(what):
    on = mesh()
    if what == "hsdp":
        model, group = shard(Transformer(), on), on["replicate"]
    elif what == "world":
        model, group = shard(Transformer(), on["shard"]), dist.group.WORLD
    elif what == "mesh":
        model, group = shard(Transformer(), on["shard"]), on
    elif what == "none":
        model, group = shard(Transformer(), on["shard"]), None
    elif what == "several roots":
        model, group = Transformer(), on["replicate"]
        for block in model.blocks:
            fully_shard(block, mesh=on["shard"])
    else:
        model, group = shard(Transformer(), on["shard"]), on["replicate"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return error_of(commhub.register, model, what, process_group=group, optimizer=optimizer, timeout=TIMEOUT)
    return error_of(commhub.register, model, "fp16", process_group=group, timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("hsdp", 'mesh["shard"]'),
        ("world", "keep different shards"),
        ("mesh", "2 dimensions"),
        ("none", 'process_group=mesh["replicate"]'),
        ("several roots", "Apply fully_shard to the whole model too"),
        ("optimizer_overlap", "optimizer"),
    ],
)
def test_what_cannot_work_says_so(ranks, what, says):
    for kind, text in ranks(refused, 4, what):
        assert kind == "RegistrationError"
        assert says in text


def left_over():
    """A backward that ends in an exception of the model's own."""
    on = mesh()
    model, registration = sharded(on, "powersgd(rank=2, start_step=0)", register={"timeout": TIMEOUT})
    loss_of(model, 0).backward()

    def stop(*_):
        raise RuntimeError("stopped")

    handle = model.blocks[0].norm1.register_full_backward_pre_hook(stop)
    loss = loss_of(model, 1)
    error = error_of(loss.backward)
    handle.remove()
    model.reset_iter_state()
    model.zero_grad()
    loss_of(model, 2).backward()
    return error[1], registration.step


def test_a_backward_that_ends_in_an_exception_leaves_nothing_behind(ranks):
    assert ranks(left_over, 4) == [("stopped", 2)] * 4


def on_three_dimensions():
    """Tensor parallel ranks beside: the shard group is a part of the rest of the mesh."""
    on = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "other"))
    model = shard(Transformer(), on["shard"])
    registration = commhub.register(model, "fp16", process_group=on["replicate"], timeout=TIMEOUT)
    loss_of(model, 0).backward()
    return registration.step


def test_shards_of_one_rank(ranks):
    assert ranks(on_three_dimensions, 4) == [1] * 4


def untold(rank):
    """One rank cannot tell which parameters a buffer holds."""
    on = mesh()
    model, registration = sharded(on, "allreduce", register={"timeout": TIMEOUT})
    loss_of(model, 0).backward()
    if dist.get_rank() == rank:
        model.blocks[0]._get_fsdp_state()._fsdp_param_groups[0].reduce_scatter_unused_params = False
        shard_group = model.blocks[0]._get_fsdp_state()._fsdp_param_groups[0]
        attachment = model.__dict__["_commhub_slot"]
        attachment._note = lambda number: None
        shard_group.post_backward = type(shard_group).post_backward.__get__(shard_group)
    began = time.monotonic()
    error = error_of(loss_of(model, 1).backward)
    return (*error, time.monotonic() - began < TIMEOUT / 2, registration.step)


@pytest.mark.parametrize("rank", [0, 3])
def test_what_one_rank_cannot_do_is_told_to_all_at_once(ranks, rank):
    for kind, text, soon, steps in ranks(untold, 4, rank):
        assert (kind, soon, steps) == ("HookError", True, 1)
        assert "cannot be told" in text


def kept_apart():
    """Backwards without an exchange that use different parameters on all ranks of one shard."""
    on = mesh()
    model = Halves()
    fully_shard([*model.blocks[0].values()], mesh=on["shard"])
    fully_shard(model, mesh=on["shard"])
    registration = commhub.register(model, "allreduce", process_group=on["replicate"], timeout=TIMEOUT)
    model.set_requires_all_reduce(False)
    model(torch.ones(4, 16), "first").sum().backward()
    began = time.monotonic()
    error = error_of(model(torch.ones(4, 16), "second").sum().backward)
    return (*error, time.monotonic() - began < TIMEOUT / 2, registration.step)


def test_gradients_that_came_in_some_backwards_only_are_refused_on_all_ranks(ranks):
    for kind, text, soon, steps in ranks(kept_apart, 4):
        assert (kind, soon, steps) == ("HookError", True, 0)
        assert "came in some backwards only" in text


def one_shard_is_infinite(poisoned):
    """A step whose gradients are infinite in rows of one shard alone, under a loss scaler, or no such step."""
    on = mesh()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = fully_shard(nn.Linear(16, 8, bias=False), mesh=on["shard"])
    with torch.no_grad():
        model.weight.to_local().copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(5)))
    options = {"timeout": TIMEOUT, "scaler": scaler}
    registration = commhub.register(
        model, "powersgd(rank=1, start_step=0, min_compression_rate=1)", process_group=on["replicate"], **options
    )
    for step in range(3) if poisoned else (0, 2):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model.zero_grad()
        y = model(x)
        if step == 1:
            y = y.clone()
            y[:, 0] *= float("inf")
        (scaler.get_scale() * y.square().sum()).backward()
    kept = registration.state_dict()["local"][f"rank{on['replicate'].get_local_rank()}"]
    return {f"{n} {k}": t for n, table in kept.items() for k, t in table.items()}, gradients(model)


def test_a_step_that_is_not_finite_on_one_shard_is_forgotten_on_all(ranks):
    with_it, without = ranks(one_shard_is_infinite, 4, True), ranks(one_shard_is_infinite, 4, False)
    for (state, found), (wanted, expected) in zip(with_it, without, strict=True):
        assert state.keys() == wanted.keys() != set()
        for name, tensor in state.items():
            assert torch.allclose(tensor, wanted[name], rtol=1e-4, atol=1e-4), name
        assert torch.allclose(found["weight"], expected["weight"], rtol=1e-4, atol=1e-3)


def held_back():
    """What a backward without an exchange leaves, here and under native HSDP; the registration ends in between."""
    on, found = mesh(), []
    for native in (True, False):
        model, _ = sharded(on, "allreduce", native=native)
        model.set_requires_all_reduce(False)
        for block in model.blocks:
            block.set_requires_all_reduce(False)
        loss_of(model, 0).backward()
        found.append(sorted(gradients(model)))
    return found


def test_gradients_that_are_held_back_are_not_there(ranks):
    assert ranks(held_back, 4) == [[[], []]] * 4


def dropped():
    """Whether a model is alive whose registration is kept."""
    model, registration = sharded(mesh(), "fp16")
    loss_of(model, 0).backward()
    left = weakref.ref(model)
    del model
    gc.collect()
    return left() is None, registration.step


def test_a_registration_that_is_kept_keeps_no_model(ranks):
    assert ranks(dropped, 4) == [(True, 1)] * 4


def two_at_once(order):
    """Two models in one backward, of which the hook of one raises; then each for itself, against native HSDP."""
    on = mesh()
    (a, ra), (b, rb) = sharded(on, Raises(0), register={"timeout": TIMEOUT}), sharded(on, "allreduce")
    native, _ = sharded(on, native=True)
    turns = (a, b) if order == "ab" else (b, a)  # backward begins with the one that came last
    for step in range(2):
        first, second = (loss_of(one, step) for one in turns)
        error = error_of((first + second).backward)
    ra.swap("allreduce")
    found = []
    for one in (a, b, native):
        one.zero_grad()
        found.append(Loop(one).run(2))
    return error[0], same(found[0], found[2]), same(found[1], found[2]), ra.step, rb.step


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_failure_of_one_model_leaves_another_in_the_same_backward_usable(ranks, order):
    assert ranks(two_at_once, 4, order) == [("HookError", True, True, 3, 4)] * 4
