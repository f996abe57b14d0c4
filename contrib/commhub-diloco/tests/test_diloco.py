"""diloco against DiLoCo written out in double precision, and what must hold beside."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp, train

LR = 0.1
WIDTHS = [8, 16, 4]
ALL = [["0.weight", "0.bias", "2.weight", "2.bias"]]
HALVES = [["0.weight"], ["0.bias", "2.weight", "2.bias"]]  # 128 and 84 elements


def local_step(model, optimizer, rank, step):
    optimizer.zero_grad()
    model(*batches(8)(rank, step)).square().mean().backward()
    optimizer.step()


def written_out(p, steps, every, fragments, warmup=0, lr=0.7, mu=0.9):
    """Per step, {name: float64} of each rank: all of them trained here, with the outer optimizer in plain terms."""
    models = [mlp(WIDTHS).double() for _ in range(p)]
    own = [dict(model.named_parameters()) for model in models]
    theta = {name: x.detach().clone() for name, x in own[0].items()}
    m = {name: torch.zeros_like(x) for name, x in theta.items()}
    outer = 0
    for step in range(steps):
        for rank, model in enumerate(models):
            model.zero_grad()
            model(batches(8)(rank, step)[0].double()).square().mean().backward()
        with torch.no_grad():
            for mine in own:
                for x in mine.values():
                    x -= LR * x.grad
            since, due = step + 1 - warmup, []
            if since == 0:
                theta = {name: sum(mine[name] for mine in own) / p for name in theta}
                due = list(theta)
            elif since > 0 and since % every == 0:
                due, outer = fragments[outer % len(fragments)], outer + 1
                for name in due:
                    delta = sum(theta[name] - mine[name] for mine in own) / p
                    m[name] = mu * m[name] + delta
                    theta[name] = theta[name] - lr * (delta + mu * m[name])
            for name in due:
                for mine in own:
                    mine[name].copy_(theta[name])
        yield [{name: x.detach().clone() for name, x in mine.items()} for mine in own]


def registered(hook, **ddp):
    model = DistributedDataParallel(mlp(WIDTHS), **ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, timeout=30)


def own(model):
    return {name: x.detach().clone() for name, x in model.module.named_parameters()}


def against_the_paper(cases):
    rank, p = dist.get_rank(), dist.get_world_size()
    for hook, every, fragments, warmup in cases:
        model, optimizer, registration = registered(hook)
        for step, expected in enumerate(written_out(p, 9, every, fragments, warmup)):
            local_step(model, optimizer, rank, step)
            for name, x in own(model).items():
                torch.testing.assert_close(
                    x.double(), expected[rank][name], rtol=1e-5, atol=1e-6, msg=f"{name}, {step}"
                )
            since = step + 1 - warmup
            if since >= 0 and since % every == 0 and len(fragments) == 1 and step > 0:
                assert_equal_across_ranks(own(model))
        registration.remove()
        assert_equal_across_ranks(own(model))


CASES = [
    ("diloco(period=3)", 3, ALL, 0),
    ("diloco(period=4, fragments=2)", 2, HALVES, 0),
    ("diloco(period=3, warmup_steps=2)", 3, ALL, 2),
]


@pytest.mark.parametrize("nproc", [2, 4])
def test_it_is_the_paper_s_algorithm_in_every_step(ranks, nproc):
    ranks(against_the_paper, nproc, CASES if nproc == 2 else CASES[:2])


def fragments_end_alike():
    model, optimizer, registration = registered("diloco(period=4, fragments=2)")
    for step in range(2):  # the last step ends with an average, of the first half
        local_step(model, optimizer, dist.get_rank(), step)
    with pytest.raises(AssertionError, match="differs from rank 0"):
        assert_equal_across_ranks(own(model))
    sent = registration.stats.last.sent_bytes
    registration.remove()
    assert_equal_across_ranks(own(model))
    return sent


def test_a_fragment_sends_its_own_bytes_and_the_last_average_is_of_all(ranks):
    assert ranks(fragments_end_alike, 2) == [128 * 4] * 2


def quantized():
    sent = []
    for exchange in ("allreduce", "quantize_per_channel(bits=4)"):
        model = DistributedDataParallel(mlp([32, 64, 32]))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        registration = commhub.register(
            model, f"diloco(period=2, exchange={exchange})", optimizer=optimizer, timeout=30
        )
        train(model, 6, optimizer=optimizer)
        assert_equal_across_ranks(own(model))
        sent.append((registration.stats.sent_bytes, own(model)))
    return sent


def test_outer_gradients_travel_as_the_exchange_sends_them(ranks):
    (plain, expected), (fewer, found) = ranks(quantized, 4)[0]
    assert fewer < plain / 5
    start = dict(mlp([32, 64, 32]).named_parameters())
    for name in ("0.weight", "2.weight"):
        moved = (expected[name] - start[name]).norm()
        assert 0 < (found[name] - expected[name]).norm() < 0.2 * moved, name


def resumed():
    rank, hook = dist.get_rank(), "diloco(period=3, exchange=quantize_per_channel(bits=4, dense_small=false))"
    model, optimizer, registration = registered(hook)
    for step in range(4):
        local_step(model, optimizer, rank, step)
    saved, mine = registration.state_dict(), own(model)
    for step in range(4, 9):
        local_step(model, optimizer, rank, step)
    again, optimizer, registration = registered(hook)
    again.module.load_state_dict(mine)
    registration.load_state_dict(saved)
    for step in range(4, 9):
        local_step(again, optimizer, rank, step)
    assert all(bitwise_equal(x, own(model)[name]) for name, x in own(again).items())
    return saved["shared"]


def test_it_goes_on_from_a_checkpoint_bit_by_bit(ranks):
    first, second = ranks(resumed, 2)
    assert sorted(first["0.weight"]) == ["global", "momentum"]
    assert all(bitwise_equal(first[n][key], second[n][key]) for n in first for key in first[n])


def struck():
    model, optimizer, registration = registered("diloco(period=2)")
    before = None
    for step in range(6):
        if step == 3 and dist.get_rank() == 1:
            with torch.no_grad():
                model.module[2].bias[0] = float("nan")
        local_step(model, optimizer, dist.get_rank(), step)
        if step % 2:
            kept = registration.state_dict()["shared"]
            assert_equal_across_ranks(own(model))
            assert all(x.isfinite().all() for x in own(model).values())
            if step == 3:
                for name, table in kept.items():
                    assert all(bitwise_equal(table[key], before[name][key]) for key in table)
                    assert bitwise_equal(own(model)[name], table["global"])
            before = kept
    assert not bitwise_equal(before["0.weight"]["momentum"], kept_at_start(before))


def kept_at_start(tables):
    return torch.zeros_like(tables["0.weight"]["momentum"])


def test_what_is_not_finite_on_one_rank_sends_all_back_to_where_they_last_were(ranks):
    ranks(struck, 2)


def test_half_precision_parameters_have_global_ones_in_float32_which_small_steps_move():
    first = torch.ones(4, dtype=torch.bfloat16)
    runs = [[first], [first], [first - 2**-8], [first - 2**-8]]
    run = commhub.simulate(
        "diloco(period=1, outer_momentum=0.0, outer_lr=0.5)", lambda _rank, step: runs[step], ranks=2, steps=4
    )
    state = run.states[0].shared("0")
    assert state["global"].tolist() == [1 - 2**-8 * 0.75] * 4
    assert run.gradients[0][0].dtype == torch.bfloat16


def test_fragments_are_adjacent_about_equal_and_never_empty():
    from commhub_diloco._averager import _cut

    assert _cut([128, 16, 64, 4], 2) == [0, 1, 1, 1]
    assert _cut([1000, 1, 1], 3) == [0, 1, 2]
    assert _cut([1, 1, 1000], 3) == [0, 1, 2]
    assert _cut([0, 0, 0], 2) == [0, 0, 1]
    assert _cut([5] * 6, 3) == [0, 0, 1, 1, 2, 2]


WRONG = {
    "diloco(period=0)": "period",
    "diloco(period=5, fragments=2)": "does not divide",
    "diloco(outer_momentum=1.0)": "outer_momentum",
    "diloco(outer_lr=0.0)": "outer_lr",
    "diloco(warmup_steps=-1)": "warmup_steps",
    "diloco(exchange=periodic)": "Name a hook",
}


@pytest.mark.parametrize(("hook", "told"), WRONG.items())
def test_an_option_that_makes_no_sense_is_refused_at_once(hook, told):
    with pytest.raises(commhub.HookOptionError, match=told):
        commhub.create(hook)


def test_more_fragments_than_parameters_are_refused_at_registration():
    with pytest.raises(commhub.HookOptionError, match="Choose fewer"):
        commhub.simulate("diloco(period=4, fragments=2)", [[torch.ones(2)]] * 2)
