"""Hook state through torch.distributed.checkpoint: exact on as many ranks, the mean of residuals on others."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.checkpoint import HookState


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


def load(path, saved_ranks=None):
    model, registration = build(0.001)
    dcp.load({"hook": HookState(registration, saved_ranks)}, checkpoint_id=path)
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


@pytest.mark.parametrize("nproc", [3, 4])
def test_another_number_of_ranks_keeps_the_mean_of_the_residuals(ranks, tmp_path, nproc):
    before = [state for state, _ in ranks(save, 2, str(tmp_path))]
    after = [state for state, _ in ranks(load, nproc, str(tmp_path), 2)]
    for name in before[0]["shared"]:
        mean = sum(before[r]["local"][f"rank{r}"][name]["residual"] for r in range(2)) / 2
        new = sum(after[r]["local"][f"rank{r}"][name]["residual"] for r in range(nproc)) / nproc
        torch.testing.assert_close(new, mean)


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
