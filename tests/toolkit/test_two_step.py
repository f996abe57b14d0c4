"""An all-reduce of codes, whatever the codec: exact with an exact one, and nothing lost with any."""

from typing import ClassVar

import attrs
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal, mlp, train
from commhub.toolkit import Rules, Selection, TwoStep
from commhub.toolkit._codec import shown

SHAPES = ((40, 33), (7,), (32, 64), (0, 3), (), (16,))


@attrs.frozen
class AsTheyAre:
    """Rows' own bytes, and a scale of one."""

    row: int = 16
    scales: ClassVar[int] = 1

    def row_bytes(self, dtype):
        return self.row * dtype.itemsize

    def encode(self, rows, codes, scales, counts, *, keeping):
        assert rows.shape[1] == self.row
        assert counts.shape == (len(rows), 1)
        codes.view(rows.dtype).copy_(rows)
        scales.fill_(1)
        if keeping:
            rows.zero_()

    def decode(self, codes, scales, rows, *, adding):
        values = codes.view(rows.dtype) * scales
        rows.add_(values) if adding else rows.copy_(values)


@attrs.frozen
class Halves(AsTheyAre):
    """Misses most: a number's sign, for the mean magnitude of those of its row that count."""

    def row_bytes(self, _dtype):
        return self.row

    def encode(self, rows, codes, scales, counts, *, keeping):
        filled = torch.arange(self.row) >= counts
        assert not rows[filled].any() or not rows.isfinite().all()
        scales.copy_(rows.abs().sum(1, keepdim=True) / counts)
        codes.copy_(rows < 0)
        if keeping:
            rows.sub_((1.0 - 2.0 * codes) * scales)

    def decode(self, codes, scales, rows, *, adding):
        values = (1.0 - 2.0 * codes) * scales
        rows.add_(values) if adding else rows.copy_(values)


@attrs.frozen
class Shared(Halves):
    """A parameter's rows have one scale, its largest magnitude: it, minus it, or nothing; with a seed, by chance."""

    whole: ClassVar[bool] = True
    seed: int | None = None

    def extents(self, rows, out):
        torch.amax(rows.abs(), 1, keepdim=True, out=out)

    def scales_of(self, extents):
        return extents

    def encode(self, rows, codes, scales, counts, noise=None, *, keeping):
        ratio = (rows / torch.where(scales == 0, 1, scales)).abs()
        reached = ratio >= (0.5 if noise is None else 1 - noise)
        codes.copy_(torch.where(reached, 2 - rows.sign(), 2).to(torch.uint8) * (scales != 0))
        if keeping:
            values = torch.zeros_like(rows)
            self.decode(codes, scales, values, adding=False)
            rows.sub_(values)

    def decode(self, codes, scales, rows, *, adding):
        values = torch.where(codes == 0, 0, 2.0 - codes) * scales
        rows.add_(values) if adding else rows.copy_(values)


def drawn(rank, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def in_order(_name, rows, p):
    share = -(-rows // p)
    return [range(min(k * share, rows), min((k + 1) * share, rows)) for k in range(p)]


def backwards(name, rows, p):
    return in_order(name, rows, p)[::-1]


def hook(codec, feedback=True, *, min_numel=1, rules=None, **options):
    return TwoStep(codec, Selection(Rules(rules or {}, {}), min_numel), feedback, **options)


@pytest.mark.parametrize("options", [{}, {"within": True}, {"owners": in_order}, {"feedback": False}], ids="".join)
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("buckets", [1, 4])
def test_an_exact_codec_gives_the_exact_mean(p, buckets, options):
    run = commhub.simulate(hook(AsTheyAre(), min_numel=8, **options), drawn, ranks=p, steps=2, buckets=buckets)
    for rank in range(p):
        for i, found in enumerate(run.gradients[rank]):
            mean = sum(drawn(other, 1)[i] for other in range(p)) / p
            torch.testing.assert_close(found, mean, rtol=0, atol=1e-15)
            assert bitwise_equal(found, run.gradients[0][i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_averaged_in_float32_and_rounded_once(dtype):
    run = commhub.simulate(
        hook(AsTheyAre(), min_numel=8, within=True), lambda r, s: drawn(r, s, dtype), ranks=2, steps=1
    )
    for i, found in enumerate(run.gradients[1]):
        assert torch.equal(found, ((drawn(0, 0, dtype)[i].float() + drawn(1, 0, dtype)[i].float()) / 2).to(dtype))


CODECS = [Halves(), Shared(), Shared(seed=3)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("owners", [None, in_order], ids=["in turn", "in order"])
def test_what_was_sent_and_what_is_left_add_up_to_the_gradients(codec, p, owners):
    """In float64, over steps: the sum of results and the mean of residuals is the sum of mean gradients."""
    options = {} if owners is None else {"owners": owners}
    steps, total = 4, [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for n in range(1, steps + 1):
        run = commhub.simulate(hook(codec, **options), drawn, ranks=p, steps=n)
        for sum_, found in zip(total, run.gradients[0], strict=True):
            sum_ += found
    for i, sent in enumerate(total):
        if not sent.numel():
            continue
        given = sum(drawn(rank, step)[i] for rank in range(p) for step in range(steps)) / p
        left = sum(state.local(str(i))["residual"] for state in run.states) / p
        torch.testing.assert_close(sent + left, given, rtol=0, atol=1e-12)
        assert left.any() or sent.numel() == 1


def test_the_mean_is_coded_without_what_codes_stand_for_beyond_a_parameters_end():
    """17 elements fill a row and one of the next; the scale of that one is its own magnitude."""
    values = torch.arange(1.0, 18.0, dtype=torch.float64)
    run = commhub.simulate(hook(Halves()), [[values], [values]])
    assert run.gradients[0][0].tolist() == [8.5] * 16 + [17.0]


def test_rules_give_parameters_codecs_of_their_own_and_equal_ones_travel_together():
    class Settings:
        def __call__(self, settings):
            return AsTheyAre(settings["row"])

    rules = Rules({"0": {"row": 32}, "2": "dense"}, {"row": 8})
    step = TwoStep(Settings(), Selection(rules), feedback=lambda codec: codec.row == 32)
    run = commhub.simulate(step, drawn, ranks=2)
    for i, found in enumerate(run.gradients[0]):
        torch.testing.assert_close(found, (drawn(0, 0)[i] + drawn(1, 0)[i]) / 2, rtol=0, atol=1e-15)
    assert [name for name in "012345" if list(run.states[0].local(name))] == ["0"]
    (messages,) = run.hooks[0]._messages.made.values()
    assert sorted(part.codec.row for part in messages.parts) == [8, 32]


@pytest.mark.parametrize("codec", [Halves(), Shared()], ids=str)
@pytest.mark.parametrize("i", [0, 1, 2])
def test_what_is_not_finite_reaches_all_ranks_and_no_residual(codec, i):
    def gradients(rank, step):
        found = drawn(rank, step)
        if (rank, step) == (1, 1):
            found[i].view(-1)[-1] = float("inf")
        return found

    before, run = (commhub.simulate(hook(codec), gradients, ranks=2, steps=n, buckets=1) for n in (1, 2))
    for rank in range(2):
        assert not run.gradients[rank][i].isfinite().all()
        for name in "0125":
            kept, held = (one.states[rank].local(name)["residual"] for one in (before, run))
            assert bitwise_equal(kept, held)


def test_noise_depends_on_the_seed_and_not_on_the_bucket():
    runs = [
        commhub.simulate(hook(Shared(seed=seed)), drawn, ranks=2, steps=2, buckets=buckets).gradients[0]
        for seed, buckets in ((3, 1), (3, 4), (4, 1))
    ]
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_a_codec_prepares_for_each_dtype_once_and_knows_whether_it_keeps():
    told = []

    @attrs.frozen
    class Preparing(AsTheyAre):
        ready: list = attrs.field(factory=list, eq=False)

        def prepare(self, dtype, device, elements, *, keeping):
            self.ready.append(dtype)
            told.append((dtype, device.type, elements, keeping))

        def encode(self, rows, *others, keeping):
            assert rows.dtype in self.ready
            super().encode(rows, *others, keeping=keeping)

    mixed = [torch.ones(4, 4), torch.ones(5), torch.ones(7, dtype=torch.float64), torch.ones(3, dtype=torch.float16)]
    made = TwoStep(lambda _settings: Preparing(), Selection(Rules({}, {})), feedback=False)
    commhub.simulate(made, [mixed])
    assert told == [(torch.float32, "cpu", 24, False), (torch.float64, "cpu", 7, False)]


def trained(steps, cap, *made):
    torch.manual_seed(0)
    model = DistributedDataParallel(mlp([20] * 13), bucket_cap_mb=cap)
    for one in made:
        commhub.register(model, one)
    run = train(model, steps)
    assert_equal_across_ranks(run.parameters)
    return run.gradients[-1]


@attrs.define(eq=False)
class Unused:
    """Has a parameter unused on some ranks, and says so."""

    inner: object
    unused_on: tuple
    rank: int = 0

    def prepare(self, setup):
        self.rank = setup.rank
        self.inner.prepare(setup)

    def reduce(self, bucket):
        if self.rank in self.unused_on and bucket.step % 2:
            bucket.flat.zero_()
            bucket.used = (False,) * len(bucket.names)
        return self.inner.reduce(bucket)


@pytest.mark.parametrize("unused_on", [(0,), (2,), (0, 1, 2)])
def test_nothing_is_lost_where_some_ranks_do_not_use_a_parameter(unused_on):
    """Who sums a row owes what the second rounding missed, whether it used the parameter or not."""
    steps, total = 4, torch.zeros(SHAPES[0], dtype=torch.float64)
    for n in range(1, steps + 1):
        run = commhub.simulate(Unused(hook(Halves()), unused_on), drawn, ranks=3, steps=n)
        total += run.gradients[0][0]
    given = sum(drawn(r, s)[0] for r in range(3) for s in range(steps) if not (r in unused_on and s % 2)) / 3
    left = sum(state.local("0")["residual"] for state in run.states) / 3
    torch.testing.assert_close(total + left, given, rtol=0, atol=1e-12)


def on_a_rank():
    kept = [trained(4, cap, hook(Halves(), min_numel=30, within=True)) for cap in (25, 1 / 1024)]
    exact = [trained(1, 1 / 1024, *made) for made in ((), (hook(AsTheyAre(), min_numel=30),))]
    return kept, exact


def test_on_real_ranks_one_bucket_and_twelve_agree_and_an_exact_codec_is_exact(ranks):
    """With residuals, to the bit: who sums a row does not depend on the bucket."""
    for (one, twelve), (plain, coded) in ranks(on_a_rank, 2):
        for name, gradient in one.items():
            assert bitwise_equal(gradient, twelve[name]), name
        for name, gradient in plain.items():
            torch.testing.assert_close(coded[name], gradient)


class Loose(AsTheyAre):
    """Cannot be hashed."""

    __hash__ = None


@attrs.frozen
class Off(AsTheyAre):
    row: object = 16
    scales: object = 1


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (None, "NoneType is no codec: it has no method row_bytes"),
        (AsTheyAre, "the codec is the class AsTheyAre"),
        (Loose(), "Loose cannot be hashed"),
        (Off(row=0), r"Off.row is 0; it is a whole number above zero"),
        (Off(row=-1), r"Off.row is -1"),
        (Off(scales=1.0), r"Off.scales is 1.0"),
        (lambda _settings: Off(row=0), r"Off.row is 0"),
    ],
    ids=["nothing", "class", "hash", "no row", "minus a row", "scales", "from a function"],
)
def test_what_is_no_codec_is_refused_before_anything_is_sent(codec, said):
    with pytest.raises(commhub.HookOptionError, match=said):
        commhub.simulate(hook(codec), [[torch.ones(4)]] * 2)


def test_what_else_cannot_be_is_refused_at_once():
    for wrong, said in [
        ({"selection": Rules({}, {})}, "give a Selection"),
        ({"selection": Selection(Rules({}, {})), "residual_dtype": torch.int32}, "floating dtype"),
    ]:
        with pytest.raises(commhub.HookOptionError, match=said):
            TwoStep(Halves(), **wrong)


@pytest.mark.parametrize(
    "owners",
    [
        lambda _name, rows, p: [range(rows - 1), *[range(0)] * (p - 1)],
        lambda _name, rows, p: [range(rows)] * p,
        lambda _name, rows, _p: [range(rows)],
    ],
    ids=["a gap", "an overlap", "too few"],
)
def test_owners_of_anything_but_every_row_once_are_refused(owners):
    with pytest.raises(commhub.HookError, match=r"owners=<lambda> gave .* for 3 rows of '0' among 2 ranks"):
        commhub.simulate(hook(Halves(), owners=owners), [[torch.ones(3, 16)]] * 2)


@attrs.frozen
class Told(Halves):
    """Shows a function, which lies elsewhere in each process."""

    function: object = None


def unlike():
    rank = torch.distributed.get_rank()
    told = []
    for mine in [
        hook((Halves(), AsTheyAre(16))[rank]),
        hook(Halves((16, 32)[rank])),
        hook(Halves(), rules={("0.*", "2.*")[rank]: "dense"}),
        hook(Halves(), owners=(in_order, backwards)[rank]),
        hook(Halves(), feedback=bool(rank)),
        hook((lambda _: Halves(), Halves())[rank]),
        hook(Told(function=drawn)),
    ]:
        model = DistributedDataParallel(mlp([20, 20, 20]))
        try:
            told.append(str(commhub.register(model, mine)))
        except commhub.HookMismatchError as error:
            told.append(str(error))
    return told


def test_ranks_that_would_not_code_alike_are_refused_when_they_register(ranks):
    for *different, made, told in ranks(unlike, 2):
        assert len(different) == 5
        assert all("how parameters are coded" in error for error in different)
        assert (made, told) == ("TwoStep", "TwoStep")


def test_what_ranks_compare_of_a_codec_does_not_depend_on_where_it_lies_in_memory():
    one, other = (shown(Told(function=lambda: None)) for _ in range(2))
    assert one == other
    assert "function=<function" in one
