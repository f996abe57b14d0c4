"""A call that not every rank makes ends in an error that says so, and the next call of all ranks meets again."""

import os
import random
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub._errors import described
from commhub.testing import current

SHORT, LONG = 0.25, 20.0
"""Seconds that a rank waits for its peers: where they do not come, and where they do."""

EVERY = bool(os.environ.get("COMMHUB_EVERY_CHECK"))


def registered(timeout=LONG):
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    return model, commhub.register(model, "allreduce", timeout=timeout)


def both():
    """Two registrations, which meet at the same places: an impatient one and a patient one."""
    _, patient = registered()
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    impatient = commhub.register(model, "allreduce", timeout=LONG)
    impatient._session.target = attrs.evolve(impatient._session.target, timeout=SHORT)
    return patient, impatient


def error_of(function, *args):
    """What was raised, as text, and after how many seconds; nothing raised is an empty text."""
    began = time.monotonic()
    try:
        function(*args)
    except commhub.CommhubError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "", time.monotonic() - began


def together(place):
    current().meet(current().store, place)


def swaps(registration, how_many=3):
    """What went wrong in swaps by all ranks."""
    return [
        text for text, _ in (error_of(registration.swap, hook) for hook in ["fp16", "bf16", "allreduce"][:how_many])
    ]


def alone(folder, who, calls):
    """The ranks in ``who`` call, the others do not; then all swap. Says what each call raised."""
    patient, impatient = both()
    told = []
    for number, call in enumerate(calls):
        if dist.get_rank() in who:
            asked = {"save": (impatient.save, folder), "swap": (impatient.swap, "noop")}[call]
            told.append(error_of(*asked))
        together(number)
    return told, swaps(patient)


@pytest.mark.parametrize(
    ("nproc", "who", "calls"),
    [
        (2, (0,), ("save",)),
        (2, (1,), ("save", "swap", "swap")),
        (3, (1,), ("swap",)),
        (4, (0, 2), ("save",)),
        (4, (1, 3), ("swap",)),
    ],
)
def test_after_calls_of_some_ranks_alone_the_next_call_of_all_meets(ranks, tmp_path, nproc, who, calls):
    missing = [rank for rank in range(nproc) if rank not in who]
    for rank, (told, swapped) in enumerate(ranks(alone, nproc, tmp_path, who, calls)):
        assert swapped == ["", "", ""]
        assert len(told) == (len(calls) if rank in who else 0)
        for call, (text, seconds) in zip(calls, told, strict=False):
            assert text.startswith(("RegistrationError: ", "CheckpointError: "))
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            assert f"{names} did not come to {call} within 0.25 s" in text
            assert seconds < 5


def different(folder):
    """Rank 0 swaps, rank 1 saves; then all swap."""
    _, registration = registered()
    calls = [(registration.swap, "fp16"), (registration.save, folder)]
    told, seconds = error_of(*calls[dist.get_rank() > 0])
    return told, seconds, str(registration), swaps(registration)


@pytest.mark.parametrize("nproc", [2, 3])
def test_ranks_that_call_different_things_are_told_both_at_once(ranks, tmp_path, nproc):
    others = "rank 1" if nproc == 2 else "ranks 1, 2"
    for told, seconds, hook, swapped in ranks(different, nproc, tmp_path):
        assert told.startswith(("RegistrationError: ", "CheckpointError: "))
        assert f"rank 0: swap; {others}: save" in told
        assert seconds < 10
        assert hook == "allreduce"
        assert swapped == ["", "", ""]


class Stubborn:
    """Ends its process in ``prepare`` on one rank, as a call of ``sys.exit`` would."""

    def __init__(self, kind):
        self._kind = kind

    def prepare(self, setup):
        if setup.rank == 1:
            raise self._kind("planned")

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def stop_while_meeting(what, kind):
    _, registration = registered()
    began = time.monotonic()
    try:
        if what == "prepare":
            registration.swap(Stubborn(kind))
        elif what == "choose":
            registration._running.replace(
                lambda: (_ for _ in ()).throw(kind("planned")) if dist.get_rank() else choose_plain()
            )
        else:
            registration.schedule({3: Exits("fp16", kind)})
    except BaseException as error:
        told = described(error)
    return told, time.monotonic() - began, swaps(registration)


class Exits(str):
    """A hook string that ends rank 1's process when it is read."""

    def __new__(cls, text, kind):
        made = super().__new__(cls, text)
        made.kind = kind
        return made

    @property
    def value(self):
        if dist.get_rank() == 1:
            raise self.kind("planned")
        return str.__str__(self)


def choose_plain():
    from commhub.registry._recipe import choose

    return choose("fp16", {})


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Unspeakable])
@pytest.mark.parametrize("what", ["choose", "prepare", "schedule"])
def test_what_ends_a_process_is_told_to_the_peers_and_raised_again(ranks, what, kind):
    first, second = ranks(stop_while_meeting, 2, what, kind)
    own = described(kind("planned"))
    if (what, kind) == ("prepare", Unspeakable):  # which ends no process: it is the hook's error
        own = f"RegistrationError: Stubborn: its prepare raised {own}"
    assert second[0] == own
    assert first[0] == f"RegistrationError: rank 1 could not go on: {second[0]}"
    for _, seconds, swapped in (first, second):
        assert seconds < 10
        assert swapped == ["", "", ""]


def interrupted():
    """Rank 1 is interrupted, in ``choose`` and then while it waits, and its peer comes only later."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    patient, impatient = both()
    told = []
    for number, call in enumerate((lambda: impatient._running.replace(interrupt), lambda: patient.swap("fp16"))):
        if dist.get_rank() == 1:
            began = time.monotonic()
            if number == 1:
                threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                call()
            told.append(time.monotonic() - began)
        together(number)
    signal.signal(signal.SIGINT, former)
    return told, swaps(patient)


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_rank_does_not_wait_long_and_the_next_call_meets(ranks):
    for told, swapped in ranks(interrupted, 2):
        assert all(seconds < 3 for seconds in told)
        assert swapped == ["", "", ""]


def many_meetings(folder, store):
    """Meet 40 times; says how many keys and open files there are, half-way and at the end."""
    mended = pytest.MonkeyPatch()
    mended.setattr("commhub.training.rendezvous._rendezvous._TIDY_EVERY", 8)
    rank, p = current().rank, current().world_size
    base = dist.FileStore(str(folder / "store"), p) if store == "file" else current().connect("group")
    dist.init_process_group("gloo", store=base, rank=rank, world_size=p)
    model, registration = registered()
    mine = dist.distributed_c10d._get_process_group_store(dist.group.WORLD)
    figures = []
    for number in range(1, 41):
        if number % 4 == 0:
            registration.swap("allreduce")
        elif number % 4 == 2:
            registration = commhub.register(model, "allreduce", timeout=LONG)
        else:
            registration.save(folder)
        if number % 20 == 0:
            dist.barrier()
            keys = dist.PrefixStore("commhub", mine).list_keys()
            figures.append((len(keys), len(os.listdir("/proc/self/fd"))))
    model(torch.ones(1, 4)).sum().backward()
    mended.undo()
    return figures, registration.step


@pytest.mark.parametrize("store", ["tcp", *(["file"] if EVERY else [])])
def test_many_meetings_leave_neither_keys_nor_connections_behind(ranks, tmp_path, store):
    for figures, step in ranks(many_meetings, 2, tmp_path, store, init=False):
        assert step == 1
        (keys, files), (keys_later, files_later) = figures
        assert keys_later <= keys + 20
        assert files_later <= files + 6


class Vanishes:
    def prepare(self, setup):
        store = current().store
        if setup.rank < setup.world_size - 1:
            store.set(str(setup.rank), "")
        else:
            store.wait([str(rank) for rank in range(setup.rank)])  # all are connected
            os._exit(3)

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def dies_in_a_meeting():
    _, registration = registered()
    registration._session.target = attrs.evolve(registration._session.target, timeout=1.0)
    return error_of(registration.swap, Vanishes())


def test_a_rank_that_dies_in_a_meeting_is_named_within_the_timeout(ranks):
    first, second, last = ranks.fresh(dies_in_a_meeting, 3, grace=20)
    assert last.exitcode == 3
    for story in (first, second):
        text, seconds = story.value
        assert "rank 2 did not come to swap within 1 s" in text
        assert seconds < 5


def leave_with_the_store(folder):
    """Rank 0 holds the store and ends as soon as it can, while its peer, which has come, is stopped for a while."""
    rank, here = current().rank, current().store
    if rank == 0:
        base = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        here.set("port", str(base.port))
    else:
        base = dist.TCPStore("127.0.0.1", int(here.get("port")), 2, is_master=False)
        here.set("process", str(os.getpid()))
    dist.init_process_group("gloo", store=base, rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    if rank == 0:
        peer = int(here.get("process"))
        time.sleep(0.2)
        os.kill(peer, signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {peer}"])
    told, _ = error_of(commhub.register, model, "fp16" if rank else "nosuchhook")
    if rank == 0:
        os._exit(0)
    Path(folder, "told").write_text(told)


def test_who_holds_the_store_stays_until_its_peer_has_heard_the_verdict(ranks, tmp_path):
    ranks.fresh(leave_with_the_store, 2, tmp_path, init=False, grace=20)
    assert (tmp_path / "told").read_text().startswith("RegistrationError: rank 0 could not go on: UnknownHookError: ")


def be_stopped():
    """Rank 0 holds the store and is stopped before it comes, until all others have given up; what each is told."""
    rank, p, here = current().rank, current().world_size, current().store
    if rank == 0:
        base = dist.TCPStore("127.0.0.1", 0, p, is_master=True, wait_for_workers=False)
        here.set("where", f"{base.port} {os.getpid()}")
    port, holder = map(int, here.get("where").split())
    if rank != 0:
        base = dist.TCPStore("127.0.0.1", port, p, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=base, rank=rank, world_size=p)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    together("made")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.01)  # the signal may find another thread first
    else:
        while Path(f"/proc/{holder}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
    told, _ = error_of(partial(commhub.register, timeout=1.0), model, "fp16")
    if rank != 0 and int(here.add("gave up", 1)) == p - 1:
        os.kill(holder, signal.SIGCONT)
    together("told")
    return told, error_of(partial(commhub.register, timeout=LONG), model, "fp16")[0]


@pytest.mark.parametrize("p", [2, 3])
def test_who_holds_the_store_and_was_stopped_is_told_so(ranks, p):
    (first, after), *others = ranks(be_stopped, p, init=False)
    who = "rank 1" if p == 2 else "ranks 1, 2"
    assert f"Before, {who} had come and given up, since the store did not answer for 1 s: " in first
    assert first.endswith("this rank, rank 0, holds the store, and was stopped or did not run.")
    assert after == ""
    for told, after in others:
        assert told.startswith("RegistrationError: the store, which rank 0 holds, does not answer")
        assert after == ""


def random_calls(folder, seed, rounds):
    """Random calls, some by one rank alone, some late, some that fail, some that differ; after each, all meet."""
    patient, impatient = both()
    rank, p = dist.get_rank(), dist.get_world_size()
    dice, own = random.Random(seed), random.Random(f"{seed} {rank}")
    for number in range(rounds):
        what = dice.choice(["swap", "alone save", "alone swap", "late", "raises", "differ"])
        who, hook = dice.randrange(p), dice.choice(["fp16", "bf16", "allreduce"])
        text, seconds = "", 0.0
        if what == "late":
            time.sleep(own.random() * SHORT)
        if what in {"swap", "late"}:
            text, seconds = error_of(patient.swap, hook)
            assert text == "", what
        elif what.startswith("alone"):
            if rank == who:
                call = (impatient.save, folder) if "save" in what else (impatient.swap, hook)
                text, seconds = error_of(*call)
                assert "did not come" in text
            together(number)
        elif what == "raises":
            text, seconds = error_of(patient.swap, "nosuchhook" if rank == who else hook)
            assert ("UnknownHookError: " if rank == who else f"rank {who} could not go on: ") in text
        else:
            text, seconds = error_of(*((patient.save, folder) if rank == who else (patient.swap, hook)))
            assert f"rank {who}: save" in text
        assert seconds < 10
    assert swaps(patient) == ["", "", ""]


@pytest.mark.parametrize("nproc", [2, 3, 4] if EVERY else [3])
def test_whatever_was_called_in_random_order_the_next_call_meets(ranks, tmp_path, nproc):
    ranks(random_calls, nproc, tmp_path, 7, 100 if EVERY else 5, timeout=300)
