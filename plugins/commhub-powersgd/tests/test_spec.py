"""The two names, their options, and what a wrong value says."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

import commhub

GRADIENTS = [[torch.ones(40, 30)]]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 0),
        ("rank", -1),
        ("rank", 1.5),
        ("rank", True),
        ("start_step", -1),
        ("start_step", "soon"),
        ("min_compression_rate", 0),
        ("min_compression_rate", -2.0),
        ("error_feedback", 1),
        ("warm_start", "yes"),
        ("seed", 0.5),
        ("batch_same_shapes", 3),
        ("stats_frequency", 0),
    ],
)
def test_a_wrong_value_raises_an_error_that_names_the_option(option, value):
    with pytest.raises(commhub.HookOptionError, match=option):
        commhub.simulate("powersgd", GRADIENTS, **{option: value})


def test_what_pytorch_calls_an_option_is_told_in_its_error():
    theirs = {*inspect.signature(PowerSGDState.__init__).parameters} - {
        "self",
        "process_group",
        "orthogonalization_epsilon",
    }
    ours = {option.name for option in commhub.info("powersgd").spec.options}
    assert len(theirs) > len(ours & theirs) > 0
    for name in theirs - ours:
        with pytest.raises(commhub.HookOptionError, match=f"what is called {name!r} elsewhere is '[a-z_]+' here"):
            commhub.simulate("powersgd", GRADIENTS, **{name: 1})


def test_rank_2_is_a_preset_that_cannot_be_overridden():
    with pytest.raises(commhub.HookOptionError, match="rank is preset to 2"):
        commhub.simulate("powersgd_rank2", GRADIENTS, rank=3)
    hook = commhub.simulate("powersgd_rank2", GRADIENTS).hooks[0]
    assert hook.rank == 2


def test_hook_strings_carry_the_options():
    hook = commhub.simulate(
        "powersgd(rank=4, start_step=0, error_feedback=false, batch_same_shapes=none)", GRADIENTS
    ).hooks[0]
    assert (hook.rank, hook.start_step, hook.error_feedback, hook.batch_same_shapes) == (4, 0, False, None)


def test_the_declared_defaults_are_the_hooks_own():
    from commhub_powersgd import PowerSGD

    made = PowerSGD()
    for option in commhub.info("powersgd").spec.options:
        assert getattr(made, option.name) == option.default
        assert option.help


@pytest.mark.parametrize("name", ["POWER_SGD", "POWER_SGD_RANK2", "powersgd-rank2"])
def test_other_spellings_are_known(name):
    assert commhub.info(name).distribution == "commhub-powersgd"


def test_the_spec_loads_no_torch():
    code = "import sys, commhub_powersgd.spec as s; s.commhub_hooks(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_package_exports_is_there_and_documented():
    import commhub_powersgd

    assert sorted(commhub_powersgd.__all__) == sorted(commhub_powersgd._HOMES)
    for name in commhub_powersgd.__all__:
        exported = getattr(commhub_powersgd, name)
        assert exported.__name__ == name
        assert exported.__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = commhub_powersgd.nonsense
