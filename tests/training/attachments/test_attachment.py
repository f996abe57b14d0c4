"""Whatever has the four members of an attachment feeds an engine; registrations need not know it."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commhub import HookError, RegistrationError
from commhub.protocol._spans import lay_out
from commhub.registry._recipe import choose
from commhub.testing import bitwise_equal
from commhub.training._registration import Registration
from commhub.training._start import start
from commhub.training._target import Target


class Shards:
    """Feeds an engine with a rank's shards, one bucket each, when it is told that they are ready."""

    def __init__(self, shards):
        self.after, self.session = None, None
        self._shards = shards

    def parameters(self):
        return tuple((f"shard{number}", shard) for number, shard in enumerate(self._shards))

    def attach(self, session, owner):
        self.session, self.shown = session, str(owner)

    def detach(self):
        self.session = None
        return False

    def average(self):
        engine = self.session.engine
        engine.begin()
        for name, shard in self.parameters():
            spans = lay_out([name], [shard])
            engine.add(shard.grad.view(-1), [shard], spans, (True,), last=name == "shard1")
        failure = engine.end() or engine.after_step()
        if failure is not None:
            raise failure
        after = None if self.after is None else self.after()
        if after is not None:
            after()


def registered(hook, **more):
    module = nn.Module()
    module.first, module.second = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(4, 16))
    attachment = Shards([module.first, module.second])
    target = Target(
        group=dist.group.WORLD,
        device=torch.device("cpu"),
        module=weakref.ref(module),
        parameters=attachment.parameters(),
        traits={},
        timeout=20.0,
        **more,
    )
    return module, attachment, Registration(start(target, lambda: choose(hook, {})), attachment)


def fill(module, number):
    for parameter in module.parameters():
        parameter.grad = torch.arange(64.0).view(parameter.shape) * (dist.get_rank() + 1) + number


def averaged(module, attachment, number):
    """Whether a step leaves the mean: of i * (rank + 1) + number that is 1.5 i + number on two ranks."""
    fill(module, number)
    attachment.average()
    return all(bitwise_equal(p.grad.view(-1), torch.arange(64.0) * 1.5 + number) for p in module.parameters())


def every_call(folder):
    module, attachment, registration = registered("allreduce")
    seen = []
    registration.observe(lambda bucket, _: seen.append((bucket.step, bucket.names)))
    good = [averaged(module, attachment, 0)]
    shown = [attachment.shown]
    registration.swap("fp16")
    shown.append(attachment.shown)
    registration.schedule({2: "bf16"})
    good.append(averaged(module, attachment, 1))
    shown.append(str(registration))
    registration.save(folder)
    good.append(averaged(module, attachment, 2))
    registration.load(folder)
    steps = registration.step, registration.stats.steps
    registration.remove()
    with pytest.raises(RegistrationError, match="removed"):
        registration.swap("fp16")
    return good, shown, steps, seen, attachment.session


def test_registrations_serve_an_attachment_that_they_do_not_know(ranks, tmp_path):
    buckets = [(step, (f"shard{number}",)) for step in range(3) for number in range(2)]
    for good, shown, steps, seen, session in ranks(every_call, 2, tmp_path / "hook"):
        assert good == [True] * 3
        assert shown == ["allreduce", "fp16", "bf16"]
        assert steps == (2, 3)
        assert sorted(set(seen)) == buckets
        assert session is None


class Fails:
    def reduce(self, bucket):
        if bucket.rank == 1:
            raise ValueError("planned")
        return
        yield


def running():
    for _ in range(2):
        gc.collect()
    return {thread for thread in threading.enumerate() if thread.name == "commhub"}


def freed(hook):
    others = running()
    module, attachment, registration = registered(hook)
    with contextlib.suppress(HookError):
        averaged(module, attachment, 0)
    gone = weakref.ref(module)
    own = len(running() - others)
    del module, attachment, registration
    return own, len(running() - others), gone() is None


def both_freed():
    return [freed("allreduce"), freed(Fails())]


def test_threads_end_when_nothing_holds_the_attachment(ranks):
    assert ranks(both_freed, 2) == [[(1, 0, True)] * 2] * 2
