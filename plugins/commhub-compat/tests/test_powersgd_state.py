"""PowerSGDState: PyTorch's arguments, defaults and attributes, without its memory."""

import copy
import inspect
import pickle

import commhub_compat as compat
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as theirs
from torch.nn.parallel import DistributedDataParallel

import commhub


def test_arguments_and_their_defaults_are_pytorch_s():
    mine = inspect.signature(compat.PowerSGDState).parameters
    other = inspect.signature(theirs.PowerSGDState).parameters
    assert {name: p.default for name, p in mine.items()} == {name: p.default for name, p in other.items()}


def test_attributes_are_as_given():
    for state in (compat.PowerSGDState, theirs.PowerSGDState):
        made = state(None, 3, 7, 1.5, False, True, 1e-8, 5, 0, True)
        assert made.process_group is None
        assert (made.matrix_approximation_rank, made.start_powerSGD_iter, made.min_compression_rate) == (3, 7, 1.5)
        assert (made.use_error_feedback, made.warm_start, made.orthogonalization_epsilon) == (False, True, 1e-8)
        assert (made.compression_stats_logging_frequency, made.batch_tensors_with_same_shape) == (1, True)
        assert made.iter == 0
        assert made.compression_stats() == (0, 0, 0)


def test_what_is_within_commhub_is_no_attribute_and_the_error_says_where_it_is():
    with pytest.raises(AttributeError, match=r"commhub\.registration\(model\)\.state_dict"):
        _ = compat.PowerSGDState(None).error_dict
    with pytest.raises(AttributeError, match="no attribute 'foo'"):
        _ = compat.PowerSGDState(None).foo


@pytest.mark.parametrize("take", [pickle.dumps, copy.deepcopy], ids=["pickled", "copied"])
def test_it_is_not_saved_and_the_error_says_what_is(take):
    with pytest.raises(commhub.RegistrationError, match=r"save.*\.state_dict\(\)") as caught:
        take(compat.PowerSGDState(None))
    assert isinstance(caught.value, commhub.CommhubError)


@pytest.mark.parametrize("start", [0, 1])
def test_it_may_start_at_once(start):
    with pytest.raises(ValueError, match="start_powerSGD_iter"):
        theirs.PowerSGDState(None, start_powerSGD_iter=start)
    assert compat.PowerSGDState(None, start_powerSGD_iter=start).start_powerSGD_iter == start


def counted(start):
    net = nn.Linear(64, 64, bias=False)
    model = DistributedDataParallel(net)
    state = compat.PowerSGDState(None, 2, start, batch_tensors_with_same_shape=True, random_seed=3)
    model.register_comm_hook(state, compat.powerSGD_hook)
    for step in range(5):
        assert state.iter == step
        model(torch.randn(4, 64)).sum().backward()
    registration = commhub.registration(model)
    assert (registration.options["batch_same_shapes"], registration.options["seed"]) == (True, 3)
    compressed = 5 - start
    assert state.compression_stats() == (16.0, compressed * 4096, compressed * 256)


@pytest.mark.parametrize("start", [0, 2])
def test_it_counts_steps_and_what_was_compressed(ranks, start):
    ranks(counted, 2, start)
