"""Each collective gives what a plain torch computation gives, at every size and dtype; simulated ranks agree."""

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter
from commhub.testing import bitwise_equal

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
MOVED = [*FLOATS, torch.uint8, torch.int64, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex128]
KINDS = (AllGather, AllToAll, Broadcast, AllReduce, ReduceScatter)
MIB = 1 << 20


class Asks:
    """Yields what a test wants to see carried out, and keeps what came back."""

    def __init__(self, make):
        self.make, self.results = make, None

    def reduce(self, bucket):
        self.results = yield self.make(bucket.rank, bucket.world_size)


def one_step(hook, **options):
    """A step of a one-parameter model under `hook`; its registration."""
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    registration = commhub.register(model, hook, **options)
    model(torch.ones(1, 1)).sum().backward()
    return registration


def values(rank, numel, dtype, spread=4):
    """Small whole numbers: their sums are exact in every dtype."""
    numbers = (torch.arange(numel) * 7 + 3 * rank) % spread
    if dtype == torch.bool:
        return numbers % 2 == 0
    return numbers.to(torch.complex64).mul(1 - 1j).to(dtype) if dtype.is_complex else numbers.to(dtype)


def expected(kind, every, rank, op="sum", src=0):
    """What rank `rank` should get, from all ranks' payloads."""
    p = len(every)
    if kind is AllGather:
        return torch.cat([t.reshape(-1) for t in every])
    if kind is Broadcast:
        return every[src]
    if kind is AllToAll:
        return torch.cat([t.reshape(p, -1)[rank] for t in every])
    total = every[0].clone()
    for other in every[1:]:
        total += other
    if op == "mean":
        total = (total / p).to(total.dtype)
    return total.reshape(p, -1)[rank] if kind is ReduceScatter else total


def sizes(p):
    """Nothing, one for each rank, and more than a piece, in uneven pieces."""
    return [0, p, 3 * p]


def check(kind, cases, **options):
    """Ask for all cases at once, and compare what came back."""
    p, rank = dist.get_world_size(), dist.get_rank()
    hook = Asks(lambda rank, p: tuple(kind(values(rank, *case), **options) for case in cases))
    one_step(hook)
    for (numel, dtype), got in zip(cases, hook.results, strict=True):
        every = [values(r, numel, dtype) for r in range(p)]
        want = expected(kind, every, rank, options.get("op", "mean"), options.get("src", 0))
        assert bitwise_equal(got, want), (kind, numel, dtype, options)


def moves():
    p = dist.get_world_size()
    cases = [(numel, dtype) for numel in [*sizes(p), p * 5] for dtype in MOVED]
    for kind in (AllGather, AllToAll, Broadcast):
        check(kind, cases)
    check(AllGather, [(numel, dtype) for numel in (1, 7) for dtype in MOVED])
    check(Broadcast, [(7, dtype) for dtype in MOVED], src=p - 1)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_gather_exchange_and_broadcast_move_any_dtype_of_any_size(ranks, nproc):
    ranks(moves, nproc)


def sums():
    p = dist.get_world_size()
    floats = [(numel, dtype) for numel in [*sizes(p), p * 5] for dtype in FLOATS]
    whole = [(numel, dtype) for numel in sizes(p) for dtype in (torch.int64, torch.int32, torch.uint8)]
    for kind in (AllReduce, ReduceScatter):
        check(kind, [*floats, *whole], op="sum")
        check(kind, floats)
    check(AllReduce, [(1, dtype) for dtype in FLOATS], op="sum")


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_reductions_sum_and_average_every_dtype_of_any_size(ranks, nproc):
    ranks(sums, nproc)


def large():
    p = dist.get_world_size()
    odd = p * (MIB // 4 + 37)  # float32: some pieces of a MiB and an uneven rest
    for kind in KINDS:
        op = {"op": "sum"} if kind in (AllReduce, ReduceScatter) else {}
        check(kind, [(odd, torch.float32), (p * 700_001, torch.uint8)], **op)
    check(AllGather, [(MIB, torch.uint8), (MIB + 1, torch.uint8), (MIB - 1, torch.uint8)])


@pytest.mark.parametrize("nproc", [2, 3])
def test_payloads_of_several_mebibytes_arrive_whole(ranks, nproc):
    ranks(large, nproc)


class InHalves:
    """Asks for a collective of each kind among the even ranks, and among the odd ones."""

    def __init__(self, cases):
        self.cases, self.results = cases, None

    def prepare(self, setup):
        p = setup.world_size
        self.half = setup.partition([range(0, p, 2), range(1, p, 2)])

    def reduce(self, bucket):
        asked = [kind(values(bucket.rank, 8, dtype), group=self.half, **options) for kind, dtype, options in self.cases]
        self.results = yield tuple(asked)


HALVES = [
    (AllReduce, torch.float32, {}),
    (AllReduce, torch.int64, {"op": "sum"}),
    (ReduceScatter, torch.float32, {}),
    (AllGather, torch.uint8, {}),
    (AllToAll, torch.complex64, {}),
    (Broadcast, torch.bfloat16, {"src": 1}),
]


def in_halves():
    hook = InHalves(HALVES)
    one_step(hook)
    return hook.results


def test_every_collective_works_within_a_subgroup(ranks):
    simulated = commhub.simulate(InHalves(HALVES), [[torch.zeros(1)] for _ in range(4)])
    for rank, results in enumerate(ranks(in_halves, 4)):
        half = [rank % 2, rank % 2 + 2]
        for got, same, (kind, dtype, options) in zip(results, simulated.hooks[rank].results, HALVES, strict=True):
            every = [values(r, 8, dtype) for r in half]
            want = expected(kind, every, rank // 2, options.get("op", "mean"), options.get("src", 0))
            assert bitwise_equal(got, want), kind
            assert bitwise_equal(same, want), kind


def shaped():
    p = dist.get_world_size()
    every = [torch.arange(6.0).view(3, 2) + r for r in range(p)]
    hook = Asks(lambda r, p: tuple(kind(every[r].clone()) for kind in (AllReduce, Broadcast, AllGather)))
    one_step(hook)
    reduced, sent, gathered = hook.results
    assert reduced.shape == sent.shape == (3, 2)
    assert torch.equal(sent, every[0])
    assert torch.equal(reduced, sum(every) / p)
    assert gathered.shape == (6 * p,)
    zero = Asks(lambda r, p: AllReduce(torch.tensor(float(r))))
    one_step(zero)
    assert zero.results.shape == ()
    assert zero.results.item() == (p - 1) / 2


def test_reduced_and_broadcast_tensors_keep_their_shape_and_gathered_ones_are_flat(ranks):
    ranks(shaped, 2)


def on_the_wire(wire, on):
    """One element that the wire dtype rounds, one that only a mean taken first can hold."""
    every = [torch.tensor([1 + 2.0**-12, 6e4]), torch.tensor([1 + 2.0**-12, 6e4])]
    asked = {"wire": wire} if on == "collective" else {}
    hook = Asks(lambda r, p: (AllReduce(every[r].clone(), **asked), AllGather(every[r].clone(), **asked)))
    registration = one_step(hook, **({"wire": wire} if on == "register" else {}))
    mean, gathered = hook.results
    assert mean.dtype == gathered.dtype == torch.float32
    return mean.tolist(), gathered.tolist(), registration.stats.sent_bytes


@pytest.mark.parametrize("on", ["collective", "register"])
@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16], ids=str)
def test_a_wire_dtype_halves_the_bytes_and_rounds_after_the_mean(ranks, wire, on):
    one = torch.tensor([1 + 2.0**-12, 6e4]).to(wire).float().tolist()
    for mean, gathered, sent in ranks(on_the_wire, 2, wire, on):
        assert mean == one
        assert gathered == [*one, *one]
        assert sent == 2 * 2 + 2 * 2  # 2(p-1)/p of two elements, and p-1 shares of two


def never_widened():
    payloads = [torch.ones(4, dtype=d) for d in (torch.float16, torch.bfloat16, torch.int64, torch.complex64)]
    hook = Asks(lambda r, p: tuple(AllReduce(t.clone(), op="sum") for t in payloads))
    sent = one_step(hook, wire="bf16").stats.sent_bytes
    assert [r.dtype for r in hook.results] == [t.dtype for t in payloads]
    assert all(torch.equal(r, t + t) for r, t in zip(hook.results, payloads, strict=True))
    assert sent == 4 * (2 + 2 + 8 + 4)  # a complex number is two floats on a 16-bit wire


def test_a_wire_never_widens_touches_integers_or_loses_an_imaginary_part(ranks):
    ranks(never_widened, 2)


def own_wire_first():
    hook = Asks(lambda r, p: AllReduce(torch.tensor([6e4]), wire=torch.float16))
    one_step(hook, wire="bf16")
    return hook.results.item()


def test_a_collective_s_own_wire_comes_before_the_registration_s(ranks):
    assert ranks(own_wire_first, 2) == [6e4, 6e4]  # bfloat16 would round it to 59904


# The simulator.


class Everything:
    """All kinds at once, on random payloads; the hook's result is all results, one after another."""

    def __init__(self, wire=None):
        self.wire, self.results = wire, []

    def reduce(self, bucket):
        p, flat = bucket.world_size, bucket.flat
        payload = flat[: flat.numel() // p * p]
        asked = (
            AllReduce(payload.clone(), wire=self.wire),
            AllReduce(payload.clone(), op="sum"),
            ReduceScatter(payload.clone(), wire=self.wire),
            AllGather(payload.clone(), wire=self.wire),
            AllToAll(payload.clone()),
            Broadcast(payload.clone(), src=p - 1, wire=self.wire),
        )
        self.results = list((yield asked))
        self.results.append((yield AllReduce(payload, wire=self.wire)))


def real_ranks(gradients, wire):
    """What each rank's hook saw for its gradient, on real ranks."""
    mine = gradients[dist.get_rank()]
    parameter = nn.Parameter(torch.zeros_like(mine))

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter

        def forward(self, x):
            return (self.weight * x.conj()).real.sum() if x.is_complex() else (self.weight * x).sum()

    model = DistributedDataParallel(One())
    hook = Everything(wire)
    registration = commhub.register(model, hook)
    model(mine).backward()
    return hook.results, registration.stats.sent_bytes


@pytest.mark.parametrize("wire", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_simulator_agrees_with_two_real_ranks_bit_by_bit(ranks, dtype, wire):
    torch.manual_seed(1)
    gradients = [torch.randn(103).to(dtype) for _ in range(2)]
    real = ranks(real_ranks, 2, gradients, wire)
    simulated = commhub.simulate(Everything(wire), [[g] for g in gradients])
    for rank, (results, sent) in enumerate(real):
        for kind, a, b in zip(range(7), results, simulated.hooks[rank].results, strict=True):
            assert bitwise_equal(a, b), kind
        assert sent == simulated.sent_bytes[rank]


@pytest.mark.parametrize("nproc", [3, 4])
def test_the_simulator_agrees_with_more_real_ranks_to_rounding(ranks, nproc):
    torch.manual_seed(1)
    gradients = [torch.randn(1003) for _ in range(nproc)]
    real = ranks(real_ranks, nproc, gradients, None)
    simulated = commhub.simulate(Everything(), [[g] for g in gradients])
    for rank, (results, sent) in enumerate(real):
        for a, b in zip(results, simulated.hooks[rank].results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert sent == simulated.sent_bytes[rank]
    moved = [results[3:6] for results, _ in real]
    assert all(
        bitwise_equal(a, b)
        for mine, hook in zip(moved, simulated.hooks, strict=True)
        for a, b in zip(mine, hook.results[3:6], strict=True)
    )


@attrs.define
class WithoutDefault:
    kept: object = attrs.field(init=False)

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def test_a_hook_object_that_cannot_be_copied_is_told_so_by_the_simulator():
    with pytest.raises(TypeError, match="Give fields that prepare sets a default"):
        commhub.simulate(WithoutDefault(), [[torch.ones(2)], [torch.ones(2)]])


class Sorted:
    """Sums within groups of unequal size, in one stage on every rank; `wrong` ranks ask for something else."""

    def __init__(self, groups, wrong=()):
        self._groups, self._wrong, self._mine, self._rank = groups, wrong, None, 0

    def prepare(self, setup):
        self._mine, self._rank = setup.partition(self._groups), setup.rank

    def reduce(self, bucket):
        payload = torch.cat([bucket.flat] * (len(self._mine) + (self._rank in self._wrong)))
        total = yield commhub.AllReduce(payload, op="sum", group=self._mine)
        bucket.flat.copy_(total[: bucket.flat.numel()])


def test_the_simulator_takes_groups_of_unequal_size_and_compares_within_each():
    own = [[torch.tensor([float(2**rank)])] for rank in range(4)]
    found = commhub.simulate(Sorted([[0, 2, 3], [1]]), own).gradients
    assert [float(mine[0]) for mine in found] == [13, 2, 13, 13]
    with pytest.raises(commhub.HookError, match=r"rank 3 asked for .*\[4 .* where rank 0 asked for .*\[3 "):
        commhub.simulate(Sorted([[0, 2, 3], [1]], wrong=[3]), own)
