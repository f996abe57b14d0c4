"""A hook in place of the reduce-scatter: what it remembers, what goes wrong in it, and what is refused."""

import copy
import io
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import commhub
from commhub import ReduceScatter
from commhub.checkpoint import HookState
from commhub.training.steps._engine import Engine

from .sharding import (
    EVERY,
    Loop,
    Transformer,
    error_of,
    gradients,
    inside,
    loss_of,
    mesh,
    parameters,
    same,
    shard,
    warnings_of_commhub,
)

FEEDBACK = "quantize_per_channel(bits=4, dense_small=False, group_size=32)"
TIMEOUT = 10.0


class Raises:
    """The plain mean; on one rank, in one bucket, an error."""

    def __init__(self, rank, step=1, bucket=1, error=ValueError):
        self.where, self.error = (rank, step, bucket), error

    def reduce(self, bucket):
        raise AssertionError("reduce_scatter is called here")

    def reduce_scatter(self, bucket):
        if (bucket.rank, bucket.step, bucket.index) == self.where:
            raise self.error("no luck today")
        bucket.shard.copy_((yield ReduceScatter(bucket.flat)))


class Given(nn.Module):
    """Whose gradients are what it is given."""

    def __init__(self, shapes):
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})

    def forward(self, gradients):
        return sum((self.weights[name] * g).sum() for name, g in gradients.items())


SHAPES = {"a": (7, 40), "b": (5,), "c": (64, 3)}


def drawn(step, rank=None):
    generator = torch.Generator().manual_seed(100 * step + (dist.get_rank() if rank is None else rank))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def give(model, gradients):
    model.zero_grad()
    model(gradients).backward()
    return {n.removeprefix("weights."): p.grad.to_local().clone() for n, p in model.named_parameters()}


def part_of(whole, rank=None):
    rank, p = dist.get_rank() if rank is None else rank, dist.get_world_size()
    rows = -(-len(whole) // p)
    return whole[rank * rows : (rank + 1) * rows]


def residuals(registration):
    """What this rank has not sent, parameter by parameter: (p, rows, ...)."""
    (local,) = registration.state_dict()["local"].values()
    return {name.removeprefix("weights."): table["residual"] for name, table in local.items()}


def accumulated(hook, steps):
    """The largest distance of results plus mean residuals from the sum of all means, in each part."""
    model = fully_shard(Given(SHAPES))
    registration = commhub.register(model, hook)
    p, rank = dist.get_world_size(), dist.get_rank()
    came = {name: torch.zeros_like(part_of(torch.zeros(shape)), dtype=torch.float64) for name, shape in SHAPES.items()}
    wanted = copy.deepcopy(came)
    for step in range(steps):
        for name, result in give(model, drawn(step)).items():
            came[name] += result
        for other in range(p):
            for name, whole in drawn(step, other).items():
                wanted[name] += part_of(whole).double() / p
    left = {name: r.clone() for name, r in residuals(registration).items()}
    for name, residual in left.items():
        dist.all_reduce(residual)
        mine = residual[rank].double() / p
        came[name] += mine[: len(came[name])]
    return max([float((came[n] - wanted[n]).abs().max()) for n in came if came[n].numel()], default=0.0), max(
        float(r.abs().max()) for r in left.values()
    )


@pytest.mark.parametrize("nproc", [2, 3, *[4] * EVERY])
def test_what_was_not_sent_is_kept_and_comes_later(ranks, nproc):
    for far, left in ranks(accumulated, nproc, FEEDBACK, 6):
        assert left > 0.01
        assert far < 1e-5


def not_finite(victim):
    """A step with an infinite gradient in the first rank's part, on one rank: what was kept before and after."""
    model = fully_shard(Given(SHAPES))
    registration = commhub.register(model, FEEDBACK)
    give(model, drawn(0))
    before = {name: r.clone() for name, r in residuals(registration).items()}
    bad = drawn(1)
    if dist.get_rank() == victim:
        bad["a"][0, 3] = float("inf")
    result = give(model, bad)
    after = residuals(registration)
    finite = all(bool(t.isfinite().all()) for t in result.values())
    give(model, drawn(2))
    moved = any(not torch.equal(after[n], r) for n, r in residuals(registration).items())
    return finite, all(torch.equal(after[n], before[n]) for n in before), moved, registration.step


@pytest.mark.parametrize("victim", [0, 2])
def test_a_step_that_is_not_finite_on_one_rank_is_remembered_on_none(ranks, victim):
    results = ranks(not_finite, 3, victim)
    assert [r[0] for r in results] == [False, True, True]
    assert [r[1:] for r in results] == [(True, True, 3)] * 3


def resumed(folder, how):
    """Three steps, a save, three more; and the three again in another model that loads."""
    model, registration = inside(FEEDBACK)
    loop = Loop(model)
    loop.run(3)
    if how == "dcp":
        weights, optimizer = get_state_dict(model, loop.optimizer)
        dcp.save({"model": weights, "optimizer": optimizer, "hook": HookState(registration)}, checkpoint_id=folder)
    kept = parameters(model), copy.deepcopy(loop.optimizer.state_dict())
    file = io.BytesIO()
    torch.save(registration.state_dict(), file)
    if how == "folder":
        registration.save(folder)
    expected = loop.run(3)
    model, registration = inside(FEEDBACK, make=lambda: Transformer(seed=5))
    again = Loop(model, step=3)
    if how == "dcp":
        weights, optimizer = get_state_dict(model, again.optimizer)
        state = {"model": weights, "optimizer": optimizer, "hook": HookState(registration)}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, again.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.to_local().copy_(kept[0][name])
        again.optimizer.load_state_dict(kept[1])
    if how == "folder":
        registration.load(folder)
    elif how == "dict":
        file.seek(0)
        registration.load_state_dict(torch.load(file, weights_only=True))
    step = registration.step
    return same(expected, again.run(3)), step


@pytest.mark.parametrize("how", ["folder", "dcp", *["dict"] * EVERY])
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, how):
    assert ranks(resumed, 2, tmp_path / "saved", how) == [(True, 3)] * 2


def test_without_its_state_a_run_would_differ(ranks, tmp_path):
    assert ranks(resumed, 2, tmp_path / "saved", "not at all") == [(False, 0)] * 2


def saves(folder):
    model, registration = inside(FEEDBACK)
    loss_of(model, 0).backward()
    registration.save(folder)


def loads(folder):
    _, registration = inside(FEEDBACK)
    return error_of(registration.load, folder)


def test_another_number_of_shards_is_refused(ranks, tmp_path):
    ranks(saves, 2, tmp_path / "saved")
    for kind, text in ranks(loads, 3, tmp_path / "saved"):
        assert kind == "CheckpointError"
        assert "shards" in text


def saves_in_dcp(folder):
    model, registration = inside(FEEDBACK)
    loss_of(model, 0).backward()
    dcp.save({"hook": HookState(registration)}, checkpoint_id=folder)


def loads_from_dcp(folder):
    _, registration = inside(FEEDBACK)
    return error_of(lambda: dcp.load({"hook": HookState(registration, folder)}, checkpoint_id=folder))


def test_a_distributed_checkpoint_of_another_number_of_shards_is_refused_with_the_reason(ranks, tmp_path):
    ranks(saves_in_dcp, 2, tmp_path / "saved")
    for kind, text in ranks(loads_from_dcp, 3, tmp_path / "saved"):
        assert kind == "CheckpointError"
        assert "inside-2-shards" in text
        assert "inside-3-shards" in text


def raising(victim, after, kind=ValueError):
    """A step that goes well, one that fails, and what follows `after`."""
    model, registration = inside(Raises(victim, error=kind), register={"timeout": TIMEOUT})
    native, _ = inside()
    for one in (model, native):
        loss_of(one, 0).backward()
        one.zero_grad()
    began = time.monotonic()
    kind, text = error_of(loss_of(model, 1).backward)
    seconds, counted = time.monotonic() - began, registration.step
    zeros = all(not g.any() for name, g in gradients(model).items() if name.startswith("blocks.0"))
    if after == "swap":
        registration.swap("allreduce")
    else:
        registration = commhub.register(model, "allreduce", timeout=TIMEOUT)
    model.zero_grad()
    found = [Loop(one).run(2) for one in (model, native)]
    return kind, text, seconds < TIMEOUT / 2, counted, registration.step - counted, zeros, found[0][0], found[1][0]


@pytest.mark.parametrize(("victim", "after"), [(0, "swap"), *[(2, "register"), (2, "swap")] * EVERY])
@pytest.mark.parametrize("nproc", [3])
def test_a_hook_that_raises_ends_the_step_on_every_rank_and_fsdp_goes_on(ranks, nproc, victim, after):
    for kind, text, soon, counted, steps, zeros, found, native in ranks(raising, nproc, victim, after):
        assert kind == "HookError"
        assert "no luck today" in text
        assert (soon, counted) == (True, 1)
        assert steps == (2 if after == "swap" else 1)  # registered anew, it counts from 0
        assert zeros
        assert max(float((found[n] - native[n]).abs().max()) for n in found if found[n].numel()) < 1e-5


def a_step_ahead(victim):
    """A step that has ended on all ranks but one, as far as that one knows."""
    model, registration = inside("fp16", register={"timeout": TIMEOUT})
    loss_of(model, 0).backward()
    before = parameters(model)
    if dist.get_rank() == victim:
        engine = registration._session.engine
        engine.step = 0
        engine.fail("the last word was lost")
    with warnings_of_commhub() as said:
        registration.swap("allreduce")
    return "different steps" in said() and "ranks 0, 2 alone" in said(), same([before], [parameters(model)])


def test_shards_of_different_steps_are_told_of_and_left_alone(ranks):
    assert ranks(a_step_ahead, 3, 1) == [(True, True), (False, True), (False, True)]


def interrupted(victim):
    """A Ctrl-C on one rank as it waits for its peers in backward."""
    model, registration = inside("allreduce", register={"timeout": 3.0})
    loss_of(model, 0).backward()
    model.zero_grad()
    waiting = Engine.wait

    def wait(self):
        raise KeyboardInterrupt

    if dist.get_rank() == victim:
        Engine.wait = wait
    began = time.monotonic()
    try:
        loss_of(model, 1).backward()
        told = None
    except BaseException as error:
        told = type(error).__name__
    finally:
        Engine.wait = waiting
    seconds = time.monotonic() - began
    model.zero_grad()
    later = error_of(lambda: loss_of(model, 2).backward())
    return told, seconds, registration.step, later


def test_a_ctrl_c_on_one_rank_is_an_error_on_the_others_and_stays_one(ranks):
    results = ranks(interrupted, 3, 1)
    assert [told == "KeyboardInterrupt" for told, *_ in results] == [False, True, False]
    for told, seconds, steps, later in results:
        assert told in ("KeyboardInterrupt", "HookError", "HookTimeoutError")
        assert seconds < 5
        assert steps == 1
        assert later[0] in ("HookError", "HookTimeoutError")


def killed(victim):
    """A rank dies when its first bucket is on its way."""
    model, _ = inside("fp16", register={"timeout": 5.0})
    loss_of(model, 0).backward()
    model.zero_grad()
    if dist.get_rank() == victim:
        Engine.wait = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    kind, text = error_of(lambda: loss_of(model, 1).backward())
    return kind, text, time.monotonic() - began


@pytest.mark.parametrize("victim", [0, *[2] * EVERY])
def test_a_rank_that_dies_is_an_error_on_the_others(ranks, victim):
    for rank, result in enumerate(ranks.fresh(killed, 3, victim, timeout=60, grace=30)):
        if rank == victim:
            assert result.exitcode == -signal.SIGKILL
            continue
        kind, text, seconds = result.value
        assert kind in ("HookError", "HookTimeoutError", "RuntimeError"), (kind, text)  # FSDP gathers, too
        assert seconds < 12


def skipping(who):
    """The ranks in `who` leave a block out of the second of three steps."""
    model, registration = inside("allreduce", register={"timeout": TIMEOUT})
    found = []
    for step in range(3):
        skip = (0,) if step == 1 and dist.get_rank() in who else ()
        began = time.monotonic()
        found.append((*error_of(loss_of(model, step, skip=skip).backward), time.monotonic() - began < TIMEOUT / 2))
        if found[-1][0]:
            break
        model.zero_grad()
    return found, registration.step


def test_a_layer_that_has_no_part_in_a_step_on_any_rank(ranks):
    assert ranks(skipping, 2, (0, 1)) == [([(None, "", True)] * 3, 3)] * 2


class Widths(nn.Module):
    """Two layers; which of them gets a gradient is said."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(width, 8), nn.Linear(width, 8)

    def forward(self, x, *, which=3):
        return sum(layer(x) for bit, layer in ((1, self.first), (2, self.second)) if which & bit)


def differing(what):
    """Ranks that differ in hook, option, model, or in which gradients there are."""
    odd = dist.get_rank() == 1
    model = fully_shard(Widths(16 if what == "model" and odd else 8))
    hook = "quantize_per_channel"
    if what == "hook" and odd:
        hook = "fp16"
    elif what == "option" and odd:
        hook = "quantize_per_channel(bits=4)"
    began = time.monotonic()
    if not what.endswith("gradients"):
        return *error_of(commhub.register, model, hook, timeout=TIMEOUT), time.monotonic() - began
    commhub.register(model, hook, timeout=TIMEOUT)
    loss = model(torch.ones(2, 8), which=1 if odd else 2 if what == "as many gradients" else 3).sum()
    return *error_of(loss.backward), time.monotonic() - began


@pytest.mark.parametrize("what", ["hook", "option", "model"])
def test_ranks_that_differ_are_told_at_once(ranks, what):
    for kind, text, seconds in ranks(differing, 2, what):
        assert kind == "HookMismatchError", text
        assert seconds < TIMEOUT / 2


@pytest.mark.parametrize("what", ["more gradients", "as many gradients"])
def test_ranks_that_have_different_gradients_are_told_before_anything_is_mixed(ranks, what):
    for kind, text, seconds in ranks(differing, 2, what):
        assert kind == "HookError"
        assert "asks for ReduceScatter" in text
        assert what == "more gradients" or ("first.weight" in text and "second.weight" in text)
        assert seconds < TIMEOUT / 2


def refused(what):
    on = mesh(2) if dist.get_world_size() == 4 else None
    model = shard(Transformer(), on["shard"]) if on else inside()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if what == "both":
        commhub.register(model, "fp16", process_group=on["shard"], timeout=TIMEOUT)
        return error_of(commhub.register, model, "fp16", process_group=on["replicate"], timeout=TIMEOUT)
    given = {"optimizer": optimizer} if what in ("optimizer_overlap", "post_local_sgd") else {}
    return error_of(commhub.register, model, what, timeout=TIMEOUT, **given)


@pytest.mark.parametrize(
    ("what", "nproc", "said"),
    [
        ("powersgd_rank2", 2, ("has no reduce_scatter", 'process_group=mesh["replicate"]')),
        ("optimizer_overlap", 2, ("steps the optimizer",)),
        ("post_local_sgd", 2, ("has no reduce_scatter",)),
        ("periodic", 2, ("has no reduce_scatter",)),
        ("fp16", 4, ("sharded over 2 of 4 ranks", 'process_group=mesh["shard"]')),
        ("both", 4, ("in another place already", "remove()")),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(ranks, what, nproc, said):
    for kind, text in ranks(refused, nproc, what):
        assert kind == "RegistrationError", text
        assert all(some in text for some in said), text


class BringsAnAverager(Raises):
    """Can scatter, and would average parameters."""

    def prepare(self, setup):
        setup.average(Often())


class Often:
    def due(self, step):
        return None

    def reduce(self, bucket):
        yield from ()


def bringing():
    return error_of(commhub.register, inside()[0], BringsAnAverager(0), timeout=TIMEOUT)


def test_a_hook_that_averages_parameters_is_refused(ranks):
    for kind, text in ranks(bringing, 2):
        assert kind == "RegistrationError"
        assert "no two ranks hold the same" in text


def in_shards_of_a_mesh():
    """In place of the reduce-scatter of each shard group by itself, because the user says so."""
    on = mesh(2)
    model, native = (shard(Transformer(), on["shard"]) for _ in range(2))
    with warnings_of_commhub() as said:
        registration = commhub.register(model, "allreduce", process_group=on["shard"], timeout=TIMEOUT)
    return same(Loop(model).run(2), Loop(native).run(2)), registration.step, "averages nothing between" in said()


def test_inside_each_shard_group_of_a_mesh_with_a_warning(ranks):
    assert ranks(in_shards_of_a_mesh, 4) == [(True, 2, rank % 2 == 0) for rank in range(4)]


def scheduled():
    """From fp16 to the plain mean in the third step; what cannot work is refused when it is scheduled."""
    native, _ = inside()
    model, registration = inside("fp16")
    kind, text = error_of(registration.schedule, {2: "powersgd_rank2"})
    registration.schedule({2: "allreduce"})
    hooks, exact = [], []
    for step in range(4):
        for one in (native, model):
            one.zero_grad()
        hooks.append(str(registration))
        for one in (native, model):
            loss_of(one, step).backward()
        exact.append(same([gradients(native)], [gradients(model)]))
    return (kind, "reduce_scatter" in text), hooks, exact


def test_a_schedule(ranks):
    for refusal, hooks, exact in ranks(scheduled, 2):
        assert refusal == ("RegistrationError", True)
        assert [hook.partition("(")[0] for hook in hooks] == ["fp16", "fp16", "allreduce", "allreduce"]
        assert exact == [False, False, True, True]


def narrow():
    """`wire=` under the plain mean."""
    model, registration = inside("allreduce", register={"wire": "bf16"})
    loss_of(model, 0).backward()
    other, plain = inside("bf16")
    loss_of(other, 0).backward()
    return same(
        [gradients(model)], [gradients(other)]
    ), registration.stats.last.sent_bytes == plain.stats.last.sent_bytes


def test_wire_is_the_cast(ranks):
    assert ranks(narrow, 2) == [(True, True)] * 2


def with_rules(hook):
    """What a rule leaves exact comes as native FSDP has it."""
    native, _ = inside()
    model, _ = inside(hook, register={"rules": {"head.*": "dense", "*.norm1.*": "dense"}})
    for one in (native, model):
        loss_of(one, 0).backward()
    found, expected = gradients(model), gradients(native)
    return {name for name in found if torch.equal(found[name], expected[name])}


@pytest.mark.parametrize("hook", ["fp16", FEEDBACK])
def test_rules_leave_parameters_exact(ranks, hook):
    for exact in ranks(with_rules, 2, hook):
        assert exact >= {"head.weight", "blocks.0.norm1.weight", "blocks.1.norm1.bias"}
        assert "blocks.0.linear1.weight" not in exact
