"""An average of one shard's parameters that fails, or comes in another place: all ranks of the mesh end alike."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import commhub
from commhub import AllReduce

from .sharding import EVERY, Transformer, error_of, loss_of, mesh, parameters, same, shard
from .test_averagers import adam, by_hand, mean_, trained

TIMEOUT = 10.0


class Faulty:
    """Averages after every other step; on one rank of the world one of its methods raises in the second average."""

    def __init__(self, rank, where):
        self._fails = where if dist.get_rank() == rank else ""

    def prepare(self, setup):
        self._everyone = setup.partition([range(setup.world_size)])

    def due(self, step):
        if self._fails == "due" and step == 2:
            raise ValueError("no luck today")
        return self._everyone if step % 2 == 0 else None

    def begin(self, parameters):
        if self._fails == "begin":
            raise ValueError("no luck today")

    def reduce(self, bucket):
        if self._fails == "reduce" and bucket.step == 2:
            raise ValueError("no luck today")
        bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.float64)))


def failing(victim, where, after):
    """Local steps until the error; then another hook."""
    on = mesh()
    model = shard(Transformer(), on["shard"])
    optimizer = adam(model)
    options = {"process_group": on["replicate"], "optimizer": optimizer, "timeout": TIMEOUT}
    registration = commhub.register(model, Faulty(victim, where), **options)
    kind = None
    for step in range(3):
        began = time.monotonic()
        kind, text = error_of(loss_of(model, step).backward)
        place = "backward"
        if kind is None:
            kind, text = error_of(optimizer.step)
            place = "step"
        seconds = time.monotonic() - began
        optimizer.zero_grad()
        if kind is not None:
            break
    expected = [p.to_local().detach().clone() for p in model.parameters()]
    mean_(expected, on["replicate"].get_group())
    if after == "swap":
        registration.swap("allreduce")
    elif after == "register":
        registration = commhub.register(model, "allreduce", **options)
    else:
        registration.remove()
    found = [p.to_local().detach().clone() for p in model.parameters()]
    even = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    native = shard(Transformer(), on["shard"])
    with torch.no_grad():
        for p, q in zip(native.parameters(), model.parameters(), strict=True):
            p.to_local().copy_(q.to_local())
    goes_on = True
    if after != "remove":
        plain = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, native)]
        goes_on = same(trained(model, plain[0], 2), by_hand(native, plain[1], on, 2, (), exchanged=2))
    return kind, text, (step, place), seconds < TIMEOUT, even and goes_on


WHERE = {"reduce": (2, "step"), "due": (2, "backward"), "begin": (0, "backward")}
CASES = [(3, "reduce", "swap"), (0, "due", "register"), (2, "begin", "remove")]
ALL = [(v, w, a) for v in range(4) for w in WHERE for a in ("swap", "register", "remove")]


@pytest.mark.parametrize(("victim", "where", "after"), ALL if EVERY else CASES)
def test_an_average_that_fails_on_one_rank_is_told_to_all_and_training_goes_on(ranks, victim, where, after):
    step, place = WHERE[where]
    for rank, (kind, text, found, soon, well) in enumerate(ranks(failing, 4, victim, where, after)):
        # The other replica, which takes local steps, hears of it where it meets this one.
        told = place if rank // 2 == victim // 2 else "step"
        assert (kind, found, soon, well) == ("HookError", (step, told), True, True), text
        assert "no luck today" in text


def skipped(who, evaluates, hook="periodic(period=2)"):
    """The ranks in `who` take no step where an average is due: their gradients were not finite."""
    on = mesh()
    model, native = (shard(Transformer(), on["shard"]) for _ in range(2))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, native)]
    commhub.register(model, hook, process_group=on["replicate"], optimizer=optimizers[0], timeout=TIMEOUT)
    group, found = on["replicate"].get_group(), []
    for one, optimizer in zip((model, native), optimizers, strict=True):
        for step in range(4):
            loss_of(one, step).backward()
            if step != 2 or dist.get_rank() not in who:
                optimizer.step()
            optimizer.zero_grad()
            if one is native and step % 2 == 0:
                with torch.no_grad():
                    mean_([p.to_local() for p in native.parameters()], group)
            if dist.get_rank() in evaluates:
                with torch.no_grad():
                    loss_of(one.eval(), step)
                one.train()
        found.append(parameters(one))
    return same([found[0]], [found[1]])


SKIPPED = [((0, 1), ()), ((0, 1, 2, 3), (0, 1)), ((1,), (0, 1)), ((1, 2), (0, 1, 2, 3)), ((1, 2), ())]


@pytest.mark.parametrize(("who", "evaluates"), SKIPPED)
def test_ranks_whose_step_was_skipped_average_in_their_next_forward(ranks, who, evaluates):
    assert ranks(skipped, 4, who, evaluates) == [True] * 4


def moved(shards):
    """An average is due, the step was skipped, and some ranks' parameters are written to past all counts."""
    on = mesh()
    model = shard(Transformer(), on["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    registration = commhub.register(
        model, "periodic(period=2)", process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT
    )
    loss_of(model, 0).backward()
    mine = next(model.parameters()).to_local().detach()
    if on["shard"].get_local_rank() in shards:
        mine.data.add_(1.0 + dist.get_rank())
    began = time.monotonic()
    finished = error_of(registration.finish)[0]
    loss = loss_of(model, 1)
    soon = time.monotonic() - began < TIMEOUT
    alike = []
    for then in (loss.backward, optimizer.step):
        then()
        every = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(every, mine, group=on["replicate"].get_group())
        alike.append(torch.equal(*every))
    waits = alike[0] == (on["shard"].get_local_rank() not in shards)
    return finished, soon, waits, alike[1]


@pytest.mark.parametrize("shards", [(0,), (1,), (0, 1)])
def test_parameters_that_were_moved_on_some_shards_wait_for_the_step_on_all(ranks, shards):
    assert ranks(moved, 4, shards) == [("RegistrationError", True, True, True)] * 4


def moved_since():
    """Ranks of one shard write to their parameters after the last average."""
    on = mesh()
    model = shard(Transformer(), on["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    registration = commhub.register(
        model, "periodic(period=1)", process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT
    )
    trained(model, optimizer, 1)
    mine = next(model.parameters()).to_local().detach()
    if on["shard"].get_local_rank() == 0:
        mine.add_(float(dist.get_rank()))
    began = time.monotonic()
    registration.remove()
    seconds = time.monotonic() - began
    every = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(every, mine, group=on["replicate"].get_group())
    return torch.equal(*every), seconds < TIMEOUT


def test_what_one_shard_has_moved_since_the_last_average_is_averaged_at_the_end(ranks):
    assert ranks(moved_since, 4) == [(True, True)] * 4


def with_a_scaler():
    """Under a loss scaler one replica alone meets an Inf, in rows of one shard."""
    on = mesh()
    model = fully_shard(nn.Linear(16, 8), mesh=on["shard"])
    with torch.no_grad():
        model.weight.to_local().copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(5)))
        model.bias.to_local().zero_()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    registration = commhub.register(
        model, "periodic(period=1)", process_group=on["replicate"], optimizer=optimizer, scaler=scaler, timeout=TIMEOUT
    )
    for step in range(4):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        y = model(x)
        if step == 1 and dist.get_rank() < 2:
            y = y.clone()
            y[:, 0] *= float("inf")
        scaler.scale(y.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    registration.finish()
    mine = model.weight.to_local().detach()
    every = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(every, mine, group=on["replicate"].get_group())
    return torch.equal(*every), bool(mine.isfinite().all()), registration.step


def test_a_loss_scaler_may_skip_the_step_of_one_replica(ranks):
    assert ranks(with_a_scaler, 4) == [(True, True, 4)] * 4


def many_times(rounds, shards):
    """Averaged, swapped and removed again and again, each time as by hand."""
    on = mesh(shards)
    model, native = (shard(Transformer(), on["shard"]) for _ in range(2))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, native)]
    for _ in range(rounds):
        registration = commhub.register(
            model, "periodic(period=2)", process_group=on["replicate"], optimizer=optimizers[0], timeout=30
        )
        expected = by_hand(native, optimizers[1], on, 4, {0, 2, 3}, exchanged=0)
        found = trained(model, optimizers[0], 4)
        registration.swap("allreduce")
        if not (same(found[:7], expected[:7]) and same([parameters(model)], [expected[-1]])):
            return False
        registration.remove()
    return True


@pytest.mark.parametrize(("nproc", "shards"), [(2, 1), (4, 2)] if EVERY else [(4, 2)])
def test_every_time(ranks, nproc, shards):
    assert ranks(many_times, nproc, 40 if EVERY else 3, shards, timeout=300) == [True] * nproc
