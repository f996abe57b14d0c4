"""Loading what is damaged, or fits one rank and not another: an error that names the file, and nothing has changed."""

import builtins
import json
import os
import random
import time

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.checkpoint import HookState
from commhub.testing import Living, assert_equal_across_ranks, bitwise_equal
from commhub.training.saving import _manifest, _saving
from commhub.training.saving._folder import Folder

from .comparing import same

HOOK = "powersgd(start_step=3, min_compression_rate=0.1)"


def new(hook=HOOK, width=8):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(width, width))
    return model, commhub.register(model, hook, timeout=20)


def steps(model, count, first=0):
    for number in range(first, first + count):
        model.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
        model(x).square().sum().backward()


def refused(registration, function):
    """The error of what must change nothing."""
    before, hook = registration.state_dict(), registration.hook
    with pytest.raises(commhub.CheckpointError) as told:
        function()
    assert same(registration.state_dict(), before)
    assert registration.hook is hook
    return str(told.value)


def train_on(model):
    """The step in which powersgd begins is past; a rank that was ahead would meet others in another collective."""
    steps(model, 5)
    assert_equal_across_ranks([p.grad for p in model.parameters()])


# What fits one rank and not another.


def lacking(state):
    """A state without one of its tables."""
    local = {rank: {} for rank in state["local"]}
    return {**state, "local": local}


def save_a_bad_one(folder, hook=HOOK, bad=1):
    model, registration = new(hook)
    steps(model, 5)
    if dist.get_rank() == bad:
        whole = registration.state_dict()
        registration.state_dict = lambda: lacking(whole)
    registration.save(folder)


def load_a_bad_one(folder):
    save_a_bad_one(folder)
    model, registration = new()
    text = refused(registration, lambda: registration.load(folder))
    train_on(model)
    assert registration.step == 5
    return text


def test_a_table_missing_for_one_rank_keeps_all_ranks_from_loading_and_training_goes_on(ranks, tmp_path):
    own = f"{tmp_path}/commhub-rank1-"
    for text in ranks(load_a_bad_one, 2, tmp_path):
        assert own in text
        assert "'residual' of parameter 'weight' is missing from the saved state" in text


def load_a_bad_one_with_a_schedule(folder):
    save_a_bad_one(folder)
    model, registration = new("allreduce")
    registration.schedule({4: HOOK, 9: "fp16"})
    text = refused(registration, lambda: registration.load(folder))
    assert (str(registration), registration.step) == ("allreduce", 0)
    state = torch.load(next(folder.glob(f"commhub-rank{dist.get_rank()}-*")), weights_only=True)
    assert "weight" in refused(registration, lambda: registration.load_state_dict(state))
    assert (str(registration), registration.step) == ("allreduce", 0)
    steps(model, 4)
    assert registration.name == "powersgd"
    steps(model, 5, first=4)
    assert registration.name == "fp16"
    assert_equal_across_ranks([p.grad for p in model.parameters()])
    return text


def test_with_a_schedule_nothing_is_swapped_where_one_rank_cannot_load(ranks, tmp_path):
    for text in ranks(load_a_bad_one_with_a_schedule, 2, tmp_path):
        assert f"{tmp_path}/commhub-rank1-" in text


def load_on_more_ranks(folder):
    model, registration = new()
    text = refused(registration, lambda: registration.load(folder))
    train_on(model)
    return text


def test_on_another_number_of_ranks_too(ranks, tmp_path):
    ranks(save_a_bad_one, 2, tmp_path)
    for text in ranks(load_on_more_ranks, 3, tmp_path):
        assert f"{tmp_path}/commhub-rank1-" in text
        assert "missing from the saved state" in text


def two_checkpoints(folder):
    mine = folder / str(dist.get_rank())
    for rank in range(2):
        model, registration = new()
        steps(model, 2)
        registration.save(folder / str(rank))
    _, other = new()
    return refused(other, lambda: other.load(mine))


def test_ranks_that_read_different_checkpoints_are_told(ranks, tmp_path):
    for text in ranks(two_checkpoints, 2, tmp_path):
        assert "ranks disagree on checkpoint" in text


def pending(folder):
    """Each rank's weights are of a moment between two averages; an average was due when they were loaded."""
    model, registration = new("periodic(period=2)")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(number):
        steps(model, 1, first=number)
        optimizer.step()

    step(0)
    step(1)
    registration.save(folder)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    step(2)  # after it an average is due
    model.load_state_dict(weights)
    registration.load(folder)
    assert same(dict(model.state_dict()), weights)
    step(2)
    registration.finish()
    return weights["module.weight"], model.module.weight.detach().clone()


def test_an_average_that_is_due_is_not_made_of_weights_that_were_loaded(ranks, tmp_path):
    (a, after), (b, other) = ranks(pending, 2, tmp_path)
    assert not bitwise_equal(a, b)
    assert bitwise_equal(after, other)


# Damage.


def damage_everything(folder):
    """Every damage to one of the files, in one process; what was not found out."""
    model, registration = new()
    steps(model, 4)
    registration.save(folder)
    _, other = new()
    before = other.state_dict()
    [data] = folder.glob("commhub-rank0-*.pt")
    missed = []

    def attempt(path, what, text="", repair=None):
        try:
            other.load(folder)
        except commhub.CheckpointError as error:
            if str(path) not in str(error) or text not in str(error):
                missed.append((what, str(error)))
        except Exception as error:
            missed.append((what, repr(error)))
        else:
            missed.append((what, "it was loaded"))

    def damaged(path, content, what, text=""):
        path.write_bytes(content)
        attempt(path, what, text)

    draw = random.Random(0)
    for path, stride in ((data, 61), (folder / "commhub.json", 7)):
        whole = path.read_bytes()
        for at in range(draw.randrange(stride), len(whole), stride):
            bit = 1 << draw.randrange(8)
            damaged(path, whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :], f"bit {bit} of byte {at}")
        for length in (0, 1, len(whole) // 2, len(whole) - 1, draw.randrange(len(whole))):
            damaged(path, whole[:length], f"{length} bytes of {len(whole)}")
        damaged(path, whole + b"\0", "a byte too many")
        path.unlink()
        path.mkdir()
        attempt(path, "a directory", "it is no file")
        path.rmdir()
        os.mkfifo(path)
        attempt(path, "a pipe", "it is no file")
        path.unlink()
        path.symlink_to(folder / "nowhere")
        attempt(path, "a link to nowhere", "No such file")
        path.unlink()
        path.write_bytes(whole)
        with pytest.MonkeyPatch.context() as monkeypatch:
            opened = os.open

            def closed(name, *args, path=path, opened=opened):
                if str(name) == str(path):
                    raise PermissionError(13, "Permission denied", str(name))
                return opened(name, *args)

            monkeypatch.setattr(os, "open", closed)
            attempt(path, "no permission", "Permission denied")
    manifest = folder / "commhub.json"
    for nonsense in (b"[]", b"3", b"{}", b"null", b"[" * 10**5, b"9" * 5000, b"\xff\xfe", b"{" + b" " * 10**6):
        damaged(manifest, nonsense, nonsense[:10])
    manifest.write_bytes(whole)
    data.unlink()
    attempt(folder, "a file that is gone", f"rank 0's is missing: {data.name}")
    manifest.unlink()
    attempt(folder, "no manifest", "holds no hook state")
    assert same(other.state_dict(), before)
    return missed


def test_whatever_befalls_a_file_the_error_names_it_and_nothing_is_loaded(ranks, tmp_path):
    assert ranks(damage_everything, 1, tmp_path) == [[]]


def signed(folder, content, **entry):
    """A manifest and one file that agree with one another, as who knows the format can make them."""
    folder = Folder(folder)
    folder.make()
    written = folder.write(0, content)
    folder.switch(entry.get("hook", content["hook"]), entry.get("step", content["step"]), {"": [written]})


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return builtins.exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).touch()",)


class Other:
    """Something that is no tensor."""


def change(state, *keys, to):
    key, *rest = keys
    return {**state, key: change(state[key], *rest, to=to) if rest else to}


def contents(state):
    """What a file may hold that is no hook's state, or not this one's, and what is said of it."""
    residual = state["local"]["rank0"]["weight"]["residual"]
    at = "local", "rank0", "weight", "residual"
    nan, inf = residual.clone(), residual.clone()
    nan[1, 2], inf[3, 4] = torch.nan, -torch.inf
    yield change(state, *at, to=nan), "'residual' of parameter 'weight' holds NaN"
    yield change(state, *at, to=inf), "'residual' of parameter 'weight' holds NaN or infinity"
    yield change(state, *at, to=residual.double()), "was saved as (8, 8) torch.float64"
    yield change(state, *at, to=residual[:, :3].clone()), "was saved as (8, 3)"
    yield change(state, *at, to=torch.zeros(1).expand(10**6, 10**6)), "fewer bytes"
    yield change(state, *at, to=torch.zeros(8, 8, device="meta")), "fewer bytes"
    yield change(state, *at, to=torch.zeros(8, 8).to_sparse()), "no plain tensor"
    yield change(state, *at, to=3.0), "is float in the saved state"
    yield change(state, "local", "rank0", "weight", to=[1]), "is list"
    yield change(state, "local", "rank0", to="x"), "rank0 is str"
    yield change(state, "local", to=[]), "local is list"
    yield change(state, "local", to={7: {}}), "holds '7'"
    yield change(state, "local", to={"rank99999999999999999999": {}}), "holds 'rank9999"
    yield change(state, "shared", to=torch.ones(3)), "shared is Tensor"
    yield change(state, "shared", to={"weight": {"x": torch.ones(1)}}), "is "
    yield change(state, "world_size", to=10**15), "the state is of 1000000000000000 ranks"
    for wrong in (0, -1, True, 2.0, "2", None, torch.ones(1)):
        yield change(state, "world_size", to=wrong), "world_size is"
    for wrong in (-1, "3", None, 2.5):
        yield change(state, "step", to=wrong), "step is"
    yield change(state, "hook", to=5), "hook is int"
    yield change(state, "hook", to="fp16"), "the state was saved by fp16"
    yield change(state, "hook", to="powersgd(("), "its hook is 'powersgd(('"
    yield change(state, "hook", to="powersgd(" * 5000), "its hook is"
    yield change(state, "commhub", to=99), "no hook state"
    yield {}, "no hook state"


def wrong_contents(folder):
    model, registration = new()
    steps(model, 4)
    state = registration.state_dict()
    _, other = new()
    missed = []
    for number, (content, text) in enumerate(contents(state)):
        told = [refused(other, lambda content=content: other.load_state_dict(content))]
        told.append(refused(other, lambda content=content: HookState(other).load_state_dict(content)))
        told.append(refused(other, lambda content=content: other.load_state_dict([content])))
        if content:
            place = folder / str(number)
            signed(place, content)
            told.append(refused(other, lambda place=place: other.load(place)))
            if str(place) not in told[-1]:
                missed.append(told[-1])
            told.pop()
        missed += [one for one in told if text not in one]
    for no_state in (None, 3, "state", [None], [], object()):
        refused(other, lambda no_state=no_state: other.load_state_dict(no_state))
    other.load_state_dict(state)
    return missed


def test_a_state_of_wrong_types_numbers_or_values_is_refused_by_name_and_changes_nothing(ranks, tmp_path):
    assert ranks(wrong_contents, 1, tmp_path) == [[]]


def malicious(folder):
    _, registration = new()
    state = registration.state_dict()
    for number, bad in enumerate((Evil(folder / "mark"), Other())):
        signed(folder / str(number), {**state, "extra": bad})
        text = refused(registration, lambda number=number: registration.load(folder / str(number)))
        assert "UnpicklingError" in text
        assert f"{folder}/{number}/commhub-rank0-" in text
    return (folder / "mark").exists()


def test_a_file_that_would_run_code_is_refused_and_does_not(ranks, tmp_path):
    assert ranks(malicious, 1, tmp_path) == [False]


def escaping(folder):
    _, registration = new()
    state = registration.state_dict()
    (folder / "in").mkdir()
    entry = Folder(folder).write(0, state)
    for name in (f"../{entry.file}", str(folder / entry.file), entry.file.replace("rank0", "rank1"), "x"):
        Folder(folder / "in").switch(state["hook"], 0, {"": []})
        body = {"commhub": 1, "hook": state["hook"], "step": 0, "ranks": [{**attrs.asdict(entry), "file": name}]}
        (folder / "in" / "commhub.json").write_text(json.dumps({**body, "checksum": _manifest.checksum(body)}))
        assert "as rank 0's file" in refused(registration, lambda: registration.load(folder / "in"))


def test_a_manifest_names_only_files_of_its_own_directory(ranks, tmp_path):
    ranks(escaping, 1, tmp_path)


# What loading allocates.


def allocated(folder):
    _, registration = new(width=256)
    registration.save(folder)
    state = registration.state_dict()
    with Living() as seen:
        registration._session.engine.state.check("local", state["local"][f"rank{dist.get_rank()}"])
        registration._session.engine.state.check("shared", state["shared"])
    assert seen.peak == 0
    with Living() as seen:
        registration.load_state_dict(state)
    assert seen.peak < 1000, seen.peak
    with Living() as seen:  # which does not see what torch.load reads
        registration.load(folder)
    assert seen.peak < 1000, seen.peak


def test_loading_allocates_what_is_read_and_no_copy_of_it(ranks, tmp_path):
    ranks(allocated, 2, tmp_path)


# Rendezvous.


def absent(folder):
    """One rank's directory cannot be read: its peer is told at once and not after the timeout."""
    model, registration = new()
    steps(model, 1)
    registration.save(folder)
    began = time.monotonic()
    text = refused(registration, lambda: registration.load(folder if dist.get_rank() == 0 else None))
    assert time.monotonic() - began < 5
    return text


def test_a_rank_that_cannot_even_begin_to_load_tells_the_others(ranks, tmp_path):
    first, second = ranks(absent, 2, tmp_path)
    assert "rank 1 could not go on" in first
    assert "is no path of a directory" in first
    assert "is no path of a directory" in second


def test_the_mean_over_former_ranks_leaves_what_it_was_given_as_it_was_and_refuses_what_has_none():
    def state(rank, value):
        local = {f"rank{rank}": {"w": {"r": torch.tensor([value, 1.0]), "n": torch.tensor([5])}}}
        return {"commhub": 1, "hook": "h", "step": 1, "world_size": 3, "shared": {}, "local": local}

    states = [state(rank, value) for rank, value in enumerate((1.0, 2.0, 6.0))]
    part = _saving.select([states[2], states[0], states[1]], 0, 2)
    assert part.local["w"]["r"].tolist() == [3.0, 1.0]
    assert part.local["w"]["n"].tolist() == [5]
    assert [s["local"][f"rank{i}"]["w"]["r"][0].item() for i, s in enumerate(states)] == [1.0, 2.0, 6.0]
    states[1]["local"]["rank1"]["w"]["n"] = torch.tensor([6])
    with pytest.raises(commhub.CheckpointError, match=r"'n' of parameter 'w' is torch.int64 and differs"):
        _saving.select(states, 0, 2)


def go_far_back(folder, far):
    """Gradients of a step, and of the same step after training on and coming back to it, twice over."""
    model, registration = new()
    steps(model, 4)
    registration.save(folder)
    found = []
    for _ in range(3):
        steps(model, far, first=4)
        found.append([p.grad.clone() for p in model.parameters()])
        assert registration.step == 4 + far
        registration.load(folder)
        assert registration.step == 4
    return found


def load_more_often_on_rank_0():
    model, registration = new()
    steps(model, 2)
    saved = registration.state_dict()
    steps(model, 1, first=2)
    for _ in range(3 if dist.get_rank() == 0 else 1):
        registration.load_state_dict(saved)
    steps(model, 2, first=2)
    return registration.step


def test_ranks_may_load_their_own_state_more_or_less_often(ranks):
    assert ranks(load_more_often_on_rank_0, 2) == [4, 4]


@pytest.mark.parametrize("far", [1, 3, 9])
def test_training_goes_back_in_the_same_process_and_on_as_before(ranks, tmp_path, far):
    for once, again, thrice in ranks(go_far_back, 2, tmp_path, far):
        assert all(map(bitwise_equal, once, again))
        assert all(map(bitwise_equal, once, thrice))
