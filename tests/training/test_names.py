"""A parameter's name is the one that it has in the bare module, whatever wraps a part of it."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import mlp, train
from commhub.training._trained import buffers_of, named


def wrapped(wrap):
    net = mlp([16, 16, 16])
    net[0] = wrap(net[0])
    return net


def test_what_wraps_a_layer_is_in_no_name():
    expected = [name for name, _ in named(mlp([16, 16, 16]))]
    for wrap in (checkpoint_wrapper, torch.compile, lambda layer: checkpoint_wrapper(torch.compile(layer))):
        assert [name for name, _ in named(wrapped(wrap))] == expected


def test_buffers_are_named_in_the_same_way():
    assert [name for name, _ in buffers_of(nn.Sequential(checkpoint_wrapper(nn.BatchNorm1d(3))))] == [
        "0.running_mean",
        "0.running_var",
        "0.num_batches_tracked",
    ]


def test_a_name_that_only_ends_like_a_wrapper_stays():
    net = nn.Module()
    net.my_orig_mod = nn.Linear(2, 2)
    assert [name for name, _ in named(net)] == ["my_orig_mod.weight", "my_orig_mod.bias"]


def resumed():
    options = {"start_step": 0, "min_compression_rate": 1, "rules": {"0.weight": {"rank": 2}}}
    first, second = DistributedDataParallel(wrapped(checkpoint_wrapper)), DistributedDataParallel(mlp([16, 16, 16]))
    saved, anew = (commhub.register(model, "powersgd", **options) for model in (first, second))
    for model in (first, second):
        train(model, 2)
    state = saved.state_dict()
    anew.load_state_dict(state)
    return [sorted(table) for table in (state["shared"], anew.state_dict()["shared"])]


def test_state_that_was_saved_with_activation_checkpointing_loads_without(ranks):
    for with_it, without in ranks(resumed, 2):
        assert with_it == without
        assert with_it
