"""A collective declares what it is: a new kind takes a line in each driver's table; all refuse an unknown one."""

import contextlib
from typing import ClassVar
from unittest.mock import patch

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, AllToAll, Broadcast, Collective, ReduceScatter
from commhub.drivers import _gloo, _plain, _stream
from commhub.testing import bitwise_equal

from .test_stream import host_streams


@attrs.frozen(eq=False)
class Scan(Collective):
    """Rank i gets the sum, or the mean, of the payloads of ranks 0 to i: alike in shape, and different everywhere."""

    op: str = attrs.field(default="sum", kw_only=True)
    last: int = attrs.field(default=0, kw_only=True)
    in_place: ClassVar[bool] = True

    @property
    def manner(self):
        return f"up to {self.last}" if self.last else ""

    @classmethod
    def sent_bytes(cls, payload, p):
        return float((p - 1) * payload)


def on_gloo(flight, group):
    payload = flight.job.payload
    out, rank = payload.new_empty((group.size(), payload.numel())), group.rank()
    flight.keep(group._allgather_base(out.view(-1), payload), out, payload)
    return lambda flight: flight.pieces[0].out[: rank + 1].sum(0, dtype=payload.dtype)


def on_a_stream(job, out, group):
    parts = out.new_empty((dist.get_world_size(group), out.numel()))
    dist.all_gather_single(parts.view(-1), job.payload, group=group, async_op=True).wait()
    out.copy_(parts[: dist.get_rank(group) + 1].sum(0, dtype=out.dtype))


def in_one_process(jobs):
    payloads = torch.stack([job.payload for job in jobs])
    return [payloads[: rank + 1].sum(0, dtype=payloads.dtype) for rank in range(len(jobs))]


@contextlib.contextmanager
def known(kind):
    with (
        patch.dict(_gloo.WAYS, {kind: on_gloo}),
        patch.dict(_stream.WAYS, {kind: on_a_stream}),
        patch.dict(_plain.WAYS, {kind: in_one_process}),
    ):
        yield


class Scans:
    """Asks for the kind in each of its forms, among all ranks and in a subgroup, and keeps what comes back."""

    def prepare(self, setup):
        self.state = setup.state
        setup.state.local(setup.names[0])["kept"] = torch.zeros(1)  # a hook with memory: finite numbers are looked for
        self.pair = setup.partition([[0, 1], list(range(2, setup.world_size))] if setup.world_size > 2 else [[0], [1]])

    def reduce(self, bucket):
        own = torch.arange(6.0).view(2, 3) + bucket.rank
        asked = (
            Scan(own.clone(), op="mean"),
            Scan(own + 1 + 2.0**-12, wire=torch.bfloat16),
            Scan(own.to(torch.complex64) * 1j),
            Scan(own[:0].clone()),
        )
        self.results = [(yield Scan(own.clone())), *(yield asked), (yield Scan(own.clone(), group=self.pair))]
        self.judged = bucket.judged


def scanned(rank, p, among, scale=1.0):
    """What a rank should get: the sum over those of its group up to itself."""
    own = [torch.arange(6.0, dtype=torch.float64).view(2, 3) + r for r in range(p)]
    return sum(own[r] * scale for r in among if r <= rank).float()


def check_scans(hook, rank, p, sent):
    everyone, pair = range(p), ([0, 1] if rank < 2 else range(2, p)) if p > 2 else [rank]
    total, mean, rounded, imaginary, empty, within = hook.results
    assert torch.equal(total, scanned(rank, p, everyone))
    assert torch.equal(mean, scanned(rank, p, everyone, 1 / p)) or p == 3
    torch.testing.assert_close(mean, scanned(rank, p, everyone, 1 / p))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, scanned(rank, p, everyone) + rank + 1)  # bfloat16 has no room for the fraction
    assert torch.equal(imaginary, scanned(rank, p, everyone) * 1j)
    assert empty.shape == (0, 3)
    assert torch.equal(within, scanned(rank, p, pair))
    assert not hook.judged  # what differs from rank to rank says nothing about all of them
    assert sent == (p - 1) * (24 + 24 + 12 + 48) + (len(pair) - 1) * 24


def scan(driver):
    p, rank = dist.get_world_size(), dist.get_rank()
    with known(Scan), host_streams(driver == "stream"):
        model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
        registration = commhub.register(model, hook := Scans())
        for _ in range(2):
            model(torch.ones(1, 1)).sum().backward()
        check_scans(hook, rank, p, registration.stats.last.sent_bytes)
    return hook.results


@pytest.mark.parametrize("nproc", [2, 3])
def test_a_new_kind_works_everywhere_once_it_is_in_each_driver_s_table(ranks, nproc):
    with known(Scan):
        run = commhub.simulate(Scans(), [[torch.zeros(1)]] * nproc)
    for rank, hook in enumerate(run.hooks):
        check_scans(hook, rank, nproc, run.sent_bytes[rank])
    for driver in ("thread", "stream"):
        for rank, results in enumerate(ranks(scan, nproc, driver)):
            assert all(map(bitwise_equal, results, run.hooks[rank].results)), driver


class Asks:
    def __init__(self, make):
        self.make = make

    def reduce(self, bucket):
        yield AllReduce(bucket.flat)
        yield self.make(bucket)


@attrs.frozen(eq=False)
class Mine(AllReduce):
    """A kind of its own, though it is made from a known one."""


UNKNOWN = {
    "a new kind": lambda bucket: Scan(torch.zeros(4)),
    "a kind made from a known one": lambda bucket: Mine(torch.zeros(4)),
    "among others": lambda bucket: (AllGather(torch.zeros(2)), Scan(torch.zeros(4)), AllReduce(torch.zeros(2))),
    "empty": lambda bucket: Scan(torch.zeros(0)),
}


def refused(driver, cases):
    told = []
    for case in cases:
        with host_streams(driver == "stream"):
            model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
            registration = commhub.register(model, Asks(UNKNOWN[case]), timeout=20)
            with pytest.raises(commhub.HookError) as error:
                model(torch.ones(1, 1)).sum().backward()
            registration.swap("allreduce")
            model(torch.ones(1, 1)).sum().backward()
        told.append(str(error.value))
    return told


WHERE = {"thread": "by the thread driver, over Gloo", "stream": "by the stream driver, over NCCL"}


@pytest.mark.parametrize("driver", WHERE)
def test_an_unknown_kind_is_refused_on_every_rank_with_its_name_and_the_driver_s(ranks, driver):
    for nproc, cases in ((1, ["a new kind"]), (2, list(UNKNOWN))):
        for rank, texts in enumerate(ranks(refused, nproc, driver, cases)):
            for case, text in zip(cases, texts, strict=True):
                name = "Mine" if "made from" in case else "Scan"
                assert f"yielded {name}, which cannot be carried out {WHERE[driver]}." in text, (rank, case, text)
                assert f"bucket 0, step 0, rank {rank}: " in text


@pytest.mark.parametrize("case", UNKNOWN)
def test_the_simulator_refuses_an_unknown_kind_too(case):
    name = "Mine" if "made from" in case else "Scan"
    with pytest.raises(commhub.HookError, match=f"rank 0: yielded {name}, which cannot be carried out by the simul"):
        commhub.simulate(Asks(UNKNOWN[case]), [[torch.zeros(1)]] * 2)


def only_here():
    model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
    rank = dist.get_rank()
    commhub.register(model, Asks(lambda bucket: (AllReduce, Scan)[rank](torch.zeros(4))), timeout=20)
    with pytest.raises(commhub.HookError) as error:
        model(torch.ones(1, 1)).sum().backward()
    return str(error.value)


def test_an_unknown_kind_on_one_rank_only_is_an_error_on_all(ranks):
    assert all("Scan of 4 float32" in text for text in ranks(only_here, 2))


def test_a_collective_that_is_no_kind_at_all_is_refused_as_before():
    with pytest.raises(commhub.HookError, match=r"yielded Collective. Yield a collective such as AllReduce"):
        commhub.simulate(Asks(lambda bucket: Collective(torch.zeros(2))), [[torch.zeros(1)]] * 2)


def test_a_kind_that_does_not_say_what_it_sends_is_told_so():
    @attrs.frozen(eq=False)
    class Silent(Collective):
        pass

    with pytest.raises(commhub.HookError, match="Silent does not declare what a rank sends"):
        commhub.simulate(Asks(lambda bucket: Silent(torch.zeros(2))), [[torch.zeros(1)]] * 2)


def test_ranks_that_ask_for_one_kind_in_different_manners_are_told_apart_by_the_simulator():
    for make in (lambda b: Broadcast(torch.zeros(2), src=b.rank), lambda b: Scan(torch.zeros(2), last=b.rank)):
        with known(Scan), pytest.raises(commhub.HookError, match=r"rank 1 asked for .* where rank 0 asked for"):
            commhub.simulate(Asks(make), [[torch.zeros(1)]] * 2)


FACTS = {  # in place, alike, in shares; elements of the result and bytes sent, of 12 elements and bytes among 4 ranks
    AllReduce: (True, True, False, 12, 18.0),
    ReduceScatter: (False, False, True, 3, 9.0),
    AllGather: (False, True, False, 48, 36.0),
    AllToAll: (False, False, True, 12, 9.0),
    Broadcast: (True, True, False, 12, 9.0),
}


@pytest.mark.parametrize("kind", FACTS)
def test_each_kind_declares_what_it_is(kind):
    facts = (kind.in_place, kind.alike, kind.in_shares, kind.result_numel(12, 4), kind.sent_bytes(12, 4))
    assert facts == FACTS[kind]
    assert kind(torch.zeros(1)).op == ("mean" if kind in (AllReduce, ReduceScatter) else None)
    assert (kind(torch.zeros(5)).objection(4) != "") == kind.in_shares
    assert set(FACTS) == set(_gloo.WAYS) == set(_stream.WAYS) == set(_plain.WAYS)
