"""Anyone's averager: found through its entry point, listed as what it is, chosen by name, alone or inside a hook."""

import json

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.cli import main
from commhub.testing import assert_equal_across_ranks, batches, mlp

NAME = "commhub-now-and-then"
SOURCE = """
    import commhub

    class NowAndThen:
        def __init__(self, period=3):
            if period < 1:
                raise ValueError(f"period is {period!r}; give at least 1.")
            self.period = period

        def prepare(self, setup):
            self.group = setup.partition([range(setup.world_size)])

        def due(self, step):
            return self.group if (step + 1) % self.period == 0 else None

        def reduce(self, bucket):
            bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))

    class LocalSteps:
        def __init__(self, averager="now_and_then"):
            self.averager = commhub.create(averager)

        def prepare(self, setup):
            setup.average(self.averager)

        def reduce(self, bucket):
            yield from ()
"""
PERIOD = {"name": "period", "type": int, "default": 3, "help": "Steps from one average to the next."}
FIELDS = {"factory": "NowAndThen", "summary": "Averages now and then.", "options": [PERIOD]}
LOCAL = {"factory": "LocalSteps", "options": [{"name": "averager", "type": "hook", "default": "now_and_then"}]}


@pytest.fixture
def plugin(temporary_plugin):
    averagers, hooks = {"now_and_then": FIELDS}, {"local_steps": LOCAL}
    return temporary_plugin(NAME, hooks=hooks, averagers=averagers, source=SOURCE)


def test_it_is_listed_as_an_averager(plugin):
    printed = [line.split()[:5] for line in CliRunner().invoke(main, ["list", NAME]).stdout.splitlines()]
    assert printed[1:] == [["local_steps", "hook", NAME, "1.0", "ok"], ["now_and_then", "averager", NAME, "1.0", "ok"]]
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(main, ["list", "--json"]).stdout)}
    assert (rows["now_and_then"]["kind"], rows["now_and_then"]["summary"]) == ("averager", "Averages now and then.")
    described = CliRunner().invoke(main, ["info", "now_and_then"]).stdout
    assert described.startswith(f"now_and_then: averager of {NAME} 1.0, ok")
    assert "period" in described
    assert commhub.info("now_and_then").kind == "averager"


def trained(hook):
    """After which of six steps all ranks hold the same parameters."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    registration = commhub.register(model, hook, optimizer=optimizer, timeout=30)
    equal = []
    for step in range(6):
        optimizer.zero_grad()
        model(*batches(8)(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()
        try:
            assert_equal_across_ranks(dict(model.named_parameters()))
            equal.append(step)
        except AssertionError:
            pass
    return str(registration), type(registration.hook).__name__, equal


def test_it_is_registered_by_name(plugin, ranks):
    assert ranks(trained, 2, "Now-And-Then(period=2)")[0] == ("now_and_then(period=2)", "NowAndThen", [1, 3, 5])


def test_a_hook_finds_it_by_name(plugin, ranks):
    assert ranks(trained, 2, "local_steps")[0] == ("local_steps", "LocalSteps", [2, 5])
    text = "local_steps(averager=now_and_then(period=2))"
    assert ranks(trained, 2, text)[0] == (text, "LocalSteps", [1, 3, 5])


def test_its_bad_options_are_refused_by_name(plugin):
    with pytest.raises(commhub.HookOptionError, match=r"now_and_then \(commhub-now-and-then 1\.0\): period is 0"):
        commhub.create("now_and_then", period=0)
