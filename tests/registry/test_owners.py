"""Frameworks that own their gradients' reduction are known by name, from commhub's own entry points."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.registry import _index, _models, _registry
from commhub.testing import mlp

ROOT = Path(__file__).parents[2]
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"][_models.GROUP]


@pytest.fixture
def own(site):
    """A site with commhub's own entry points, as an installed commhub has them."""
    info = site.path / f"commhub-{commhub.__version__}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: commhub\nVersion: {commhub.__version__}\n")
    lines = "".join(f"{name} = {module}\n" for name, module in POINTS.items())
    info.joinpath("entry_points.txt").write_text(f"[{_models.GROUP}]\n{lines}")
    _registry.refresh()
    return site


def of(full, *bases):
    package, _, name = full.rpartition(".")
    return type(name, bases, {"__module__": package})


Engine = of("deepspeed.runtime.engine.DeepSpeedEngine", torch.nn.Module)
Pipeline = of("deepspeed.runtime.pipe.engine.PipelineEngine", Engine)
Pure = of("torchft.ddp.PureDistributedDataParallel", torch.nn.Module)
Elastic = of("torchft.ddp.DistributedDataParallel", DistributedDataParallel)


def engine(kind=Engine):
    made = kind()
    made.module = mlp()
    return made


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (engine(), "DeepSpeed"),
        (engine(Pipeline), "DeepSpeed"),
        (torch.nn.Sequential(engine()), "DeepSpeed"),
        (engine(Pure), "Manager"),
        (torch.nn.Module.__new__(Elastic), "Manager"),
    ],
)
@pytest.mark.parametrize("call", [commhub.register, commhub.manual])
def test_both_calls_say_who_averages(own, made, words, call):
    if isinstance(made, Elastic):
        torch.nn.Module.__init__(made)
    with pytest.raises(commhub.RegistrationError, match=words) as told:
        call(made, "fp16")
    assert "Wrap it in one" not in str(told.value)
    assert "commhub.manual" not in str(told.value)
    assert not {"deepspeed", "torchft"} & sys.modules.keys()


ADAPTER = """
import commhub

MODELS = (commhub.ModelSpec(type="deepspeed.runtime.engine.DeepSpeedEngine", advice="Ask the adapter."),)
"""


@pytest.mark.parametrize("name", ["aaa-commhub", "zzz-commhub"])
def test_what_an_adapter_says_goes_first(own, name):
    own.add(name, models=(["deepspeed"], ADAPTER))
    for call in (commhub.register, commhub.manual):
        with pytest.raises(commhub.RegistrationError, match=r"Ask the adapter\."):
            call(engine(), "fp16")


def test_an_adapter_that_is_broken_stops_no_other_model(own):
    own.add("zzz-commhub", models=(["torch", "deepspeed"], "raise ValueError"))
    with pytest.raises(commhub.RegistrationError, match="init_process_group"):
        commhub.manual(mlp(), "fp16")
    with pytest.raises(commhub.RegistrationError, match="DeepSpeed"):
        commhub.manual(engine(), "fp16")


def test_whether_it_owns_its_gradients_is_true_or_false():
    with pytest.raises(commhub.HookOptionError, match="owns_gradients is 'yes'"):
        commhub.ModelSpec(type="a.B", advice="Nothing.", owns_gradients="yes")


def test_the_table_loads_no_torch_and_names_what_the_entry_points_name():
    [module] = set(POINTS.values())
    known = "sorted({spec.type.partition('.')[0] for spec in m.MODELS})"
    code = f"import sys, {module} as m; print({known}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sorted(POINTS)} False"


def test_what_is_listed_are_plugins_alone(own):
    own.add("one-hook", "weaving")
    assert [claim.distribution for claim in _index.claims()] == ["one-hook"]
