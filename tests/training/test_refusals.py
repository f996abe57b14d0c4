"""What users get wrong is refused by name, on all ranks, before anything has changed; who is waited for is said."""

import logging
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import HookError, RegistrationError
from commhub.testing import assert_equal_across_ranks
from commhub.training.rendezvous import _rendezvous


def net():
    torch.manual_seed(0)
    return DistributedDataParallel(torch.nn.Linear(4, 4))


def told(function, *given, **options):
    try:
        function(*given, **options)
    except commhub.CommhubError as error:
        return type(error).__name__, str(error)
    return None


def trains(model):
    model(torch.full((2, 4), 1.0 + dist.get_rank())).sum().backward()
    assert_equal_across_ranks([p.grad for p in model.parameters()])


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, and was never set up as one itself."""

    def __init__(self, inside):
        self.inside = inside


def wrong():
    model = net()
    registration = commhub.register(model, "allreduce", timeout=20)
    inside = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {
        "number": told(commhub.register, model, 7),
        "timeout": told(commhub.register, model, "fp16", timeout=9e9),
        "wrapper": told(commhub.register, model, "optimizer_overlap", optimizer=Wrapper(inside)),
        "needs": told(registration.schedule, {5: "optimizer_overlap"}),
        "nothing": told(registration.load, "/no such directory"),
    }
    trains(model)
    registration.remove()
    found["save"] = told(registration.save, "/tmp")
    found["state_dict"] = told(registration.state_dict)
    trains(model)
    kept = commhub.register(model, "fp16", timeout=20)
    dist.destroy_process_group()
    found["remove"] = told(kept.remove)
    return found


def test_what_is_given_wrongly_is_refused_by_name(ranks):
    for found in ranks(wrong, 2):
        for case, kind, words in (
            ("number", "HookOptionTypeError", "int is no hook"),
            ("timeout", "RegistrationError", "give seconds above 0"),
            ("wrapper", "RegistrationError", "has no step hooks of its own"),
            ("needs", "RegistrationError", "needs optimizer="),
            ("nothing", "CheckpointError", "/no such directory"),
            ("save", "RegistrationError", "was removed"),
            ("state_dict", "RegistrationError", "was removed"),
            ("remove", "RegistrationError", "process group is gone"),
        ):
            assert found[case] is not None, case
            assert found[case][0] == kind, found[case]
            assert words in found[case][1], found[case]


def test_a_simulation_takes_a_bandwidth_as_text_and_refuses_a_flat_list():
    gradients = [[torch.ones(1000)], [torch.ones(1000)]]
    assert commhub.simulate("allreduce", gradients, network="1mbit").seconds == pytest.approx(0.032)
    with pytest.raises(commhub.HookOptionError, match="list"):
        commhub.simulate("allreduce", [torch.ones(4), torch.ones(4)])


class Elsewhere:
    """Yields a collective among a group that its own ``prepare`` never asked for."""

    def reduce(self, bucket):
        group = commhub.Subgroup((0, 1), 77)
        if bucket.rank in group.ranks:
            yield commhub.AllReduce(bucket.flat, group=group)
        else:
            bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def elsewhere():
    model = net()
    registration = commhub.register(model, Elsewhere(), timeout=20)
    with pytest.raises(HookError) as error:
        trains(model)
    registration.swap("allreduce")
    trains(model)
    return str(error.value)


@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_a_group_that_was_never_made_is_refused_with_the_same_words_on_all_ranks(ranks, nproc):
    for text in ranks(elsewhere, nproc):
        assert "yielded AllReduce among" in text


CALLED = "it is to be called on all ranks."


def late(silent):
    kept, _rendezvous.SILENT = _rendezvous.SILENT, silent
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("commhub").addHandler(handler)
    try:
        model = net()
        if dist.get_rank() == 1:
            time.sleep(1.0)
        commhub.register(model, "allreduce", timeout=20)
    finally:
        _rendezvous.SILENT = kept
        logging.getLogger("commhub").removeHandler(handler)
    trains(model)
    return [line for line in lines if "waits for" in line]


def test_who_is_waited_for_is_said_once(ranks):
    first, second, third = ranks(late, 3, 0.2)
    for lines in (first, third):
        assert lines == [f"register waits for rank 1 of 0..2 (0.2 s so far, until 20 s); {CALLED}"]
    assert second == []
    assert ranks(late, 2, 10.0) == [[], []]


def stale(call, folder):
    """Rank 1 alone calls on a registration that another one has replaced."""
    model = net()
    old = commhub.register(model, "allreduce", timeout=30)
    old.schedule({1000: "fp16"})
    new = commhub.register(model, "allreduce", timeout=30)
    new.schedule({1000: "fp16"})
    new.save(folder)
    state = new.state_dict()
    good = {"swap": ["fp16"], "schedule": [{}], "save": [folder], "load": [folder], "load_state_dict": [state]}
    registration, began = old if dist.get_rank() == 1 else new, time.monotonic()
    found = told(getattr(registration, call), *good.get(call, []))
    assert time.monotonic() - began < 5
    trains(model)
    new.swap("fp16")
    trains(model)
    return found


@pytest.mark.parametrize("call", ["swap", "schedule", "remove", "save", "load", "load_state_dict"])
def test_peers_hear_at_once_of_a_call_on_a_removed_registration(ranks, call, tmp_path):
    first, second, third = ranks(stale, 3, call, tmp_path)
    assert second == ("RegistrationError", "this registration was removed. Call commhub.register again.")
    for kind, text in (first, third):
        assert kind == ("CheckpointError" if "load" in call or call == "save" else "RegistrationError")
        assert "rank 1 could not go on: RegistrationError: this registration was removed." in text


def apart():
    """Rank 1 alone calls, and its peers do not."""
    model = net()
    old = commhub.register(model, "allreduce", timeout=1)
    commhub.register(model, "allreduce", timeout=20)
    found = told(old.remove) if dist.get_rank() == 1 else None
    trains(model)
    return found


def test_a_call_on_a_removed_registration_on_one_rank_alone_waits_not_for_long(ranks):
    assert ranks(apart, 2) == [
        None,
        ("RegistrationError", "this registration was removed. Call commhub.register again."),
    ]


class Raises:
    """An averager that cannot begin anew where ``raises`` is set."""

    raises = False

    def due(self, step):
        return None

    def begin(self, parameters):
        if self.raises:
            raise ValueError("cannot begin")

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def swapped_apart():
    model, averager = net(), Raises()
    registration = commhub.register(model, averager, timeout=20)
    trained = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a forward takes all ranks where DDP has yet to lay its buckets out anew
        model(torch.full((2, 4), 1.0 + dist.get_rank())).sum().backward()
        trained.step()
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})  # a new beginning
    averager.raises = dist.get_rank() == 1
    found = told(model, torch.ones(2, 4))
    began = time.monotonic()
    registration.swap("allreduce")
    assert time.monotonic() - began < 5
    assert_equal_across_ranks([p.data for p in model.parameters()])
    trains(model)
    return found


def test_an_averager_that_cannot_begin_is_a_hook_error_and_can_be_swapped(ranks):
    first, second = ranks(swapped_apart, 2)
    assert first is None
    assert second == ("HookError", "Raises: its begin raised ValueError: cannot begin")


def test_registrations_are_refused_alike_without_a_process_group():
    with pytest.raises(RegistrationError, match="process group"):
        commhub.manual(torch.nn.Linear(2, 2), "allreduce")
