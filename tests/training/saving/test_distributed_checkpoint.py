"""Hook state through torch.distributed.checkpoint: exact on as many ranks, the mean of residuals on others."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.checkpoint import HookState, _ranks_that_saved


class TopBits:
    """Sends gradients rounded to float16 and keeps the rest; counts in a shared tensor."""

    def prepare(self, setup):
        self.feedback = commhub.toolkit.ErrorFeedback(setup, setup.names)
        self.state = setup.state
        for name in setup.names:
            setup.state.shared(name)["count"] = torch.zeros(1)

    def reduce(self, bucket):
        errors = []
        for i in range(len(bucket.names)):
            values = self.feedback.compensated(bucket, i)
            rounded = values.half().float()
            errors.append(values - rounded)
            values.copy_(rounded)
        yield commhub.AllReduce(bucket.flat)
        for i, name in enumerate(bucket.names):
            self.feedback.keep(bucket, i, errors[i])
            self.state.shared(name)["count"] = self.state.shared(name)["count"] + 1


def build(cap):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(12, 12) for _ in range(5)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=cap)
    return model, commhub.register(model, TopBits())


def run_steps(model, first, count):
    gradients = []
    for step in range(first, first + count):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model.zero_grad()
        model(x).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return gradients


def save(path):
    model, registration = build(0.0005)
    run_steps(model, 0, 4)
    dcp.save({"hook": HookState(registration)}, checkpoint_id=path)
    state = registration.state_dict()
    run_on = run_steps(model, 4, 3)
    return state, run_on


def load(path, **how):
    model, registration = build(0.001)
    dcp.load({"hook": HookState(registration, **how)}, checkpoint_id=path)
    state = registration.state_dict()
    return state, run_steps(model, 4, 3)


def test_a_checkpoint_resumes_bit_for_bit_in_new_processes_with_other_buckets(ranks, tmp_path):
    before = ranks(save, 2, str(tmp_path), fresh=True)
    after = ranks(load, 2, str(tmp_path), fresh=True)
    for rank in range(2):
        saved, loaded = before[rank][0], after[rank][0]
        assert loaded["step"] == saved["step"] == 4
        for name, table in saved["local"][f"rank{rank}"].items():
            assert table["residual"].abs().sum() > 0
            assert torch.equal(loaded["local"][f"rank{rank}"][name]["residual"], table["residual"])
            assert torch.equal(loaded["shared"][name]["count"], saved["shared"][name]["count"])
        for mine, theirs in zip(before[rank][1], after[rank][1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def expect_the_mean(before, after):
    """The residuals of all former ranks together are those of all present ones."""
    assert {state["step"] for state in after} == {4}
    for name in before[0]["shared"]:
        mean, new = (
            sum(state["local"][f"rank{r}"][name]["residual"] for r, state in enumerate(states)) / len(states)
            for states in (before, after)
        )
        assert mean.abs().sum() > 0
        torch.testing.assert_close(new, mean)


@pytest.mark.parametrize(("saved", "here"), [(2, 1), (1, 2), (2, 3), (4, 2), (2, 2)])
def test_the_checkpoint_says_how_many_ranks_saved(ranks, tmp_path, saved, here):
    before = [state for state, _ in ranks(save, saved, str(tmp_path))]
    after = [state for state, _ in ranks(load, here, str(tmp_path), checkpoint_id=tmp_path)]
    expect_the_mean(before, after)


def test_who_has_no_directory_says_how_many_ranks_saved(ranks, tmp_path):
    before = [state for state, _ in ranks(save, 2, str(tmp_path))]
    after = [state for state, _ in ranks(load, 3, str(tmp_path), saved_ranks=2)]
    expect_the_mean(before, after)


def saved_from_what_loads(path):
    _, registration = build(0.001)
    with pytest.raises(
        (commhub.CheckpointError, dcp.api.CheckpointException), match=r"Save with HookState\(registration"
    ):
        dcp.save({"hook": HookState(registration, saved_ranks=5)}, checkpoint_id=path)


def test_what_was_made_to_load_other_ranks_state_is_not_saved(ranks, tmp_path):
    ranks(saved_from_what_loads, 2, str(tmp_path))


def saved_beside_training(path):
    model, registration = build(0.0005)
    run_steps(model, 0, 4)
    state = registration.state_dict()
    writing = dcp.async_save({"hook": HookState(registration)}, checkpoint_id=path)
    run_on = run_steps(model, 4, 3)
    writing.result()
    return state, run_on


def test_what_is_written_beside_training_is_what_was_there_when_it_began(ranks, tmp_path):
    before = ranks(saved_beside_training, 2, str(tmp_path))
    after = ranks(load, 2, str(tmp_path))
    for rank in range(2):
        own = f"rank{rank}"
        for name, table in before[rank][0]["local"][own].items():
            assert torch.equal(after[rank][0]["local"][own][name]["residual"], table["residual"])
        for mine, theirs in zip(before[rank][1], after[rank][1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def two_models(path, saves):
    registrations = []
    for _ in range(2):
        model, registration = build(0.001)
        run_steps(model, 0, 2)
        registrations.append(registration)
    if saves:
        dcp.save({f"hook{i}": HookState(one) for i, one in enumerate(registrations)}, checkpoint_id=path)
    else:
        run_steps(model, 2, 1)
        dcp.load({f"hook{i}": HookState(one, path) for i, one in enumerate(registrations)}, checkpoint_id=path)
    return [one.step for one in registrations]


def test_two_models_in_one_checkpoint_find_their_own(ranks, tmp_path):
    assert ranks(two_models, 2, str(tmp_path), saves=True) == [[2, 2]] * 2
    assert ranks(two_models, 3, str(tmp_path), saves=False) == [[2, 2]] * 3


def test_what_others_saved_piecemeal_is_not_this_registrations(tmp_path):
    """Each of three tensors is there, but all three in no one place."""
    one = {"residual": torch.zeros(1)}
    places = {
        "a": {"local": {"rank0": {"x": one}}},
        "b": {"local": {"rank0": {"y": one, "z": one}, "rank1": {"y": one, "z": one}}},
    }
    dcp.save(places, checkpoint_id=tmp_path, no_dist=True)
    assert _ranks_that_saved(tmp_path, "", ["y.residual", "z.residual"]) == 2
    assert _ranks_that_saved(tmp_path, "", ["x.residual", "y.residual", "z.residual"]) is None


def without_memory(path, saves):
    registration = commhub.register(DistributedDataParallel(torch.nn.Linear(3, 3)), "allreduce")
    if saves:
        dcp.save({"hook": HookState(registration)}, checkpoint_id=path)
    else:
        dcp.load({"hook": HookState(registration, path)}, checkpoint_id=path)


def test_a_hook_that_remembers_nothing_loads_on_any_number_of_ranks(ranks, tmp_path):
    ranks(without_memory, 2, str(tmp_path), saves=True)
    ranks(without_memory, 3, str(tmp_path), saves=False)


def nothing_there(path):
    _, registration = build(0.001)
    with pytest.raises(commhub.CheckpointError, match="no checkpoint of torch"):
        HookState(registration, path).state_dict()
    for wrong in (3, b"x"):
        with pytest.raises(commhub.CheckpointError, match="checkpoint_id is"):
            HookState(registration, wrong)
    with pytest.raises(commhub.CheckpointError, match="both checkpoint_id and saved_ranks"):
        HookState(registration, path, saved_ranks=2)


def test_a_path_without_a_checkpoint_is_told(ranks, tmp_path):
    ranks(nothing_there, 1, str(tmp_path / "none"))


def load_unprepared(path):
    _, registration = build(0.001)
    with pytest.raises((ValueError, dcp.api.CheckpointException)) as told:
        dcp.load({"hook": HookState(registration)}, checkpoint_id=path)
    state = registration.state_dict()
    assert state["step"] == 0
    (mine,) = state["local"].values()
    assert all(not table["residual"].any() for table in mine.values())
    return str(told.value)


@pytest.mark.parametrize(("saved", "here"), [(2, 4), (4, 2)])
def test_a_partial_restore_raises_instead_of_restoring_nothing(ranks, tmp_path, saved, here):
    ranks(save, saved, str(tmp_path))
    for text in ranks(load_unprepared, here, str(tmp_path)):
        assert "rank2" in text or "4 former ranks" in text
