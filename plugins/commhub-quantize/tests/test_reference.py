"""The hook against its plain algorithm, written as on paper: one parameter, one row at a time, in float64."""

import hashlib
import itertools

import pytest
import torch

import commhub

LEAN = {"digit": 0.0, "zero": 0.0}
"""Added before rounding: what comes out alike leaning up and down does not hang on round-off."""


def rounded(x, what="digit"):
    return torch.round(x + LEAN[what])


def every_way(run):
    """What ``run`` gives leaning down, and where it gives the same leaning any other way."""
    found = []
    for LEAN["digit"], LEAN["zero"] in itertools.product((-1e-9, 1e-9), repeat=2):
        found.append(run())
    LEAN.update(digit=0.0, zero=0.0)
    return found[0], torch.stack([(found[0] - other).abs() <= 1e-9 * other.abs().max() for other in found]).all(0)


def coded(row, bits, symmetric=True):
    """What a row becomes when it is encoded and decoded."""
    if symmetric:
        scale = row.abs().max() / (2 ** (bits - 1) - 1)
        return rounded(row / scale) * scale if scale > 0 else torch.zeros_like(row)
    low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        return torch.zeros_like(row)
    zero = rounded(torch.tensor(-low / scale, dtype=torch.float64), "zero")
    return (torch.clamp(rounded(row / scale) + zero, 0, 2**bits - 1) - zero) * scale


def rows_of(values, width):
    return list(values.split(width))


def owner(name, row, rows, p):
    first = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % p
    return (first + row * p // rows) % p


def two_step(gradients, name, *, bits=8, symmetric=True, width=256, whole=False, residuals=None):
    """The mean of one parameter's gradients (p tensors) and the new residuals; residuals None is no feedback."""
    p = len(gradients)
    flats = [g.double().reshape(-1) for g in gradients]
    if residuals is not None:
        flats = [g + r for g, r in zip(flats, residuals, strict=True)]
    if whole:
        decoded = [rows_of(coded(flat, bits, symmetric), width) for flat in flats]
    else:
        decoded = [[coded(row, bits, symmetric) for row in rows_of(flat, width)] for flat in flats]
    rows = len(decoded[0])
    owners = [owner(name, row, rows, p) for row in range(rows)]
    means = [sum(decoded[rank][row] for rank in range(p)) / p for row in range(rows)]
    results = list(means)
    for rank in range(p):
        mine = [row for row in range(rows) if owners[row] == rank]
        if whole and mine:
            together = coded(torch.cat([means[row] for row in mine]), bits, symmetric)
            for row, part in zip(mine, together.split([len(means[row]) for row in mine]), strict=True):
                results[row] = part
        elif mine:
            for row in mine:
                results[row] = coded(means[row], bits, symmetric)
    left = None
    if residuals is not None:
        left = []
        for rank in range(p):
            error = [row - done for row, done in zip(rows_of(flats[rank], width), decoded[rank], strict=True)]
            for row in range(rows):
                if owners[row] == rank:
                    error[row] = error[row] + p * (means[row] - results[row])
            left.append(torch.cat(error))
    return torch.cat(results).view(gradients[0].shape), left


SHAPES = [(40, 70), (33, 41), (64, 64), (7, 300)]


def drawn(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**-i for i, shape in enumerate(SHAPES)]


def assert_same(mine, reference):
    """Equal wherever no value lies in the middle between two codes: there round-off decides."""
    expected, decided = every_way(reference)
    assert decided.double().mean() > 0.7  # or this would compare nothing
    torch.testing.assert_close(
        mine[decided].double(), expected[decided], rtol=1e-4, atol=1e-6 * float(mine.abs().max())
    )


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("quantize_per_channel", {}),
        ("quantize_per_channel", {"symmetric": False}),
        ("quantize_per_channel", {"group_size": 64, "bits": 4}),
        ("quantize_per_channel", {"bits": 4, "symmetric": False}),
        ("quantize_per_channel", {"bits": 2}),
        ("quantize_per_channel", {"bits": 2, "group_size": 16}),
        ("quantize_per_channel", {"bits": 2, "group_size": 48, "symmetric": False}),
        ("quantize_per_tensor", {}),
        ("quantize_per_tensor", {"symmetric": False}),
        ("quantize_per_tensor", {"bits": 4}),
    ],
)
def test_one_step_is_the_plain_algorithms(hook, options, p):
    gradients = [drawn(rank, 0) for rank in range(p)]
    result = commhub.simulate(hook, gradients, error_feedback=False, **options)
    plain = {"bits": options.get("bits", 8), "symmetric": options.get("symmetric", True)}
    width, whole = options.get("group_size", 256), hook == "quantize_per_tensor"
    for i in range(len(SHAPES)):
        given = [g[i] for g in gradients]
        assert_same(
            result.gradients[0][i],
            lambda: two_step(given, str(i), width=width, whole=whole, **plain)[0],  # noqa: B023
        )


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_steps_with_error_feedback_are_the_plain_algorithms(bits, p):
    steps = 6
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(p, steps, 40, 64, generator=generator, dtype=torch.float64)

    def plain(which):
        residuals = [torch.zeros(40 * 64, dtype=torch.float64) for _ in range(p)]
        for step in range(steps):
            mean, residuals = two_step([drawn[r, step] for r in range(p)], "0", bits=bits, residuals=residuals)
        return mean.view(-1) if which is None else residuals[which]

    options = {"bits": bits, "error_feedback": True}
    result = commhub.simulate("quantize_per_channel", lambda r, s: [drawn[r, s]], ranks=p, steps=steps, **options)
    assert_same(result.gradients[0][0].view(-1), lambda: plain(None))
    for rank in range(p):
        assert_same(result.states[rank].local("0")["residual"].view(-1), lambda: plain(rank))  # noqa: B023


@pytest.mark.parametrize("hook", ["quantize_per_channel", "quantize_per_tensor"])
@pytest.mark.parametrize("p", [2, 5])
@pytest.mark.parametrize("options", [{"bits": 8, "error_feedback": True}, {"bits": 4}, {"bits": 2}])
def test_what_arrived_and_what_is_left_is_all_that_was_given(hook, options, p):
    """The sum of the results and the mean of the residuals are the sum of the true means."""
    steps = 6
    result = [torch.zeros(40, 70, dtype=torch.float64) for _ in range(1)]
    for upto in range(1, steps + 1):
        run = commhub.simulate(hook, lambda r, s: [drawn(r, s)[0]], ranks=p, steps=upto, **options)
        result[0] += run.gradients[0][0]
    left = sum(state.local("0")["residual"] for state in run.states) / p
    given = sum(drawn(r, s)[0] for r in range(p) for s in range(steps)) / p
    torch.testing.assert_close(result[0] + left, given, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_by_chance_is_right_on_average(bits):
    steps = 200
    gradient = torch.linspace(-1, 1, 2048).view(32, 64)
    total = torch.zeros(32, 64)
    for seed in range(steps):
        total += commhub.simulate(
            "quantize_per_channel", [[gradient]], bits=bits, stochastic_rounding=True, seed=seed
        ).gradients[0][0]
    step = 1 / (2 ** (bits - 1) - 1)
    assert (total / steps - gradient).abs().max() < 6 * step / steps**0.5


def test_rounding_by_chance_differs_by_rank_step_and_seed_and_repeats():
    gradient = torch.full((40, 64), 0.3)
    gradient[0, 0] = 1.0

    def run(seed, steps):
        options = {"bits": 4, "stochastic_rounding": True, "seed": seed}
        return commhub.simulate("quantize_per_channel", [[gradient]] * 2, steps=steps, **options).gradients[0][0]

    before = torch.get_rng_state()
    assert torch.equal(run(0, 1), run(0, 1))
    assert not torch.equal(run(0, 1), run(1, 1))
    assert not torch.equal(run(0, 1), run(0, 2))
    assert run(0, 1).unique().numel() > 3  # two ranks that rounded alike would leave two values
    assert torch.equal(before, torch.get_rng_state())
