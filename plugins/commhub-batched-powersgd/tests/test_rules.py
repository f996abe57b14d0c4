"""Rules on parameter names: what is dense is left out of the square, and averaged exactly in its first message."""

import math

import pytest
import torch
import torch.distributed as dist
from commhub_batched_powersgd import BatchedPowerSGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal

SHAPES = [(40, 30), (50, 20), (9,), (24, 8, 3, 3)]
RULES = {"1": "dense", "2": "dense"}
SQUARE, DENSE = 1200 + 1728, 1000 + 9
SIDE = math.isqrt(SQUARE - 1) + 1


def drawn(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def run(gradients, **options):
    return commhub.simulate("batched_powersgd", gradients, **{"ranks": 2, "start_step": 0, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("iterations", [1, 2])
def test_what_is_dense_is_averaged_exactly_and_nothing_is_kept_of_it(dtype, iterations):
    def gradients(rank, step):
        return [g.to(dtype) for g in drawn(rank, step)]

    result = run(gradients, steps=3, rules=RULES, num_power_iterations=iterations)
    for i, (mine, theirs) in enumerate(zip(gradients(0, 2), gradients(1, 2), strict=True)):
        wide = torch.promote_types(dtype, torch.float32)
        mean = (mine.to(wide) / 2 + theirs.to(wide) / 2).to(dtype)
        is_dense = str(i) in RULES
        assert torch.equal(result.gradients[0][i], mean) == is_dense
        for state in result.states:
            assert set(state.local(str(i))) == (set() if is_dense else {"residual"})
            assert set(state.shared(str(i))) == (set() if is_dense else {"q", "grouping"})


@pytest.mark.parametrize("options", [{}, {"warm_start": False}, {"rank": 3, "num_power_iterations": 2}], ids=str)
def test_the_others_are_compressed_as_if_nothing_else_were_there(options):
    def emptied(rank, step):
        return [torch.zeros(0) if str(i) in RULES else g for i, g in enumerate(drawn(rank, step))]

    some, alone = run(drawn, steps=4, rules=RULES, **options), run(emptied, steps=4, **options)
    for i in (0, 3):
        assert bitwise_equal(some.gradients[0][i], alone.gradients[0][i])
        for mine, theirs in zip(some.states, alone.states, strict=True):
            assert bitwise_equal(mine.local(str(i))["residual"], theirs.local(str(i))["residual"])


def test_a_dense_gradient_that_is_not_finite_leaves_no_trace_in_what_shares_its_bucket():
    def gradients(rank, step):
        made = drawn(rank, step)
        if step == 2 and rank == 1:
            made[2][4] = math.inf
        return made

    broken, before = run(gradients, steps=3, rules=RULES), run(gradients, steps=2, rules=RULES)
    assert all(not mine[2].isfinite().all() for mine in broken.gradients)
    for mine, theirs in zip(broken.states, before.states, strict=True):
        for scope in ("local", "shared"):
            ours, kept = mine.export(scope), theirs.export(scope)
            assert all(torch.equal(kept[n][key], t) for n, table in ours.items() for key, t in table.items())
    assert all(g.isfinite().all() for g in run(gradients, steps=4, rules=RULES).gradients[0])


# How much is sent, and in how many messages.


class Counted(BatchedPowerSGD):
    """Counts the elements of each collective."""

    def reduce(self, bucket):
        self.messages = []
        exchange, result = super().reduce(bucket), None
        while True:
            try:
                collective = exchange.send(result)
            except StopIteration:
                return
            self.messages.append(collective.tensor.numel())
            result = yield collective


@pytest.mark.parametrize(
    ("rules", "iterations", "messages"),
    [
        ({}, 1, [63 + 4, 63]),  # 62 * 62 < 3937 <= 63 * 63
        (RULES, 1, [SIDE + 2 + DENSE, SIDE]),
        (RULES, 3, [SIDE + 2 + DENSE, *[SIDE] * 5]),  # dense ones travel once
        ({"*": "dense"}, 3, [SQUARE + DENSE]),
        ({"[03]": "dense"}, 1, [32 + 2 + SQUARE, 32]),  # 31 * 31 < 1009 <= 32 * 32
        ({"[013]": "dense"}, 1, [SQUARE + DENSE]),  # what is left is too little
        ({"*": "dense", "[03]": {}}, 1, [SIDE + 2 + DENSE, SIDE]),  # the longer pattern decides
    ],
)
def test_dense_ones_travel_with_the_first_factor_in_no_further_message(rules, iterations, messages):
    options = {"start_step": 0, "num_power_iterations": iterations}
    result = commhub.simulate(Counted(rules=rules, **options), drawn, ranks=4, steps=2)
    assert all(hook.messages == messages for hook in result.hooks)
    assert result.sent_bytes == pytest.approx((2 * 3 / 4 * 4 * 2 * sum(messages),) * 4)
    assert result.hooks[0].compression_stats()[1:] == (2 * (SQUARE + DENSE), 2 * sum(messages))


def test_where_all_is_dense_the_average_is_the_plain_one_and_nothing_is_kept():
    plain = commhub.simulate("allreduce", drawn, ranks=2)
    result = run(drawn, rules={"*": "dense"})
    assert all(bitwise_equal(a, b) for a, b in zip(result.gradients[0], plain.gradients[0], strict=True))
    assert all(state.is_empty() for state in result.states)


# What may be said, and on real ranks.


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"*": "sparse"}, "can only be 'dense'"),
        ({"*": {"rank": 2}}, "sets 'rank'; a rule of this hook can only be 'dense'"),
        ({"nobody": "dense"}, "matches no parameter"),
        ("dense", "rules"),
    ],
)
def test_a_malformed_rule_is_refused(rules, match):
    with pytest.raises(commhub.HookOptionError, match=match):
        run(drawn, rules=rules)


class Net(nn.Module):
    """A body and a head, of which rules know by name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(30, 40)
        self.lm_head = nn.Linear(40, 50)

    def forward(self, x):
        return self.lm_head(self.body(x))


def step(model, number):
    model.zero_grad()
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
    model(x).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters()}
    assert_equal_across_ranks(gradients)
    return gradients


def train_by_rules(hook, rules):
    torch.manual_seed(0)
    plain = DistributedDataParallel(Net())
    model = DistributedDataParallel(Net())
    model.load_state_dict(plain.state_dict())
    registration = commhub.register(model, hook) if rules is None else commhub.register(model, hook, rules=rules)
    for number in range(3):
        mine, exact = step(model, number), step(plain, number)
    same = {name for name, gradient in exact.items() if bitwise_equal(mine[name], gradient)}
    [local] = registration.state_dict()["local"].values()
    return same, set(local), registration.stats.last.sent_bytes, str(registration)


@pytest.mark.parametrize(
    ("hook", "rules"),
    [
        ("batched_powersgd_rank2(start_step=0, rules={'*.bias': 'dense', 'lm_head.weight': 'dense'})", None),
        ("batched_powersgd_rank2(start_step=0)", {"lm_head.weight": "dense", "*.bias": "dense"}),
    ],
    ids=["string", "argument"],
)
def test_a_hook_string_carries_rules_and_real_ranks_follow_them(ranks, hook, rules):
    for same, kept, nbytes, text in ranks(train_by_rules, 2, hook, rules):
        assert same == {"body.bias", "lm_head.bias", "lm_head.weight"}
        assert kept == {"body.weight"}
        assert nbytes == 4 * (2 * 2 * 35 + 1 + 40 + 50 + 2000)
        assert text == ("batched_powersgd_rank2(rules={'*.bias': 'dense', 'lm_head.weight': 'dense'}, start_step=0)")


def resume(cap, later_cap):
    def registered(cap):
        torch.manual_seed(0)
        model = DistributedDataParallel(Net(), bucket_cap_mb=cap)
        return model, commhub.register(model, "batched_powersgd", start_step=0, rules={"*.bias": "dense"})

    model, registration = registered(cap)
    for number in range(4):
        step(model, number)
    other, again = registered(later_cap)
    step(other, 50)  # its buckets are made
    again.load_state_dict(registration.state_dict())
    for number in range(4, 7):
        whole, half = step(model, number), step(other, number)
        for name, gradient in whole.items():
            if cap == later_cap or name.endswith("bias"):
                assert bitwise_equal(half[name], gradient), name
    return len(registration.hook._squares.made)


@pytest.mark.parametrize(("cap", "buckets"), [(25, 1), (1 / 1024, 2)])
def test_it_resumes_bit_for_bit_with_rules(ranks, cap, buckets):
    assert ranks(resume, 2, cap, cap) == [buckets] * 2
    ranks(resume, 2, cap, 26 - cap)


def differ():
    rules = {"lm_head.*": "dense"} if dist.get_rank() else {"body.*": "dense"}
    with pytest.raises(commhub.HookMismatchError, match="rules") as told:
        train_by_rules("batched_powersgd", rules)
    return str(told.value)


def test_ranks_that_differ_in_rules_are_told(ranks):
    for text in ranks(differ, 2):
        assert "lm_head.*" in text
        assert "body.*" in text
