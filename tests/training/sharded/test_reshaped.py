"""Hook state of a sharded model on other meshes than it was saved on, and in new processes: by commhub and in DCP."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.checkpoint import HookState

from .sharding import EVERY, Loop, Transformer, error_of, gradients, loss_of, mesh, same, sharded

POWER = "powersgd(rank=2, start_step=0)"
QUANTIZE = "quantize_per_channel(error_feedback=true, dense_small=false)"


class Odd(Transformer):
    """Of some parameters the shards differ in size, and of one the last shards have nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 33)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens, skip=()):
        return super().forward(tokens, skip)[..., :32] * self.scale


def trained(hook, steps, shards=2):
    on = mesh(shards)
    model, registration = sharded(on, hook, make=Odd)
    loop = Loop(model)
    loop.run(steps)
    return on, loop, registration


def hooks_state(registration):
    """(step, shared, own) as copies, with the keys of ranks left out."""
    state = copy.deepcopy(registration.state_dict())
    (own,) = state["local"].values()
    return state["step"], state["shared"], own


def dict_of(loop, registration, folder=None):
    return {
        "model": get_model_state_dict(loop.model),
        "optimizer": get_optimizer_state_dict(loop.model, loop.optimizer),
        "hook": HookState(registration, folder),
    }


def whole_model(loop):
    """Every parameter and every moment, with all its shards."""
    state = get_optimizer_state_dict(loop.model, loop.optimizer)["state"]
    tensors = dict(loop.model.named_parameters())
    tensors |= {f"{name} {key}": value for name, table in state.items() for key, value in table.items()}
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in tensors.items()}


def save(folder, hook, how):
    _, loop, registration = trained(hook, 3)
    if how == "folder":
        registration.save(folder)
    else:
        dcp.save(dict_of(loop, registration), checkpoint_id=folder)
    return hooks_state(registration), whole_model(loop)


def load(folder, hook, how):
    """What a mesh of another number of replicas goes on from, and whether they agree after a step."""
    on, loop, registration = trained(hook, 1)
    if how == "folder":
        registration.load(folder)
    else:
        state = dict_of(loop, registration, folder)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(loop.model, state["model"])
        set_optimizer_state_dict(loop.model, loop.optimizer, state["optimizer"])
    found, model = hooks_state(registration), whole_model(loop)
    loop.model.zero_grad()
    loss_of(loop.model, 5).backward()
    every = [None] * dist.get_world_size(on["replicate"].get_group())
    dist.all_gather_object(every, gradients(loop.model), group=on["replicate"].get_group())
    return found, model, all(same([every[0]], [one]) for one in every), registration.step


def assert_equal(found, expected, what, **tolerances):
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[name], value, f"{what} {name}", **tolerances)
        else:
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{what} {n}: {m}", **tolerances)


MESHES = [
    (POWER, "folder", 3),
    (POWER, "dcp", 1),
    *[(hook, how, r) for hook in (POWER, QUANTIZE, "fp16") for how in ("folder", "dcp") for r in (1, 2, 3, 4)] * EVERY,
]


@pytest.mark.parametrize(("hook", "how", "replicas"), dict.fromkeys(MESHES))
def test_another_number_of_replicas_gets_the_mean_of_each_shards_residuals(ranks, tmp_path, hook, how, replicas):
    saved = ranks(save, 4, str(tmp_path / "all"), hook, how)
    loaded = ranks(load, 2 * replicas, str(tmp_path / "all"), hook, how)
    for rank, ((step, shared, own), model, agree, after) in enumerate(loaded):
        former = [state for number, (state, _) in enumerate(saved) if number % 2 == rank % 2]
        assert (step, agree, after) == (3, True, 4)
        assert_equal(shared, former[0][1], "shared", rtol=0, atol=0)
        if replicas == 2:
            assert_equal(own, saved[rank][0][2], "own", rtol=0, atol=0)
        means = {
            name: {key: (former[0][2][name][key].double() + former[1][2][name][key].double()) / 2 for key in table}
            for name, table in former[0][2].items()
        }
        if replicas != 2:
            assert_equal({n: {k: t.double() for k, t in table.items()} for n, table in own.items()}, means, "own")
        assert any(t.abs().max() > 0 for table in means.values() for t in table.values()) == (hook != "fp16")
        if how == "dcp":
            assert_equal(model, saved[0][1], "model", rtol=0, atol=0)


def refused(folder, how, shards):
    """On a mesh of another number of shards, or of none at all: why, and whether anything has changed."""
    if shards:
        _, loop, registration = trained(POWER, 1, shards)
    else:
        model = DistributedDataParallel(Transformer())
        registration, loop = commhub.register(model, POWER), Loop(model)
        loop.run(1)
    before = hooks_state(registration)
    if how == "folder":
        error = error_of(registration.load, folder)
    else:
        hook = HookState(registration, folder)
        error = error_of(dcp.load, {"hook": hook}, checkpoint_id=folder)
    assert_equal(dict(enumerate(hooks_state(registration)[1:])), dict(enumerate(before[1:])), "after")
    return (*error, registration.step)


@pytest.mark.parametrize("how", ["folder", "dcp"])
@pytest.mark.parametrize("shards", [4, *[1, 0] * EVERY])
def test_another_number_of_shards_is_refused_with_the_reason_on_every_rank(ranks, tmp_path, how, shards):
    ranks(save, 4, str(tmp_path / "all"), POWER, how)
    for _, text, step in ranks(refused, 4, str(tmp_path / "all"), how, shards):
        assert "shard0-of-2" in text
        assert (f"of-{shards}" if shards else "not sharded") in text
        assert step == 1


def of_ddp(folder, how, saves):
    model = DistributedDataParallel(Odd())
    registration = commhub.register(model, POWER)
    Loop(model).run(1)
    if how == "folder":
        registration.save(folder)
    else:
        dcp.save({"hook": HookState(registration)}, checkpoint_id=folder)


@pytest.mark.parametrize("how", ["folder", *["dcp"] * EVERY])
def test_the_state_of_a_model_that_is_not_sharded_is_refused(ranks, tmp_path, how):
    ranks(of_ddp, 4, str(tmp_path / "all"), how, True)
    for _, text, step in ranks(refused, 4, str(tmp_path / "all"), how, 2):
        assert "not sharded" in text
        assert step == 1


def saved_twice(folder, shards):
    trained(POWER, 2, shards)[2].save(folder)


def test_a_save_on_another_mesh_replaces_all_of_the_former(ranks, tmp_path):
    ranks(saved_twice, 4, tmp_path, 2)
    (tmp_path / "notes.txt").write_text("somebody else's")
    assert len(list(tmp_path.iterdir())) == 6
    ranks(saved_twice, 4, tmp_path, 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition("-")[0] for name in names] == [*(f"commhub-shard0-of-1-rank{r}" for r in range(4)), "", ""]
    assert ranks(went_on, 4, tmp_path, 1) == [2] * 4


def went_on(folder, shards):
    _, _, registration = trained(POWER, 0, shards)
    registration.load(folder)
    return registration.step


def beside_training(folder, hook):
    """A checkpoint of all there is, written while training goes on."""
    _, loop, registration = trained(hook, 3)
    writing = dcp.async_save(dict_of(loop, registration), checkpoint_id=folder)
    after = loop.run(3)
    writing.result()
    return after, hooks_state(registration)


def in_new_processes(folder, hook, loads=True):
    _, loop, registration = trained(hook, 0)
    if loads:
        loss_of(loop.model, 90).backward()
        loop.optimizer.step()  # moments, which a load fills in
        loop.optimizer.zero_grad()
        state = dict_of(loop, registration)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(loop.model, state["model"])
        set_optimizer_state_dict(loop.model, loop.optimizer, state["optimizer"])
    loop.step = 3
    return loop.run(3), hooks_state(registration)


@pytest.mark.parametrize("hook", [POWER, *[QUANTIZE] * EVERY])
def test_what_was_written_beside_training_goes_on_bit_for_bit_in_new_processes(ranks, tmp_path, hook):
    before = ranks(beside_training, 4, str(tmp_path / "all"), hook)
    after = ranks(in_new_processes, 4, str(tmp_path / "all"), hook, fresh=True)
    for (expected, state), (found, again) in zip(before, after, strict=True):
        assert same(expected, found)
        assert_equal({"shared": again[1], "own": again[2]}, {"shared": state[1], "own": state[2]}, "", rtol=0, atol=0)
        assert again[0] == state[0] == 6
