"""Hook state of a model that FSDP2 shards, saved and gone on from: by commhub, and with the model's own in DCP."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import commhub
from commhub.checkpoint import HookState

from .sharding import EVERY, Loop, error_of, loss_of, mesh, parameters, same, sharded

HOOK = "powersgd(rank=2, start_step=0)"


def snapshot(model):
    """The model's parameters on this rank."""
    return {name: tensor.clone() for name, tensor in parameters(model).items()}


def put_back(model, saved):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.to_local().copy_(saved[name])


def resumed(folder, how, hook=HOOK):
    """Three steps, a save, three more; and the three again in another model that loads."""
    on = mesh()
    model, registration = sharded(on, hook)
    loop = Loop(model)
    loop.run(3)
    weights, optimizer = snapshot(model), copy.deepcopy(loop.optimizer.state_dict())
    kept = registration.state_dict()
    if how == "folder":
        registration.save(folder)
    expected = loop.run(3)
    model, registration = sharded(on, hook)
    put_back(model, weights)
    again = Loop(model, step=3)
    again.optimizer.load_state_dict(optimizer)
    if how == "folder":
        registration.load(folder)
    elif how == "dict":
        registration.load_state_dict(kept)
    step = registration.step
    return same(expected, again.run(3)), step


@pytest.mark.parametrize("how", ["folder", "dict"] if EVERY else ["folder"])
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, how):
    assert ranks(resumed, 4, tmp_path / "hook", how) == [(True, 3)] * 4


def test_without_its_state_a_run_would_differ(ranks, tmp_path):
    assert ranks(resumed, 4, tmp_path / "hook", "not at all") == [(False, 0)] * 4


def in_dcp(folder, save):
    """The model, its optimizer and the hook in one checkpoint of torch's."""
    on = mesh()
    model, registration = sharded(on, HOOK)
    loop = Loop(model)
    if save:
        loop.run(3)
    weights, state = get_state_dict(model, loop.optimizer)
    whole = {"model": weights, "optimizer": state, "hook": HookState(registration, None if save else folder)}
    if save:
        dcp.save(whole, checkpoint_id=folder)
    else:
        dcp.load(whole, checkpoint_id=folder)
        set_state_dict(model, loop.optimizer, model_state_dict=weights, optim_state_dict=state)
        loop.step = 3
    return loop.run(2), registration.step


def test_with_the_models_own_sharded_state_in_one_distributed_checkpoint(ranks, tmp_path):
    saved = ranks(in_dcp, 4, tmp_path / "all", True)
    loaded = ranks.fresh(in_dcp, 4, tmp_path / "all", False)
    for (expected, steps), result in zip(saved, loaded, strict=True):
        assert same(expected, result.value[0])
        assert result.value[1] == steps == 5


def saved_by(folder, steps=3):
    model, registration = sharded(mesh(), HOOK)
    Loop(model).run(steps)
    registration.save(folder)
    return {
        name: table["residual"]
        for name, table in registration.state_dict()["local"][f"rank{dist.get_rank() // 2}"].items()
        if "residual" in table
    } or registration.state_dict()["local"]


def loaded_by(folder):
    model, registration = sharded(mesh(), HOOK)
    registration.load(folder)
    loss_of(model, 0).backward()
    return registration.step


def test_another_number_of_replicas_goes_on(ranks, tmp_path):
    ranks(saved_by, 4, tmp_path / "hook")
    assert ranks(loaded_by, 2, tmp_path / "hook") == [4] * 2
    assert ranks(loaded_by, 6, tmp_path / "hook") == [4] * 6


def elsewhere(folder, shards):
    _, registration = sharded(mesh(shards), HOOK, register={"timeout": 20})
    before = registration.state_dict()
    error = error_of(registration.load, folder)
    after = registration.state_dict()
    return (*error, before["step"] == after["step"] == registration.step)


def test_another_number_of_shards_is_refused_on_every_rank(ranks, tmp_path):
    ranks(saved_by, 4, tmp_path / "hook")
    for kind, text, unchanged in ranks(elsewhere, 4, tmp_path / "hook", 4):
        assert (kind, unchanged) == ("CheckpointError", True)
        assert "shard" in text


def wrong_shard():
    """Each rank takes the dict of its neighbour, which keeps the other shard."""
    _, registration = sharded(mesh(), HOOK)
    dicts = [None] * dist.get_world_size()
    dist.all_gather_object(dicts, registration.state_dict())
    return error_of(registration.load_state_dict, dicts[dist.get_rank() ^ 1])


def test_the_state_of_another_shard_is_refused(ranks):
    for rank, (kind, text) in enumerate(ranks(wrong_shard, 4)):
        assert kind == "CheckpointError"
        assert f"shard{1 - rank % 2}-of-2" in text


def half_damaged(folder, victim):
    """One shard's checkpoint is damaged: nothing is changed on any rank."""
    on = mesh()
    model, registration = sharded(on, HOOK, register={"timeout": 20})
    Loop(model).run(2)
    registration.save(folder)
    if dist.get_rank() == 0:
        for file in folder.glob(f"commhub-shard{victim}-of-2-*.pt"):
            file.write_bytes(b"no checkpoint")
    dist.barrier()
    Loop(model).run(1)
    return (*error_of(registration.load, folder), registration.step)


def test_a_damaged_shard_stops_all_ranks(ranks, tmp_path):
    for kind, text, step in ranks(half_damaged, 4, tmp_path / "hook", 1):
        assert (kind, step) == ("CheckpointError", 3)
        assert "Nothing was changed on any rank" in text or ".pt" in text


def scheduled():
    on = mesh()
    model, registration = sharded(on, "allreduce")
    registration.schedule({2: HOOK, 4: "fp16"})
    seen = []
    loop = Loop(model)
    for _ in range(5):
        loop.run(1)
        seen.append(registration.name)
    return seen


def test_a_schedule(ranks):
    assert ranks(scheduled, 4) == [["allreduce", "powersgd", "powersgd", "fp16", "fp16"]] * 4


def unequal_schedules():
    _, registration = sharded(mesh(), "allreduce", register={"timeout": 20})
    return error_of(registration.schedule, {3: "fp16" if dist.get_rank() % 2 else "bf16"})


def test_schedules_that_differ_between_shards_are_refused(ranks):
    for kind, text in ranks(unequal_schedules, 4):
        assert kind == "HookMismatchError"
        assert "schedule" in text


def test_what_register_returns_is_found_and_described(ranks):
    assert ranks(described, 4) == [("powersgd", 0, True)] * 4


def described():
    model, registration = sharded(mesh(), HOOK)
    return registration.name, registration.step, commhub.registration(model) is registration
