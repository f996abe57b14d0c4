"""Figures go to a logger every so many steps: the means since the time before, in training's thread."""

import contextlib
import gc
import logging
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce, HookOptionError, RegistrationError
from commhub.testing import batches, mlp

NAMES = {
    f"commhub/{name}"
    for name in (
        *("sent_bytes", "logical_bytes", "compression", "step_seconds"),
        *("encode_seconds", "wait_seconds", "decode_seconds", "exposed_seconds"),
    )
}


class Each:
    """Averages parameters after every second step, and nothing of the gradients."""

    def prepare(self, setup):
        self._everyone = setup.partition([range(setup.world_size)])

    def due(self, step):
        return self._everyone if step % 2 else None

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def step(model, number=0):
    model.zero_grad()
    model(*batches(8)(dist.get_rank(), number)).square().mean().backward()


def reported(every):
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "fp16")
    size = 4 * sum(p.numel() for p in model.parameters())
    told, threads, sums = [], set(), []

    def log(figures, at):
        told.append((figures, at))
        threads.add(threading.current_thread())

    undo = registration.report(every, log)
    for number in range(4 * every - 1):
        step(model, number)
        sums.append(registration.stats.last)
    assert [at for _, at in told] == [every, 2 * every, 3 * every]
    assert threads == {threading.current_thread()}
    p = dist.get_world_size()
    for i, (figures, _) in enumerate(told):
        assert set(figures) == NAMES
        assert all(type(value) is float for value in figures.values())
        assert figures["commhub/sent_bytes"] == pytest.approx((p - 1) / p * size)
        assert figures["commhub/compression"] == (2 if p > 1 else 1)
        mine = sums[i * every : (i + 1) * every]
        for name in ("encode_seconds", "wait_seconds", "decode_seconds", "exposed_seconds"):
            wanted = sum(getattr(one, name) for one in mine) / every
            assert figures[f"commhub/{name}"] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        assert figures["commhub/exposed_seconds"] < figures["commhub/step_seconds"]
    undo()
    undo()
    for number in range(every):
        step(model, number)
    assert len(told) == 3
    return True


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_every_so_many_steps_the_means_come_in_the_training_thread(ranks, nproc, every):
    assert all(ranks(reported, nproc, every))


def over_changes(folder):
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce")
    told = []
    registration.report(2, lambda figures, at: told.append((at, figures["commhub/compression"])))
    step(model)
    registration.swap("fp16")
    step(model)
    registration.save(folder)
    registration.schedule({2: "bf16", 4: "allreduce"})
    for _ in range(4):
        step(model)
    registration.load_state_dict(registration.state_dict())
    other = commhub.register(model, "fp16")
    for _ in range(3):
        step(model)
    assert len(told) == 3  # another registration has ended it
    other.report(1, lambda figures, at: told.append((at, figures["commhub/compression"])))
    step(model)
    other.remove()
    for _ in range(2):
        step(model)
    with pytest.raises(RegistrationError, match="removed"):
        other.report()
    return told


def test_reports_stay_over_every_change_of_the_hook_until_the_registration_ends(ranks, tmp_path):
    wanted = [(2, pytest.approx(4 / 3)), (4, 2), (6, 1), (4, 2)]
    assert ranks(over_changes, 2, tmp_path / "hook") == [wanted] * 2


def of_averages():
    module = mlp()
    registration = commhub.manual(module, Each())
    size = 4 * sum(p.numel() for p in module.parameters())
    told = []
    registration.report(2, lambda figures, at: told.append((at, figures["commhub/sent_bytes"] / size)))
    for _ in range(4):
        registration.average()
    return told


def test_averages_count_and_local_steps_too(ranks):
    assert ranks(of_averages, 2) == [[(2, 0.5), (4, 0.5)]] * 2


class Writer:
    """As much of TensorBoard's SummaryWriter as is needed."""

    def __init__(self):
        self.scalars, self.texts = [], []

    def add_scalar(self, name, value, at):
        self.scalars.append((name, value, at))

    def add_text(self, name, text, at):
        self.texts.append((name, text, at))


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def logged():
    logger, lines = logging.getLogger("commhub"), Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield lines.lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


def to_each():
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "fp16")
    writer = Writer()
    registration.report(2, writer)
    registration.report(4, "log")
    with logged() as lines:
        for number in range(4):
            step(model, number)
    registration.swap("bf16")
    step(model)
    step(model)
    assert {(name, at) for name, _, at in writer.scalars} == {(name, at) for name in NAMES for at in (2, 4, 6)}
    assert writer.texts == [("commhub/hook", "fp16", 2), ("commhub/hook", "bf16", 6)]
    (line,) = lines
    return line


def test_a_writer_gets_scalars_and_the_hook_and_the_log_a_line(ranks):
    for line in ranks(to_each, 2):
        assert line.startswith("step 4, fp16: ")
        assert "compression 2.0" in line


def failing():
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce", timeout=20)
    calls = []

    def log(figures, at):
        calls.append(at)
        if dist.get_rank() == 1 and at != 2:
            raise OSError("planned")

    registration.report(1, log)
    with logged() as lines:
        for number in range(8):
            step(model, number)
    assert registration.step == 8
    same = model.module[0].weight.grad.clone()
    dist.broadcast(same, 0)
    assert torch.equal(same, model.module[0].weight.grad)
    return calls, [line for line in lines if "planned" in line]


def test_a_receiver_that_raises_harms_no_exchange_and_is_told_no_more_after_three_times(ranks):
    (calls, lines), (failed, told) = ranks(failing, 2)
    assert (calls, lines) == (list(range(1, 9)), [])
    assert failed == [1, 2, 3, 4, 5]  # the second went well: the three begin anew
    assert len(told) == 4
    assert "nothing more" in told[-1]
    assert not any("nothing more" in line for line in told[:-1])


def stopped():
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce")

    def log(figures, at):
        raise KeyboardInterrupt

    undo = registration.report(1, log)
    with pytest.raises(KeyboardInterrupt):
        step(model)
    undo()
    step(model)
    return registration.step


def test_a_ctrl_c_meanwhile_comes_out(ranks):
    assert ranks(stopped, 1) == [2]


def freed(sort):
    module = mlp()
    model = module if sort == "manual" else DistributedDataParallel(module)
    registration = (commhub.manual if sort == "manual" else commhub.register)(model, "allreduce")
    seen = []

    def log(figures, at, model=model):
        seen.append(model.training)
        if sort == "failing":
            raise ValueError(f"planned {len(seen)}")

    undo = registration.report(1, log)
    del log
    step(model)
    if sort == "manual":
        registration.average()
    assert seen == [True]
    gone = weakref.ref(module)
    del model, module, registration
    for _ in range(3):
        gc.collect()
    undo()
    return gone() is None


def all_freed():
    return {sort: freed(sort) for sort in ("ddp", "manual", "failing")}


def test_a_receiver_that_refers_to_the_model_does_not_keep_it_alive(ranks):
    assert ranks(all_freed, 2) == [{"ddp": True, "manual": True, "failing": True}] * 2


def refused():
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    registration = commhub.register(model, "allreduce")
    told = []
    for every, to in ((0, "log"), (True, "log"), (1.5, "log"), (10, "stdout"), (10, None), (10, Writer), (10, 3)):
        with pytest.raises(HookOptionError, match="give a") as error:
            registration.report(every, to)
        told.append(str(error.value))
    del model
    gc.collect()
    with pytest.raises(RegistrationError, match="is gone"):
        registration.report()
    registration.close()
    return told


def test_what_takes_no_figures_is_refused_at_once(ranks):
    assert len(set(ranks(refused, 1)[0])) == 7
