"""two_level against its definition: means within hosts in double precision, then the inner hook among the hosts."""

import attrs
import pytest
import torch
from commhub_two_level import TwoLevel

import commhub
from commhub.testing import bitwise_equal

SHAPES = [(24, 20), (7,), (), (16, 36)]
EVEN, CROSSED, UNEVEN, ONE_LANE = (0, 0, 1, 1), (0, 1, 1, 0), (0, 0, 0, 1, 1, 2, 2), (0, 1, 1, 1)
INNER = ["allreduce", "fp16", "powersgd_rank2(start_step=0)", "quantize_per_channel(bits=4, dense_small=false)"]


def drawn(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def of_hosts(hosts):
    """What each host brings to the inner hook: its sum, so scaled that the mean over hosts is that over ranks."""

    def gradients(host, step):
        members = [[g.double() for g in drawn(rank, step)] for rank in range(len(hosts)) if hosts[rank] == host]
        return [
            torch.stack(same).sum(0).mul(len(set(hosts)) / len(hosts)).float() for same in zip(*members, strict=True)
        ]

    return gradients


@pytest.mark.parametrize(
    ("inner", "hosts"),
    [
        (INNER[0], CROSSED),
        (INNER[1], ONE_LANE),
        (INNER[2], CROSSED),
        (INNER[2], UNEVEN),
        (INNER[3], CROSSED),
        (INNER[3], UNEVEN),
    ],
    ids=str,
)
def test_it_is_the_inner_hook_among_the_means_of_the_hosts(hosts, inner):
    ours = commhub.simulate("two_level", drawn, ranks=len(hosts), hosts=hosts, steps=2, buckets=2, inner=inner)
    theirs = commhub.simulate(inner, of_hosts(hosts), ranks=len(set(hosts)), steps=2, buckets=2)
    for mine in ours.gradients:
        for found, first, expected in zip(mine, ours.gradients[0], theirs.gradients[0], strict=True):
            assert bitwise_equal(found, first)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("hosts", [EVEN, UNEVEN, ONE_LANE], ids=str)
def test_the_mean_is_that_over_all_ranks_however_many_a_host_has(hosts):
    found = commhub.simulate("two_level(inner=allreduce)", drawn, ranks=len(hosts), hosts=hosts).gradients[0]
    for i, tensor in enumerate(found):
        mean = torch.stack([drawn(rank, 0)[i].double() for rank in range(len(hosts))]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hosts", "alone"), [((0, 0, 0), "allreduce"), ((0, 1, 2), "powersgd_rank2(start_step=0)")])
def test_one_host_or_one_rank_on_each_leaves_one_level(hosts, alone):
    ours = commhub.simulate("two_level(inner=powersgd_rank2(start_step=0))", drawn, ranks=3, hosts=hosts, steps=2)
    plain = commhub.simulate(alone, drawn, ranks=3, steps=2)
    assert ours.sent_bytes == plain.sent_bytes
    for found, expected in zip(ours.gradients[1], plain.gradients[1], strict=True):
        assert bitwise_equal(found, expected)


def test_so_many_consecutive_ranks_are_a_host_where_it_is_said():
    said = commhub.simulate("two_level(ranks_per_host=2)", drawn, ranks=5)
    found = commhub.simulate("two_level", drawn, ranks=5, hosts=(0, 0, 1, 1, 2))
    assert said.sent_bytes == found.sent_bytes
    assert all(bitwise_equal(a, b) for a, b in zip(said.gradients[4], found.gradients[4], strict=True))


def test_what_is_not_finite_on_one_rank_enters_no_memory_anywhere():
    def struck(rank, step):
        return [g.fill_(float("inf")) if (rank, step) == (3, 1) else g for g in drawn(rank, step)]

    hook = "two_level(inner=powersgd_rank2(start_step=0))"
    for steps, finite in ((2, False), (3, True)):
        run = commhub.simulate(hook, struck, ranks=4, hosts=EVEN, steps=steps)
        for mine in run.gradients:
            assert all(bool(t.isfinite().all()) is finite for t in mine)
        for state in run.states:
            kept = [
                t for scope in ("local", "shared") for table in state.export(scope).values() for t in table.values()
            ]
            assert kept
            assert all(t.isfinite().all() for t in kept)


@attrs.define
class Counted(TwoLevel):
    """Counts what goes from host to host, and what stays within one."""

    between: float = attrs.field(default=0.0, init=False)
    within: float = attrs.field(default=0.0, init=False)

    def reduce(self, bucket):
        exchange, answer = TwoLevel.reduce(self, bucket), None
        while True:
            try:
                request = exchange.send(answer)
            except StopIteration:
                return
            for one in request:
                size = one.sent_bytes(one.tensor.numel() * (one.wire or one.tensor.dtype).itemsize, len(one.group))
                if one.group is self._hosts.lane:
                    self.between += size
                else:
                    self.within += size
            answer = yield request


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.partition("(")[0])
def test_between_hosts_goes_what_the_inner_hook_sends_shared_by_the_host_s_ranks(inner):
    ours = commhub.simulate(Counted(inner=inner), drawn, ranks=4, hosts=EVEN)
    theirs = commhub.simulate(inner, of_hosts(EVEN), ranks=2)
    first, second = ours.hooks[:2]
    assert first.between == second.between
    assert first.between + second.between == pytest.approx(theirs.sent_bytes[0], abs=32)  # shares are padded
    dense = sum(t.nbytes for t in drawn(0, 0))  # 2 (g-1)/g of it, g = 2
    assert first.within >= dense
    assert ours.sent_bytes[0] == first.between + first.within


WRONG = {"periodic": "averages parameters", "two_levels": "two_level", "fp16(bits=2)": "bits"}


@pytest.mark.parametrize(("inner", "told"), WRONG.items())
def test_an_inner_hook_that_is_none_is_refused_at_once(inner, told):
    with pytest.raises((commhub.HookOptionError, commhub.UnknownHookError), match=told):
        commhub.create("two_level", inner=inner)
    with pytest.raises(commhub.HookOptionError, match="ranks_per_host"):
        commhub.create("two_level", ranks_per_host=0)
