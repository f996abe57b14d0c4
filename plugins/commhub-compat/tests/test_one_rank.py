"""What is wrong on one rank alone is an error on all of them at once, and not after a timeout."""

import datetime
import time

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches

TIMEOUT, AT_ONCE = 30, 5  # seconds: the groups' own, and what ranks need at most that wait for none


def wrapped():
    torch.manual_seed(1)
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    return DistributedDataParallel(nn.Linear(8, 8), process_group=group)


def trained(model):
    model(batches(8)(dist.get_rank(), 0)[0]).square().mean().backward()


def at_once(faulty, error, text, call, *arguments):
    """The call raises ``error`` on the faulty rank, and what names that rank and the cause on the others."""
    here = dist.get_rank() == faulty
    dist.barrier()
    start = time.monotonic()
    with pytest.raises(error if here else commhub.CommhubError, match=text) as caught:
        call(*arguments)
    assert time.monotonic() - start < AT_ONCE
    assert here or f"rank {faulty}" in str(caught.value)


STATES = {
    "fp16_compress_hook": (None, {}, "the state is dict"),
    "powerSGD_hook": (compat.PowerSGDState(None), None, "Give a commhub_compat.PowerSGDState"),
    "batched_powerSGD_hook": (
        compat.PowerSGDState(None),
        compat.PowerSGDState(None, min_compression_rate="x"),
        "could not convert string",
    ),
    "post_localSGD_hook": (
        compat.PostLocalSGDState(None, None, 2),
        compat.PostLocalSGDState(None, dist.GroupMember.NON_GROUP_MEMBER, 2),
        "this rank is not in",
    ),
}


def by_ddp_s_method(name, faulty):
    right, wrong, text = STATES[name]
    model = wrapped()
    model.register_comm_hook(wrong if dist.get_rank() == faulty else right, getattr(compat, name))
    at_once(faulty, (commhub.HookOptionError, ValueError), text, trained, model)
    commhub.register(model, "allreduce")
    trained(model)


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("name", STATES)
def test_a_wrong_state_for_ddp_s_method(ranks, name, faulty):
    ranks(by_ddp_s_method, 2, name, faulty)


def by_the_enumeration(faulty):
    model = wrapped()
    state = {} if dist.get_rank() == faulty else None
    member = compat.DDPCommHookType.FP16_COMPRESS
    at_once(faulty, commhub.HookOptionError, "the state is dict", lambda: member.value(model=model, state=state))
    powersgd = compat.DDPCommHookType.POWER_SGD
    at_once(
        faulty,
        commhub.HookOptionError,
        "takes a process group",
        lambda: powersgd.value(model=model, state=state, matrix_approximation_rank=1),
    )
    at_once(
        faulty,
        commhub.HookOptionError,
        "the state is dict",
        compat.register_ddp_comm_hook,
        compat.DDPCommHookType.BF16_COMPRESS,
        model,
        state,
    )
    no_member = "FP16_COMPRESS" if dist.get_rank() == faulty else compat.DDPCommHookType.FP16_COMPRESS
    at_once(
        faulty, commhub.HookOptionError, "give a member", lambda: compat.register_ddp_comm_hook(no_member, model, None)
    )
    assert commhub.registration(model) is None
    compat.register_ddp_comm_hook(compat.DDPCommHookType.FP16_COMPRESS, model)
    trained(model)


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_wrong_state_for_the_enumeration(ranks, faulty):
    ranks(by_the_enumeration, 2, faulty)


def by_parameters(faulty):
    net, averager = nn.Linear(4, 4), compat.PeriodicModelAverager(2, 0, wrapped().process_group)
    given = ["weight"] if dist.get_rank() == faulty else list(net.parameters())
    at_once(faulty, commhub.HookOptionError, "params hold a str", averager.average_parameters, given)
    for _ in range(3):
        averager.average_parameters(net.parameters())
    dist.barrier()


@pytest.mark.parametrize("faulty", [0, 1])
def test_what_are_no_parameters_for_an_averager(ranks, faulty):
    ranks(by_parameters, 2, faulty)


def own(state, bucket):
    future = dist.all_reduce(bucket.buffer(), group=state, async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / dist.get_world_size())


def foreign_states(faulty):
    model, wrong = wrapped(), dist.get_rank() == faulty
    everyone = model.process_group
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    for state, other in (({}, None), (everyone, {}), (alone, None)):
        at_once(
            faulty,
            commhub.HookMismatchError,
            "group",
            commhub.register,
            model,
            compat.foreign(other if wrong else state, own),
        )
    commhub.register(model, compat.foreign(None if wrong else everyone, own))  # the same ranks
    trained(model)


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_function_s_state_that_has_a_group_on_some_ranks(ranks, faulty):
    ranks(foreign_states, 2, faulty)


def subgroups(faulty):
    model = wrapped()
    state = compat.PostLocalSGDState(None, None if dist.get_rank() == faulty else model.process_group, 2)
    model.register_comm_hook(state, compat.post_localSGD_hook)
    at_once(faulty, commhub.HookMismatchError, "subgroup", trained, model)


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_subgroup_on_some_ranks(ranks, faulty):
    ranks(subgroups, 2, faulty)
