"""The two names, their options, and what a wrong value says."""

import subprocess
import sys

import pytest
import torch

import commhub

GRADIENTS = [[torch.ones(40, 30)]]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 0),
        ("rank", 1.5),
        ("start_step", -1),
        ("min_compression_rate", 0.0),
        ("error_feedback", 1),
        ("warm_start", "yes"),
        ("num_power_iterations", 0),
        ("seed", 0.5),
        ("stats_frequency", 0),
    ],
)
def test_a_wrong_value_raises_an_error_that_names_the_option(option, value):
    with pytest.raises(commhub.HookOptionError, match=option):
        commhub.simulate("batched_powersgd", GRADIENTS, **{option: value})


def test_rank_2_is_a_preset_that_cannot_be_overridden():
    with pytest.raises(commhub.HookOptionError, match="rank is preset to 2"):
        commhub.simulate("batched_powersgd_rank2", GRADIENTS, rank=3)


def test_the_declared_defaults_are_the_hooks_own():
    from commhub_batched_powersgd import BatchedPowerSGD

    made = BatchedPowerSGD()
    for option in commhub.info("batched_powersgd").spec.options:
        assert getattr(made, option.name) == option.default
        assert option.help


@pytest.mark.parametrize("name", ["BATCHED_POWER_SGD", "BATCHED_POWER_SGD_RANK2", "batched-powersgd-rank2"])
def test_other_spellings_are_known(name):
    assert commhub.info(name).distribution == "commhub-batched-powersgd"


def test_the_spec_loads_no_torch():
    code = "import sys, commhub_batched_powersgd.spec as s; s.commhub_hooks(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_attribute_is_an_attribute_error():
    import commhub_batched_powersgd

    assert commhub_batched_powersgd.BatchedPowerSGD.__name__ == "BatchedPowerSGD"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = commhub_batched_powersgd.nonsense
