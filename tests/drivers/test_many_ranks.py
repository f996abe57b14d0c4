"""A thousand virtual ranks: work in proportion to their number, and results that are each rank's own."""

import sys
import weakref

import pytest
import torch

import commhub
from commhub import AllGather, AllReduce, AllToAll, Broadcast, HookError, ReduceScatter
from commhub.testing import bitwise_equal

KINDS = (AllReduce, ReduceScatter, AllGather, AllToAll, Broadcast)
HOOKS = ("allreduce", "fp16", "quantize_per_tensor", "quantize_per_channel(bits=4)", "powersgd(start_step=0)")


def calls_of(run):
    """How many functions Python calls in ``run``, those of tensors among them."""
    count = 0

    def counted(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


class Everything:
    """One collective of each kind, on payloads that tell the ranks apart."""

    def reduce(self, bucket):
        p = bucket.world_size
        mine = torch.arange(2.0 * p) + 100 * bucket.rank
        got = yield tuple(kind(mine.clone(), **({"op": "sum"} if kind is AllReduce else {})) for kind in KINDS)
        every = torch.stack([torch.arange(2.0 * p) + 100 * rank for rank in range(p)])
        share = slice(2 * bucket.rank, 2 * bucket.rank + 2)
        wanted = every.sum(0), every.mean(0)[share], every.view(-1), every[:, share].flatten(), every[0]
        for result, value in zip(got, wanted, strict=True):
            torch.testing.assert_close(result, value)
            result.fill_(bucket.rank)
        yield AllReduce(torch.zeros(1))
        assert all(result.eq(bucket.rank).all() for result in got)
        bucket.flat.zero_()


@pytest.mark.parametrize("p", [1, 2, 3, 8, 33])
def test_what_a_rank_does_with_its_results_no_other_sees(p):
    commhub.simulate(Everything(), [[torch.ones(1)]] * p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [2, 5, 33])
def test_a_sum_is_taken_in_rank_order_and_16_bits_in_float32_where_it_is_scattered(p, dtype):
    given = [[torch.randn(2 * p, 3).to(dtype)] for _ in range(p)]
    parts = commhub.simulate("allreduce", given, sharded=True).gradients
    wide = [(mine[0] * (1 / p)).float() for mine in given]
    total = wide[0]
    for mine in wide[1:]:
        total = total + mine
    for rank, (part,) in enumerate(parts):
        assert bitwise_equal(part, total[2 * rank : 2 * rank + 2].to(dtype))


class GathersLast:
    alive: list[weakref.ref[torch.Tensor]]

    def reduce(self, bucket):
        result = yield AllGather(bucket.flat.clone())
        self.alive.append(weakref.ref(result))
        assert sum(one() is not None for one in self.alive) == 1
        bucket.flat.copy_(result.view(bucket.world_size, -1).mean(0))


def test_what_is_gathered_at_last_is_never_there_for_all_ranks_at_once():
    GathersLast.alive = []
    commhub.simulate(GathersLast(), [[torch.ones(4)]] * 12)
    assert len(GathersLast.alive) == 12


class Odd:
    """The last rank asks for another collective among all, or among the ranks of its half."""

    def __init__(self, halves):
        self.halves = halves

    def prepare(self, setup):
        p = setup.world_size
        self.group = setup.partition([range(p // 2), range(p // 2, p)]) if self.halves else None
        self.size = 2 if setup.rank == p - 1 else 1

    def reduce(self, bucket):
        yield AllReduce(torch.ones(self.size), group=self.group)


@pytest.mark.parametrize(("halves", "other"), [(False, 0), (True, 4)])
def test_who_asks_for_something_else_is_named_with_a_rank_of_its_group(halves, other):
    with pytest.raises(HookError, match=rf"rank 7 asked for AllReduce\[2 .* where rank {other} asked for"):
        commhub.simulate(Odd(halves), [[torch.ones(1)]] * 8)


@pytest.mark.parametrize("p", [1, 2, 3, 7, 12])
def test_every_rank_gets_its_rows_however_many_there_are(p):
    shapes = (0,), (1,), (3, 2), (6, 0), (7, 2, 2), (12,), (24, 3)
    given = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(p)]
    given = [[tensor.transpose(-1, 0).contiguous().transpose(-1, 0) for tensor in mine] for mine in given]
    means = [sum(every) / p for every in zip(*given, strict=True)]
    for rank, mine in enumerate(commhub.simulate("allreduce", given, buckets=2, sharded=True).gradients):
        for mean, found in zip(means, mine, strict=True):
            rows = -(-len(mean) // p)
            torch.testing.assert_close(found, mean[rank * rows : (rank + 1) * rows])


@pytest.mark.parametrize(("hook", "sharded"), [(hook, False) for hook in HOOKS] + [("fp16", True)])
def test_three_times_the_ranks_take_three_times_the_calls(hook, sharded):
    def run(p):
        given = [[torch.ones(64, 64), torch.ones(1500, 2), torch.ones(5)] for _ in range(p)]
        return calls_of(lambda: commhub.simulate(hook, given, steps=2, buckets=2, sharded=sharded))

    run(2)  # what is loaded once
    few, many = run(20), run(60)
    assert many < 3.1 * few


def test_a_simulation_shows_in_a_line_what_was_run():
    given = [[torch.ones(1000)] for _ in range(4)]
    shown = repr(commhub.simulate("fp16", given, steps=3, network="100mbit"))
    assert shown.startswith("<Simulation of fp16 (commhub-fp16 ")
    assert "4 ranks, 3 steps, compression 2, " in shown
    assert "tensor" not in shown
    assert "\n" not in shown
