"""Hook state is saved plainly and goes on bit for bit; what does not fit is refused and changes nothing."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce
from commhub.testing import assert_equal_across_ranks, bitwise_equal, mlp, train
from commhub.toolkit._feedback import ErrorFeedback

ONE, MANY = 25.0, 1 / 1024


class Halves:
    """Sends the upper half of each number, with error feedback, and adds all averages up on the side."""

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names)
        self.state = setup.state
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
            self.state.shared(name)["sum"] = torch.zeros(shape, dtype=dtype)

    def reduce(self, bucket):
        values = [self.feedback.compensated(bucket, i) for i in range(len(bucket.names))]
        sent = [v.view(torch.int32).bitwise_and(-65536).view(torch.float32) for v in values]
        errors = [v - s for v, s in zip(values, sent, strict=True)]
        bucket.flat.copy_((yield AllReduce(torch.cat(sent))))
        for i, name in enumerate(bucket.names):
            self.feedback.keep(bucket, i, errors[i])
            self.state.shared(name)["sum"] = self.state.shared(name)["sum"] + bucket.gradients[i]


class _Private(Halves):
    """A class whose name no hook could have."""


def new(hook="Halves", cap=MANY, widths=(16, 16, 16)):
    model = DistributedDataParallel(mlp(widths), bucket_cap_mb=cap)
    return model, commhub.register(model, {"Halves": Halves, "_Private": _Private}[hook]())


def local(state, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return {name: table["residual"] for name, table in state["local"][f"rank{rank}"].items()}


def same(a, b):
    """Whether two nested dicts of tensors, numbers and strings agree bit by bit."""
    if isinstance(a, torch.Tensor):
        return bitwise_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def plain(state, folder):
    model, registration = new()
    train(model, 2)
    state = registration.state_dict()
    path = folder / f"{dist.get_rank()}.pt"
    torch.save(state, path)
    loaded = torch.load(path, weights_only=True)
    assert same(state, loaded)
    assert (state["step"], state["world_size"], state["hook"]) == (2, dist.get_world_size(), "Halves")
    assert list(state["local"]) == [f"rank{dist.get_rank()}"]
    before = torch.load(path, weights_only=True)
    train(model, 1)
    assert same(state, before)  # what was returned is a copy
    assert not same(registration.state_dict(), before)
    registration.load_state_dict(state)
    model(torch.ones(1, 16)).sum().backward()
    assert same(state, before)  # and what was loaded is not taken over
    assert_equal_across_ranks({n: t["sum"] for n, t in state["shared"].items()})


def test_a_state_dict_is_plain_a_copy_and_loads_with_weights_only(ranks, tmp_path):
    ranks(plain, 2, None, tmp_path)


def resume(hook, before, after):
    whole, first = new(hook, before)
    train(whole, 7)
    half, second = new(hook, before)
    train(half, 4)
    state, parameters = second.state_dict(), half.module.state_dict()
    other, third = new(hook, after)
    other.module.load_state_dict(parameters)
    third.load_state_dict(state)
    assert third.step == 4
    assert same(third.state_dict(), state)
    train(other, 3, first_step=4)
    assert same(dict(whole.module.state_dict()), dict(other.module.state_dict()))
    assert same(first.state_dict(), third.state_dict())
    assert all(residual.any() for residual in local(first.state_dict()).values())


@pytest.mark.parametrize(("before", "after"), [(ONE, ONE), (MANY, MANY), (MANY, ONE), (ONE, 1e-6)])
@pytest.mark.parametrize("nproc", [1, 2])
def test_training_goes_on_bit_for_bit_with_other_buckets_too(ranks, nproc, before, after):
    ranks(resume, nproc, "Halves", before, after)


def test_a_hook_object_of_any_class_can_be_resumed(ranks):
    ranks(resume, 2, "_Private", MANY, MANY)


def state_only(cap):
    model, registration = new(cap=MANY)
    train(model, 3)
    state = registration.state_dict()
    _, other = new(cap=cap)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state)
    other.load_state_dict(everyone)  # all ranks' dicts do as well as one's own
    assert same(other.state_dict(), state)


def test_hook_state_is_restored_bit_for_bit_on_any_number_of_ranks(ranks):
    ranks(state_only, 4, ONE)


def wired():
    model = DistributedDataParallel(mlp([16, 16]))
    registration = commhub.register(model, Halves(), wire="bf16")
    train(model, 2)
    state = registration.state_dict()
    _, other = new(widths=(16, 16))
    other.load_state_dict(state)
    assert other.step == 2


def test_a_wire_may_change_between_saving_and_loading(ranks):
    ranks(wired, 2)


def fresh(state, what):
    """The error of loading `state`, which must change nothing."""
    model, registration = what
    before = registration.state_dict()
    try:
        registration.load_state_dict(state)
    except ValueError as error:
        assert same(registration.state_dict(), before)
        train(model, 1)
        return str(error)
    raise AssertionError("no ValueError")


def misfits():
    model, registration = new()
    train(model, 2)
    state, rank = registration.state_dict(), dist.get_rank()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state)
    told = {}
    told["another rank's"] = fresh(everyone[1 - rank], new())
    told["a rank twice"] = fresh([everyone[1 - rank]] * 2, new())
    told["another hook's"] = fresh({**state, "hook": "fp16"}, new())
    told["another shape"] = fresh(state, new(widths=(16, 8, 16)))
    told["another model"] = fresh(state, new(widths=(16, 16)))
    told["a larger model"] = fresh(state, new(widths=(16, 16, 16, 16)))
    told["two moments"] = fresh([everyone[0], {**everyone[1], "step": 7}], new())
    told["nothing"] = fresh([], new())
    told["something else"] = fresh({"weight": torch.ones(1)}, new())
    for key in ("hook", "step", "world_size", "local", "shared"):
        told[f"without {key}"] = fresh({k: v for k, v in state.items() if k != key}, new())
    partial = {**state, "local": {f"rank{rank}": {}}}
    told["partial"] = fresh(partial, new())
    name = next(iter(state["shared"]))
    told["a shared tensor short"] = fresh(
        {**state, "shared": {k: v for k, v in state["shared"].items() if k != name}}, new()
    )
    return told


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(ranks):
    for rank, told in enumerate(ranks(misfits, 2)):
        assert f"rank {rank} of 2" in told["another rank's"]
        assert f"holds rank{1 - rank}" in told["another rank's"]
        assert "saved by fp16; this registration runs Halves" in told["another hook's"]
        assert "was saved as (16,) torch.float32; here it is (8,)" in told["another shape"]
        assert "2.weight" in told["another model"] or "2.bias" in told["another model"]
        assert "missing" in told["a larger model"]
        assert "step is 2 and 7" in told["two moments"]
        assert "no hook state" in told["something else"]


def shrunk(states, by_rank):
    """Load states of another number of ranks."""
    model, registration = new()
    if by_rank:
        return fresh(states[dist.get_rank() % len(states)], (model, registration))
    registration.load_state_dict(states)
    train(model, 1, first_step=50)
    return registration.step


def saved_states(steps):
    model, registration = new()
    train(model, steps)
    return registration.state_dict()


def test_on_another_number_of_ranks_one_dict_alone_is_refused(ranks):
    states = ranks(saved_states, 2, 3)
    for rank, told in enumerate(ranks(shrunk, 3, states, True)):
        assert f"rank {rank} of 3 needs all 2 former ranks'" in told
    assert "holds rank1" in ranks(shrunk, 1, states[1:], True)[0]
    assert ranks(shrunk, 3, states, False) == [4, 4, 4]


def to_folder(folder, steps):
    model, registration = new()
    train(model, steps)
    registration.save(folder)
    return registration.state_dict()


def from_folder(folder, other):
    model, registration = new(cap=ONE)
    registration.load(folder)
    state = registration.state_dict()
    if other is not None:
        registration.save(other)
    train(model, 1, first_step=70)
    assert_equal_across_ranks({n: t["sum"] for n, t in registration.state_dict()["shared"].items()})
    return state


def mean(states):
    return {
        name: sum(local(s, rank)[name].double() for rank, s in enumerate(states)) / len(states)
        for name in local(states[0], 0)
    }


def test_the_mean_of_the_residuals_survives_two_four_and_three_ranks(ranks, tmp_path):
    two = ranks(to_folder, 2, tmp_path / "two", 4)
    four = ranks(from_folder, 4, tmp_path / "two", tmp_path / "four")
    three = ranks(from_folder, 3, tmp_path / "four", None)
    expected = mean(two)
    assert all(value.any() for value in expected.values())
    for states in (four, three):
        for name, value in mean(states).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-9)
        assert all(state["step"] == 4 and same(state["shared"], two[0]["shared"]) for state in states)


def test_save_and_load_go_through_a_directory(ranks, tmp_path):
    saved = ranks(to_folder, 2, tmp_path / "deep" / "er", 3)
    names = sorted(p.name for p in (tmp_path / "deep" / "er").iterdir())
    assert [name[:13] for name in names] == ["commhub-rank0", "commhub-rank1", "commhub.json"]
    loaded = ranks(from_folder, 2, tmp_path / "deep" / "er", tmp_path / "deep" / "er")
    assert all(map(same, saved, loaded))


def broken_folder(folder):
    return fresh_load(folder, new())


def fresh_load(folder, what):
    model, registration = what
    before = registration.state_dict()
    try:
        registration.load(folder)
    except Exception as error:
        assert same(registration.state_dict(), before)
        train(model, 1)
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def test_a_directory_that_lacks_a_rank_or_everything_is_refused_on_all_ranks(ranks, tmp_path):
    ranks(to_folder, 2, tmp_path / "some", 2)
    [lost] = (tmp_path / "some").glob("commhub-rank1-*.pt")
    lost.unlink()
    for nproc in (1, 2):
        for name, text in ranks(broken_folder, nproc, tmp_path / "some"):
            assert name == "CheckpointError"
            assert f"rank 1's is missing: {lost.name}" in text
    for name, text in ranks(broken_folder, 2, tmp_path / "none"):
        assert name == "CheckpointError"
        assert f"{tmp_path / 'none'} holds no hook state" in text


def unreadable(folder):
    return fresh_load(folder / ("some" if dist.get_rank() == 0 else "none"), new())


def test_a_rank_that_cannot_read_keeps_all_from_loading(ranks, tmp_path):
    ranks(to_folder, 2, tmp_path / "some", 2)
    (other, why), (own, _) = ranks(unreadable, 2, tmp_path)
    assert (other, own) == ("CheckpointError", "CheckpointError")
    assert "rank 1" in why
    assert f"{tmp_path / 'none'} holds no hook state" in why


def unwritable(folder):
    _, registration = new()
    mine = folder / "fine" if dist.get_rank() == 0 else folder / "file"
    try:
        registration.save(mine)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_a_rank_that_cannot_write_tells_all(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    (other, why), (own, _) = ranks(unwritable, 2, tmp_path)
    assert (other, own) == ("CheckpointError", "CheckpointError")
    assert "rank 1" in why
    assert f"{tmp_path / 'file'} could not be written: File exists" in why


def nothing_to_keep():
    model = DistributedDataParallel(mlp([16, 16]))
    registration = commhub.register(model, "fp16")
    train(model, 3)
    state = registration.state_dict()
    other = DistributedDataParallel(mlp([16, 16]))
    again = commhub.register(other, "fp16")
    again.load_state_dict(state)
    return again.step, again.stats.steps


def test_a_hook_without_memory_saves_its_step(ranks):
    assert ranks(nothing_to_keep, 2) == [(3, 0), (3, 0)]


def dropped(how):
    model, registration = new()
    train(model, 2)
    residual = weakref.ref(registration._session.engine.state.local("0.weight")["residual"])
    hook = weakref.ref(registration.hook)
    assert residual() is not None
    if how == "swap":
        registration.swap("fp16")
    elif how == "remove":
        registration.remove()
    else:
        registration = commhub.register(model, "fp16")
    gc.collect()
    gone = residual() is None, hook() is None
    if how != "remove":
        assert registration.state_dict()["local"] == {f"rank{dist.get_rank()}": {}}
        assert registration.state_dict()["shared"] == {}
    train(model, 1)
    return gone


@pytest.mark.parametrize("how", ["swap", "remove", "register"])
def test_what_a_hook_remembered_is_freed_when_it_goes(ranks, how):
    assert ranks(dropped, 2, how) == [(True, True)] * 2


SOURCE = """
import torch
from commhub import AllReduce

class Counting:
    def prepare(self, setup):
        self.state = setup.state
        for name in setup.names:
            self.state.shared(name)["count"] = torch.zeros(())

    def reduce(self, bucket):
        for name in bucket.names:
            self.state.shared(name)["count"] = self.state.shared(name)["count"] + 1
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
"""


def count(registration):
    return registration.state_dict()["shared"]["0.weight"]["count"].item()


PLAN = {2: "counting", 5: "fp16"}


def schedule_and_load():
    model = DistributedDataParallel(mlp([16, 16]), bucket_cap_mb=MANY)
    registration = commhub.register(model, "allreduce")
    registration.schedule(PLAN)
    train(model, 4)
    state = registration.state_dict()
    assert (str(registration), count(registration)) == ("counting", 2)

    other = DistributedDataParallel(mlp([16, 16]), bucket_cap_mb=MANY)
    again = commhub.register(other, "allreduce")
    again.schedule(PLAN)
    again.load_state_dict(state)
    assert (str(again), again.step, count(again)) == ("counting", 4, 2)
    train(other, 1)
    assert (str(again), again.step) == ("fp16", 5)
    train(other, 1)
    assert_equal_across_ranks([p.detach() for p in other.parameters()])

    third = DistributedDataParallel(mlp([16, 16]), bucket_cap_mb=MANY)
    wrong = commhub.register(third, "allreduce")
    wrong.schedule(PLAN)
    told = []
    for one in ({**state, "hook": "fp16"}, [] if dist.get_rank() else state):
        try:
            wrong.load_state_dict(one)
        except Exception as error:
            told.append(type(error).__name__)
        assert (str(wrong), wrong.step) == ("allreduce", 0)
    train(third, 2)
    assert str(wrong) == "counting"
    return told


def test_a_schedule_comes_to_where_a_loaded_state_was(ranks, temporary_plugin):
    temporary_plugin("commhub-counting", hooks={"counting": "Counting"}, source=SOURCE)
    first, second = ranks(schedule_and_load, 2)
    assert first == second == ["CheckpointError", "CheckpointError"]
