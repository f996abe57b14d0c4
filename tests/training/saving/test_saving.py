"""A save that fails or is killed on any rank, anywhere: the former checkpoint loads, or the new one, as a whole."""

import errno
import io
import itertools
import os
import signal
import time
from pathlib import Path

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal
from commhub.training.saving import _folder
from commhub.training.saving._folder import Folder
from commhub.training.saving._saved import FORMAT

from .comparing import same

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
HOOK = "powersgd(start_step=0, min_compression_rate=0.1)"


def new(timeout=20, hook=HOOK):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    return model, commhub.register(model, hook, timeout=timeout)


def steps(model, count):
    for number in range(count):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
        model(x).square().sum().backward()


def loaded(folder):
    """What a new registration goes on from."""
    _, registration = new()
    registration.load(folder)
    return registration.state_dict()


def names(folder):
    return sorted(name for name in os.listdir(folder))


# A disk that is full.


def full_on_one_rank(folder, monkeypatch):
    model, registration = new()
    steps(model, 2)
    registration.save(folder)
    first = registration.state_dict()
    steps(model, 2)
    save = torch.save

    def fills(state, file):
        save(state, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == 1:
        monkeypatch.setattr(torch, "save", fills)
    with pytest.raises(commhub.CommhubError) as told:
        registration.save(folder)
    monkeypatch.undo()
    assert same(loaded(folder), first)
    steps(model, 1)  # a save that failed is no reason to stop
    registration.save(folder)
    assert same(loaded(folder), registration.state_dict())
    return type(told.value), str(told.value)


def full_with_a_patch(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return full_on_one_rank(folder, monkeypatch)


def test_a_second_save_that_finds_the_disk_full_on_one_rank_leaves_the_first_and_a_third_cleans_up(ranks, tmp_path):
    for kind, text in ranks(full_with_a_patch, 2, tmp_path):
        assert kind is commhub.CheckpointError
        assert "No space left on device" in text
        assert f"{tmp_path}/commhub-rank1-" in text
    assert len(names(tmp_path)) == 3


class Small:
    """A file on a disk that has room for only so many bytes more."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        size = memoryview(data).nbytes
        if size > self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= size
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def test_a_write_that_fails_after_any_number_of_bytes_is_told_as_what_it_is_and_leaves_no_file(tmp_path, monkeypatch):
    whole = Folder(tmp_path).write(0, state(0, 1, 1)).bytes
    before = names(tmp_path)
    path_open = Path.open
    for room in [*range(0, whole, 101), whole - 1]:
        monkeypatch.setattr(Path, "open", lambda path, mode="r", room=room: Small(path_open(path, mode), room))
        with pytest.raises(commhub.CheckpointError, match=r"commhub-rank0-.*could not be written: No space left"):
            Folder(tmp_path).write(0, state(0, 1, 1))
    assert names(tmp_path) == before


# Processes that are killed.


def state(rank, world_size, value):
    table = {"weight": {"residual": torch.full((7,), float(value))}}
    local = {f"rank{rank}": table}
    return {"commhub": FORMAT, "hook": "h", "step": value, "world_size": world_size, "shared": {}, "local": local}


def doom(monkeypatch, number, writes=10):
    """Kill this process before an operation on the file system, the one of this number; in a write, half-way through.

    Of the many writes of a file only some count: the first of so many.
    """
    left = [number]

    def fatal():
        left[0] -= 1
        return left[0] < 0

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        def patched(*args, **options):
            if fatal():
                kill()
            return function(*args, **options)

        return patched

    for place, name in ((os, "mkdir"), (os, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"), (io, "open")):
        monkeypatch.setattr(place, name, before(getattr(place, name)))
    write = _folder._Hashing.write
    written = itertools.count()

    def half(writer, data):
        if next(written) % writes == 0 and fatal():
            writer._file.write(bytes(data)[: len(bytes(data)) // 2])
            writer._file.flush()
            kill()
        return write(writer, data)

    monkeypatch.setattr(_folder._Hashing, "write", half)
    return left


def save_all(folder, world_size, value):
    """What the ranks do to the file system in a save, one after the other."""
    for _ in range(world_size):
        Folder(folder).make()
    Folder(folder).tidy()
    entries = [Folder(folder).write(rank, state(rank, world_size, value)) for rank in range(world_size)]
    Folder(folder).switch("h", value, {"": entries})


def found(folder, world_size):
    parts = [Folder(folder).read(rank, world_size) for rank in range(world_size)]
    values = {part.local["weight"]["residual"][i].item() for part in parts for i in range(7)}
    return {part.step for part in parts} | values


def killed_everywhere(folder, former, latter):
    """Save over a checkpoint, killed at every operation in turn; how many there were."""
    for number in range(1000):
        save_all(folder, former, 1)
        (folder / "rank0.pt").write_text("somebody else's")
        pid = os.fork()
        if pid == 0:
            with pytest.MonkeyPatch.context() as monkeypatch:
                doom(monkeypatch, number, 1 if EVERYTHING else 10)
                save_all(folder, latter, 2)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        manifest = Folder(folder).manifest()
        value = {1: former, 2: latter}
        assert value[manifest.step] == len(manifest.parts[""])
        assert found(folder, len(manifest.parts[""])) == {manifest.step}, number
        if not os.WIFSIGNALED(status):
            assert (os.WEXITSTATUS(status), manifest.step) == (0, 2)
            assert len(names(folder)) == latter + 2
            return number
        save_all(folder, latter, 3)  # cleans up what was left
        assert found(folder, latter) == {3}
        assert len(names(folder)) == latter + 2, names(folder)
        assert (folder / "rank0.pt").read_text() == "somebody else's"
    raise AssertionError("it never ended")


@pytest.mark.parametrize(("former", "latter"), [(2, 2), (3, 1)])
def test_killed_before_any_operation_on_the_file_system_a_save_leaves_the_old_or_the_new_checkpoint(
    ranks, tmp_path, former, latter
):
    [operations] = ranks(killed_everywhere, 1, tmp_path, former, latter, init=False)
    assert operations > (40 if EVERYTHING else 10) * latter


def killed_in_a_save(folder, victim, number):
    model, registration = new()
    steps(model, 2)
    registration.save(folder)
    first = registration.state_dict()
    steps(model, 2)
    torch.save([first, registration.state_dict()], folder / f"expected{dist.get_rank()}")
    registration._session.target = attrs.evolve(
        registration._session.target, timeout=1.0
    )  # how long the survivor waits
    with pytest.MonkeyPatch.context() as monkeypatch:
        left = doom(monkeypatch, number) if dist.get_rank() == victim else [0]
        try:
            registration.save(folder)
        except commhub.CheckpointError as error:
            return str(error)
    return left[0]


def one_of_the_two(folder):
    expected = torch.load(folder / f"expected{dist.get_rank()}")
    mine = loaded(folder)
    return [same(mine, state) for state in expected]


def try_killing(ranks, folder, victim, number):
    """Kill one of two ranks in its second save, and load: whether it was killed, and which checkpoint was found."""
    results = ranks.fresh(killed_in_a_save, 2, folder, victim, number, timeout=60, grace=30)
    survivor = results[1 - victim]
    assert survivor.error is None, survivor.error
    first, second = ranks(one_of_the_two, 2, folder)
    assert first == second
    assert sorted(first) == [False, True]
    if results[victim].exitcode != -signal.SIGKILL:
        return False, first.index(True)
    assert survivor.value == 0 or isinstance(survivor.value, str)
    return True, first.index(True)


@pytest.mark.parametrize(("victim", "number"), [(1, 3)])
def test_a_rank_killed_while_it_writes_is_an_error_on_its_peer_and_the_former_checkpoint_loads(
    ranks, tmp_path, victim, number
):
    assert try_killing(ranks, tmp_path, victim, number) == (True, 0)


@pytest.mark.skipif(not EVERYTHING, reason="a minute: a process group for each operation of each rank")
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_rank_is_killed_before_whichever_operation_either_checkpoint_loads(ranks, tmp_path, victim):
    latest = set()
    for number in range(100):
        folder = tmp_path / str(number)
        killed, which = try_killing(ranks, folder, victim, number)
        latest.add(which)
        if not killed:
            assert which == 1
            break
    assert latest == {0, 1}


# A directory that the ranks do not share; fewer ranks; others' files; what comes before writing.


def unshared(folder):
    _, registration = new()
    with pytest.raises(commhub.CheckpointError) as told:
        registration.save(folder / str(dist.get_rank()))
    return str(told.value)


def test_ranks_that_save_into_directories_of_their_own_are_told_now_and_not_at_the_next_start(ranks, tmp_path):
    for text in ranks(unshared, 2, tmp_path):
        assert "rank 0 does not see it there. Save into a directory that all ranks share." in text


def save_alone(folder):
    model, registration = new()
    steps(model, 3)
    registration.save(folder)
    return registration.state_dict()


def test_fewer_ranks_may_save_where_more_did_and_others_files_stay(ranks, tmp_path):
    for name in ("rank2.pt", "rank2.partial", "commhub-rank1.pt", "commhub-rank0-0123456789abcdef.pt.bak"):
        (tmp_path / name).write_text("somebody else's")
    others = names(tmp_path)
    ranks(save_alone, 3, tmp_path)
    saved = ranks(save_alone, 2, tmp_path)
    assert all(map(same, ranks(loaded, 2, tmp_path), saved))
    assert len(names(tmp_path)) == len(others) + 3
    assert all((tmp_path / name).read_text() == "somebody else's" for name in others)


def average_and_fail(folder):
    """An average is due, which all ranks make in `save`; one of them then has nowhere to write."""
    model, registration = new(timeout=4, hook="periodic(period=1)")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps(model, 1)
    optimizer.step()
    began = time.monotonic()
    with pytest.raises(commhub.CheckpointError, match="is no path of a directory"):
        registration.save(folder if dist.get_rank() == 0 else 7)
    assert time.monotonic() - began < 3
    assert registration.step == 1
    return model.module.weight.detach().clone()


def test_a_rank_that_cannot_save_makes_the_average_that_is_due_first_and_nobody_waits_for_it(ranks, tmp_path):
    first, second = ranks(average_and_fail, 2, tmp_path)
    assert bitwise_equal(first, second)
    assert names(tmp_path) == []


def spoil(registration):
    [table] = [t for t in registration._session.engine.state._store.tables["local"].values() if t]
    table["residual"].view(-1)[3] = torch.nan


def what_would_not_load(folder):
    model, registration = new()
    steps(model, 2)
    registration.save(folder)
    first = registration.state_dict()
    if dist.get_rank() == 1:
        spoil(registration)
    with pytest.raises(commhub.CheckpointError, match="'residual' of parameter 'weight' holds NaN") as told:
        registration.save(folder)
    assert "rank 1" in str(told.value) or dist.get_rank() == 1
    assert same(loaded(folder), first)


def test_a_state_that_could_not_be_loaded_again_is_not_saved_over_one_that_can(ranks, tmp_path):
    ranks(what_would_not_load, 2, tmp_path)
