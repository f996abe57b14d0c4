"""Registering, replacing and removing hooks: together on all ranks, or an error on all of them and no trace."""

import copy
import logging
import pickle
import re
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce, HookMismatchError, HookOptionError, RegistrationError, UnknownHookError
from commhub.testing import (
    assert_equal_across_ranks,
    batches,
    bitwise_equal,
    current,
    mlp,
    temporary_plugin,
    train,
)

MANY = 1 / 1024


def mine(*by_rank):
    """This rank's value."""
    return by_rank[dist.get_rank() % len(by_rank)]


def model(**ddp):
    return DistributedDataParallel(mlp([16] * 4), **{"bucket_cap_mb": MANY, **ddp})


def error_of(action, *args, **kwargs):
    """(type name, message) of what a call raises."""
    try:
        action(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""


class Mean:
    """The plain average, as a hook object with an option."""

    def __init__(self, note=""):
        self.note = note

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def trains_like_ddp(hooked, steps=2):
    """Whether the model's gradients are those of a bare one with the same parameters."""
    bare = model()
    bare.module.load_state_dict(hooked.module.state_dict())
    a, b = train(bare, steps), train(hooked, steps)
    # Buckets of another layout add up in another order; with two ranks that makes no difference.
    same = bitwise_equal if dist.get_world_size() <= 2 else torch.allclose
    return all(same(a.parameters[name], b.parameters[name]) for name in a.parameters)


# Ranks that disagree.


def disagree(what):
    ddp = model(find_unused_parameters=mine(False, True)) if what == "model" else model()
    asked = {
        "hook": (mine("fp16", "bf16"), {}),
        "hook object": (mine(Mean(), "allreduce"), {}),
        "wire": ("allreduce", {"wire": mine("fp16", "bf16")}),
        "wire in the string": ("allreduce(wire=bf16)" if dist.get_rank() else "allreduce", {}),
        "model": ("allreduce", {}),
    }[what]
    started = time.monotonic()
    told = error_of(commhub.register, ddp, asked[0], **asked[1])
    assert time.monotonic() - started < 20
    assert commhub.registration(ddp) is None
    if what == "model":  # DDP itself hangs on what this one is
        ddp = model()
    commhub.register(ddp, "fp16")
    train(ddp, 2)
    assert_equal_across_ranks([p.detach() for p in ddp.parameters()])
    return told


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("hook", [r'hook \(rank 0: "fp16"; rank 1: "bf16"\)']),
        ("hook object", [r'hook \(rank 0: "Mean"; rank 1: "allreduce"\)']),
        ("wire", [r'wire \(rank 0: "fp16"; rank 1: "bf16"\)']),
        ("wire in the string", [r'wire \(rank 0: null; rank 1: "bf16"\)']),
        ("model", [r"find_unused_parameters \(rank 0: false; rank 1: true\)"]),
    ],
)
def test_ranks_that_disagree_are_told_who_wants_what_and_can_agree_afterwards(ranks, what, shown):
    told = ranks(disagree, 2, what)
    assert told[0] == told[1]
    assert told[0][0] == "HookMismatchError"
    for part in shown:
        assert re.search(part, told[0][1])


def disagree_on_option(hook):
    ddp = model()
    told = error_of(commhub.register, ddp, hook, level=mine(1, 2))
    commhub.register(ddp, hook, level=3)
    train(ddp, 1)
    return told, str(commhub.registration(ddp))


LEVELLED = """
from commhub import AllReduce

class Levelled:
    def __init__(self, level=1, inner=None):
        if level < 0:
            raise ValueError("level is below zero")
        self.level = level

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
"""
SPEC = {
    "factory": "Levelled",
    "options": [
        {"name": "level", "type": int, "default": 1, "help": "How high it is."},
        {"name": "inner", "type": "hook", "default": None, "help": "What is inside."},
    ],
}


@pytest.fixture
def levelled(temporary_plugin):
    """A hook with an option, installed for one test."""
    return temporary_plugin("commhub-levelled", hooks={"levelled": SPEC}, source=LEVELLED)


def test_an_option_that_differs_is_named_with_ranks_and_values(ranks, levelled):
    for told, text in ranks(disagree_on_option, 4, "levelled"):
        assert told[0] == "HookMismatchError"
        assert 'option level (ranks 0, 2: "1"; ranks 1, 3: "2")' in told[1]
        assert text == "levelled(level=3)"


def other_versions(folder):
    """Rank 1 has another version of a package that is only named within another hook."""
    rank = dist.get_rank()
    place = Path(folder) / str(rank)
    with temporary_plugin(place, "commhub-inside", hooks={"inside": "Inside"}, source=INSIDE, version=f"1.{rank}"):
        return error_of(commhub.register, model(), "levelled(inner=inside)")


INSIDE = "class Inside:\n    def reduce(self, bucket):\n        return ()"


def test_a_nested_hook_of_another_version_is_named(ranks, levelled, tmp_path):
    for name, text in ranks(other_versions, 2, str(tmp_path)):
        assert name == "HookMismatchError"
        assert 'version of commhub-inside (rank 0: "1.0"; rank 1: "1.1")' in text


def other_core():
    with patch("commhub.training._facts.__version__", mine("0.1.0", "0.1.1")):
        return error_of(commhub.register, model(), "fp16")


def test_another_version_of_the_core_is_named(ranks):
    for name, text in ranks(other_core, 2):
        assert name == "HookMismatchError"
        assert 'version of commhub (rank 0: "0.1.0"; rank 1: "0.1.1")' in text


def unverified():
    ddp = model()
    commhub.register(ddp, mine(Mean(), "allreduce"), verify=False)
    return trains_like_ddp(ddp)


def test_verify_false_lets_ranks_differ_at_their_own_risk(ranks):
    assert ranks(unverified, 2) == [True, True]


def half_verified():
    ddp = model()
    started = time.monotonic()
    told = error_of(commhub.register, ddp, mine("fp16", "bf16"), verify=mine(True, False))
    return told[0], time.monotonic() - started


def test_ranks_that_differ_in_verify_do_not_wait_for_one_another(ranks):
    for name, seconds in ranks(half_verified, 2):
        assert name == "HookMismatchError"
        assert seconds < 10


# What is wrong on one rank.


def fails_on_one(hook, options):
    ddp = model()
    before = set(ddp.__dict__), len(ddp._comm_hooks)
    told = error_of(commhub.register, ddp, mine("allreduce", hook), **mine({}, options))
    assert commhub.registration(ddp) is None
    assert (set(ddp.__dict__), len(ddp._comm_hooks)) == before
    assert trains_like_ddp(ddp)
    commhub.register(ddp, "allreduce")
    assert trains_like_ddp(ddp)
    return told


@pytest.mark.parametrize(
    ("hook", "options", "name", "text"),
    [
        ("no_such_hook", {}, "UnknownHookError", "no_such_hook"),
        ("levelled", {"level": -1}, "HookOptionError", "level is below zero"),
        ("levelled", {"level": "high"}, "HookOptionError", "level"),
        ("levelled", {"lvl": 1}, "HookOptionError", "Did you mean 'level'"),
        ("allreduce", {"wire": "int8"}, "HookOptionError", "wire is 'int8'"),
        ("allreduce", {"timeout": -3}, "RegistrationError", "timeout is -3"),
        ("allreduce", {"timeout": "soon"}, "RegistrationError", "timeout is 'soon'"),
        ("allreduce", {"optimizer": "sgd"}, "RegistrationError", "optimizer is str"),
        ("allreduce", {"verify": "yes"}, "RegistrationError", "verify is 'yes'"),
        ("allreduce(wire=bf16)", {"wire": "fp16"}, "HookOptionError", "Give it once"),
        ("allreduce(timeout=3)", {}, "HookOptionError", "'timeout' cannot stand in a hook string"),
    ],
    ids=str,
)
def test_what_fails_on_one_rank_raises_on_all_and_leaves_no_trace(ranks, levelled, hook, options, name, text):
    other, own = ranks(fails_on_one, 2, hook, options)
    assert own[0] == name
    assert text in own[1]
    assert other[0] == "RegistrationError"
    assert "rank 1" in other[1]
    assert text in other[1]


class Unprepared(Mean):
    """Cannot get ready on one rank, after having made groups."""

    def prepare(self, setup):
        setup.partition([[rank] for rank in range(setup.world_size)])
        if setup.rank == 1:
            raise OSError("no room here")


def fails_in_prepare():
    ddp = model()
    told = error_of(commhub.register, ddp, Unprepared())
    assert commhub.registration(ddp) is None
    assert not ddp._comm_hooks
    assert trains_like_ddp(ddp)
    registration = commhub.register(ddp, "allreduce")
    assert error_of(registration.swap, Unprepared()) == told
    assert str(registration) == "allreduce"
    assert trains_like_ddp(ddp)
    return told


def test_a_hook_that_cannot_prepare_on_one_rank_is_registered_on_none(ranks):
    first, second, third = ranks(fails_in_prepare, 3)
    own = "Unprepared: its prepare raised OSError: no room here"
    assert first == third == ("RegistrationError", f"rank 1 could not go on: RegistrationError: {own}")
    assert second == ("RegistrationError", own)


def fails_when_there_is_one_already():
    ddp = model()
    first = commhub.register(ddp, "allreduce")
    train(ddp, 1)
    told = error_of(commhub.register, ddp, mine("fp16", "nonsense"))
    swapped = error_of(first.swap, mine("fp16", "nonsense"))
    assert commhub.registration(ddp) is first
    assert (str(first), first.step) == ("allreduce", 1)
    assert trains_like_ddp(ddp)
    assert first.step == 3
    return told[0], swapped[0]


def test_a_registration_or_swap_that_fails_leaves_the_former_hook_at_work(ranks):
    failed = ("RegistrationError",) * 2, ("UnknownHookError",) * 2
    assert tuple(ranks(fails_when_there_is_one_already, 2)) == failed


def late(who):
    ddp, store = model(), current().store
    if dist.get_rank() == who:
        store.wait([f"rank {rank} gave up" for rank in range(3) if rank != who])
        return None, "", 0.0
    started = time.monotonic()
    told = error_of(commhub.register, ddp, "allreduce", timeout=1)
    seconds = time.monotonic() - started
    store.set(f"rank {dist.get_rank()} gave up", "")
    return *told, seconds


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_does_not_come_is_named_within_the_timeout(ranks, who):
    results = ranks(late, 3, who, fresh=True)
    for rank in {0, 1, 2} - {who}:
        name, text, seconds = results[rank]
        assert name == "RegistrationError"
        assert f"rank {who}" in text
        assert seconds < 8  # a second for the timeout, and a busy machine's delay


# Models that cannot be served.


def refusals():
    linear = nn.Linear(2, 2)
    told = {"not DDP": error_of(commhub.register, linear, "allreduce")}
    told["nothing"] = error_of(commhub.register, None, "allreduce")

    taken = model()
    taken.register_comm_hook(None, foreign)
    told["foreign hook"] = error_of(commhub.register, taken, "allreduce")

    builtin = model()
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    told["builtin hook"] = error_of(commhub.register, builtin, "allreduce")

    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        python = model()
    told["python reducer"] = error_of(commhub.register, python, "allreduce")

    two = nn.ModuleList([model(), model()])
    told["two"] = error_of(commhub.register, two, "allreduce")
    told["a class"] = error_of(commhub.register, model(), Mean)
    told["a number"] = error_of(commhub.register, model(), 3)
    told["option of an object"] = error_of(commhub.register, model(), Mean(), level=2)
    return told


def foreign(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_a_model_or_hook_that_cannot_be_served_is_refused_with_the_reason(ranks):
    for told in ranks(refusals, 2):
        for case, name, text in [
            ("not DDP", "RegistrationError", "commhub.manual"),
            ("nothing", "RegistrationError", "NoneType is no DistributedDataParallel"),
            ("foreign hook", "RegistrationError", "'foreign'"),
            ("python reducer", "RegistrationError", "python reducer"),
            ("two", "RegistrationError", "2 DDP models"),
            ("builtin hook", "RegistrationError", "already has the communication hook"),
            ("a class", "HookOptionTypeError", "the class Mean is no hook"),
            ("a number", "HookOptionTypeError", "int is no hook"),
            ("option of an object", "HookOptionError", "takes no options here"),
        ]:
            assert told[case][0] == name, (case, told[case])
            assert text in told[case][1], (case, told[case])


def mixed_on_the_host():
    ddp = model()
    ddp.mixed_precision = object()  # DDP builds such a model on an accelerator only
    return error_of(commhub.register, ddp, "allreduce")


def test_mixed_precision_is_refused_with_the_reason(ranks):
    for name, text in ranks(mixed_on_the_host, 2):
        assert name == "RegistrationError"
        assert "mixed_precision" in text


def test_errors_before_any_group_name_what_to_do():
    with pytest.raises(RegistrationError, match=r"commhub\.manual\(module, hook\)"):
        commhub.register(nn.Linear(2, 2), "allreduce")
    with pytest.raises(RegistrationError):
        commhub.registration(nn.Linear(2, 2))
    with pytest.raises(UnknownHookError):
        commhub.create("no_such_hook")
    with pytest.raises(HookOptionError, match="belongs to register"):
        commhub.create("allreduce(wire=fp16)")


def test_what_register_would_be_given_is_checked_without_a_model():
    assert commhub.checked("PowerSGD(wire=bf16)", rank=3, timeout=5.0, verify=False).made[1].rank == 3
    mine = Mean()
    assert commhub.checked(mine, wire="fp16").made == ("Mean", mine)
    with pytest.raises(UnknownHookError, match="Did you mean 'powersgd'"):
        commhub.checked("powersdg")
    with pytest.raises(HookOptionError, match="rank is 0"):
        commhub.checked("powersgd", rank=0)
    with pytest.raises(HookOptionError, match="wire is 'int3'"):
        commhub.checked("fp16", wire="int3")
    with pytest.raises(HookOptionError, match="'timeout' cannot stand in a hook string"):
        commhub.checked("allreduce(timeout=3)")
    with pytest.raises(RegistrationError, match="timeout is -1"):
        commhub.checked("fp16", timeout=-1)
    with pytest.raises(RegistrationError, match="verify is 'maybe'"):
        commhub.checked("fp16", verify="maybe")
    with pytest.raises(HookOptionError, match="process_group is 3"):
        commhub.checked("fp16", process_group=3)
    with pytest.raises(RegistrationError, match="optimizer is int"):
        commhub.checked("optimizer_overlap", optimizer=3)
    with pytest.raises(RegistrationError, match="scaler is 3"):
        commhub.checked("fp16", scaler=3)
    commhub.checked("fp16", process_group=None, timeout=None, optimizer=None, scaler=None, verify=True)


# A registration's life.


def life():
    ddp = model()
    assert commhub.registration(ddp) is None
    first = commhub.register(ddp, "ALLREDUCE", wire=torch.bfloat16)
    assert commhub.registration(ddp) is first
    assert (str(first), first.name, first.step, dict(first.options)) == ("allreduce(wire=bf16)", "allreduce", 0, {})
    assert "allreduce" in repr(first)
    assert ddp._get_ddp_logging_data()["comm_hook"] == "allreduce(wire=bf16)"
    assert type(first.hook).__name__ == "Allreduce"
    train(ddp, 2)
    second = commhub.register(ddp, commhub.HookType.FP16)
    assert commhub.registration(ddp) is second
    assert (str(second), second.step, first.step) == ("fp16", 0, 2)
    for action in (first.remove, lambda: first.swap("bf16"), lambda: first.schedule({5: "bf16"})):
        assert error_of(action)[0] == "RegistrationError"
    assert ddp._get_ddp_logging_data()["comm_hook"] == "fp16"
    train(ddp, 3)
    second.swap("allreduce")
    assert (str(second), second.step, second.stats.steps) == ("allreduce", 3, 3)
    assert ddp._get_ddp_logging_data()["comm_hook"] == "allreduce"
    assert trains_like_ddp(ddp)
    second.swap("fp16")
    second.remove()
    assert commhub.registration(ddp) is None
    assert "removed" in error_of(second.remove)[1]
    assert trains_like_ddp(ddp)
    third = commhub.HookType.BF16(ddp)
    assert (str(third), third.step) == ("bf16", 0)
    train(ddp, 1)
    assert_equal_across_ranks([p.detach() for p in ddp.parameters()])


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_a_hook_is_registered_replaced_swapped_removed_and_registered_again(ranks, nproc):
    ranks(life, nproc)


def objects():
    ddp = model()
    registration = commhub.register(ddp, hook := Mean())
    assert registration.hook is hook
    assert (str(registration), registration.name) == ("Mean", "Mean")
    assert trains_like_ddp(ddp)
    wired = commhub.register(ddp, Mean(), wire="fp16")
    assert str(wired) == "Mean(wire=fp16)"
    train(ddp, 1)
    assert wired.stats.compression == 2


def test_a_hook_object_is_registered_as_it_is(ranks):
    ranks(objects, 2)


def plain_again():
    bare, hooked = model(), model()
    registration = commhub.register(hooked, "fp16")
    train(hooked, 2)
    registration.remove()
    hooked.module.load_state_dict(bare.module.state_dict())
    for options in ({}, {"steps": 1, "first_step": 7}):
        a, b = train(bare, **options), train(hooked, **options)
        assert all(bitwise_equal(a.parameters[n], b.parameters[n]) for n in a.parameters)
    with hooked.join():
        for step in range(1 + dist.get_rank()):
            hooked(*batches(16)(dist.get_rank(), step)).sum().backward()


def test_a_removed_hook_gives_the_plain_average_back(ranks):
    ranks(plain_again, 2)


def scheduled():
    ddp = model()
    registration = commhub.register(ddp, "allreduce")
    registration.schedule({2: "fp16", 4: commhub.HookType.BF16, 5: "allreduce(wire=fp16)"})
    seen = []
    for step in range(6):
        seen.append(str(registration))
        train(ddp, 1, first_step=step)
    assert (registration.step, registration.stats.steps) == (6, 6)
    assert_equal_across_ranks([p.detach() for p in ddp.parameters()])
    return seen


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_schedule_swaps_after_that_many_steps(ranks, nproc):
    wanted = ["allreduce"] * 2 + ["fp16"] * 2 + ["bf16"] + ["allreduce(wire=fp16)"]
    assert ranks(scheduled, nproc) == [wanted] * nproc


def scheduled_now():
    ddp = model()
    registration = commhub.register(ddp, "allreduce")
    registration.schedule({0: "fp16"})
    assert str(registration) == "fp16"
    train(ddp, 2)
    assert error_of(registration.schedule, {1: "bf16"})[0] == "RegistrationError"
    assert error_of(registration.schedule, {5: "bf61"})[0] == "UnknownHookError"
    assert error_of(registration.schedule, {5: "fp16(level=3)"})[0] == "HookOptionError"
    assert error_of(registration.schedule, {True: "bf16"})[0] == "RegistrationError"
    assert error_of(registration.schedule, {5: Mean()})[0] == "RegistrationError"
    told = error_of(registration.schedule, {5: mine("bf16", "fp16")})
    one = error_of(registration.schedule, {5: mine("bf16", "nonsense")})
    train(ddp, 4, first_step=2)
    assert str(registration) == "fp16"
    return told, one[0]


def test_a_schedule_is_checked_at_once_on_all_ranks(ranks):
    (told, first), (_, second) = ranks(scheduled_now, 2)
    assert told[0] == "HookMismatchError"
    assert "schedule" in told[1]
    assert (first, second) == ("RegistrationError", "UnknownHookError")


def copies():
    ddp = model()
    assert trains_like_ddp(copy.deepcopy(ddp))
    registration = commhub.register(ddp, "fp16")
    train(ddp, 1)
    told = error_of(copy.deepcopy, ddp), error_of(pickle.dumps, ddp), error_of(torch.save, ddp, "/dev/null")
    module = copy.deepcopy(ddp.module)  # what the error suggests
    assert torch.equal(module[0].weight, ddp.module[0].weight)
    assert not copy.deepcopy(ddp.state_dict()).keys() ^ ddp.state_dict().keys()
    registration.remove()
    again = copy.deepcopy(ddp)
    assert trains_like_ddp(again)
    assert commhub.registration(again) is None
    assert trains_like_ddp(pickle.loads(pickle.dumps(ddp)))
    commhub.register(again, "allreduce")
    assert trains_like_ddp(again)
    assert commhub.registration(ddp) is None
    return told


def test_a_hooked_model_refuses_to_be_copied_and_says_what_to_do(ranks):
    for told in ranks(copies, 2):
        for name, text in told:
            assert name == "RegistrationError"
            assert "fp16" in text
            assert "registration.remove()" in text


def smaller_group():
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    ddp = model()  # of the world
    commhub.register(ddp, "allreduce", process_group=pairs[rank // 2])
    ddp(*batches(16)(rank, 0)).square().mean().backward()
    gradient = ddp.module[0].weight.grad
    assert_equal_across_ranks(gradient, pairs[rank // 2])
    told = error_of(commhub.register, model(), "allreduce", process_group=pairs[1 - rank // 2])
    bare = DistributedDataParallel(mlp([16] * 4), process_group=pairs[rank // 2], bucket_cap_mb=MANY)
    bare(*batches(16)(rank, 0)).square().mean().backward()
    assert bitwise_equal(bare.module[0].weight.grad, gradient)
    return gradient.sum().item(), told


def test_process_group_chooses_the_ranks_to_average_over(ranks):
    results = ranks(smaller_group, 4)
    assert results[0][0] == results[1][0] != results[2][0] == results[3][0]
    assert all(
        told == ("RegistrationError", "this process is not in the process group that was given.") for _, told in results
    )


class TwoLevels:
    """Averages densely within pairs of ranks, and by another hook between them."""

    def __init__(self, far):
        self.inner = commhub.create(far)

    def prepare(self, setup):
        p = setup.world_size
        self.near = setup.partition([[r, r + 1] for r in range(0, p, 2)])
        self.far = setup.partition([list(range(r, p, 2)) for r in range(2)])
        self.inner.prepare(setup.within(self.far))

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat, group=self.near)))
        half = max(1, len(bucket.parameters) // 2)
        for some in (bucket.parameters[:half], bucket.parameters[half:]):
            if some:
                part = bucket.part(some, self.far)
                assert (part.world_size, part.divisor) == (bucket.world_size // 2,) * 2
                assert part.rank == bucket.rank // 2
                assert [id(p) for p in part.parameters] == [id(p) for p in some]
                assert sum(g.numel() for g in part.gradients) == part.flat.numel()
                yield from self.inner.reduce(part)


def two_levels(far):
    rank, p, own = dist.get_rank(), dist.get_world_size(), mlp([16] * 4)
    ddp = model()
    registration = commhub.register(ddp, TwoLevels(far))
    for step in range(5):
        for module in (own, ddp):
            module.zero_grad()
            module(*batches(16)(rank, step)).square().mean().backward()
        for a, b in zip(own.parameters(), ddp.parameters(), strict=True):
            mean = a.grad / p
            dist.all_reduce(mean)
            rtol = 2e-3 if far == "fp16" else 1e-5
            torch.testing.assert_close(b.grad, mean, rtol=rtol, atol=rtol * mean.abs().max().item())
    assert_equal_across_ranks([p.grad for p in ddp.parameters()])
    return registration.stats.last.sent_bytes


def test_a_hook_inside_another_works_within_the_subgroup_of_its_part(ranks):
    size = 4 * sum(p.numel() for p in mlp([16] * 4).parameters())
    assert ranks(two_levels, 4, "allreduce") == [size * 2.0] * 4  # twice 2(p-1)/p at p = 2
    assert ranks(two_levels, 4, "fp16") == [size * 1.5] * 4


class Raises(Mean):
    def reduce(self, bucket):
        yield AllReduce(bucket.flat)
        raise ZeroDivisionError("planned")


def freed_after_a_failure(swap):
    import gc
    import threading
    import weakref

    ddp = model()
    registration = commhub.register(ddp, Raises(), timeout=20)
    for _ in range(2):  # the error is raised through this frame, which holds the model
        assert error_of(train, ddp, 1)[0] == "HookError"
    if swap:
        registration.swap("allreduce")
    gone = weakref.ref(ddp.module)
    del ddp, registration
    for _ in range(2):  # the model's cycle first, then the one of what only its reducer held
        gc.collect()
    return gone() is None, sum(thread.name == "commhub" for thread in threading.enumerate())


def test_a_model_whose_hook_failed_can_still_be_freed(ranks):
    for swap in (False, True):
        assert ranks(freed_after_a_failure, 2, swap, fresh=True) == [(True, 0)] * 2


class Log(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        self.records.append((record.levelname, record.getMessage()))


def logged():
    logger, log = logging.getLogger("commhub"), Log()
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    registration = commhub.register(model(), "allreduce", wire="bf16")
    registration.swap("fp16")
    logger.removeHandler(log)
    return log.records


def test_one_line_on_rank_0_says_which_hook_was_registered_and_swapped(ranks):
    first, *others = ranks(logged, 4)
    assert [level for level, _ in first] == ["INFO", "INFO"]
    assert "allreduce(wire=bf16)" in first[0][1]
    assert "4 ranks" in first[0][1]
    assert "fp16" in first[1][1]
    assert others == [[]] * 3


def threads():
    import gc
    import threading
    import weakref

    def running():
        return sum(thread.name == "commhub" for thread in threading.enumerate())

    ddp = model()
    registration = commhub.register(ddp, "allreduce")
    train(ddp, 2)
    assert running() == 1
    for hook in ("fp16", "bf16", "allreduce"):
        registration.swap(hook)
        train(ddp, 1)
        assert running() == 1
    commhub.register(ddp, "fp16")
    train(ddp, 1)
    assert running() == 1
    gone = weakref.ref(ddp.module)
    del ddp, registration
    gc.collect()
    return gone() is None, running()


def test_one_thread_serves_a_model_and_ends_with_it(ranks):
    # New processes: a compiled model of another test may still be in dynamo's cache.
    assert ranks(threads, 2, fresh=True) == [(True, 0)] * 2


def test_the_errors_have_the_bases_that_callers_expect():
    assert issubclass(HookMismatchError, RuntimeError)
    assert issubclass(RegistrationError, RuntimeError)
    assert issubclass(UnknownHookError, LookupError)
    assert issubclass(HookOptionError, ValueError)


def with_rules(rules, named):
    model = DistributedDataParallel(mlp())
    hook = "powersgd" if named else commhub.create("powersgd", rules=rules)._hook
    options = {"rules": rules} if named else {}
    commhub.register(model, hook, **options)
    return True


@pytest.mark.parametrize("named", [True, False])
def test_rules_are_compared_across_ranks_and_their_order_is_not(ranks, named):
    rules = {"0.*": "dense", "2.weight": {"rank": 2}}
    backwards = dict(reversed(rules.items()))
    assert ranks(rules_by_rank, 2, rules, backwards, named) == [True, True]
    with pytest.raises(Exception, match="HookMismatchError"):
        ranks(rules_by_rank, 2, rules, {"0.*": "dense"}, named)


def rules_by_rank(first, other, named):
    return with_rules(first if dist.get_rank() == 0 else other, named)
