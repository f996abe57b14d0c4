"""In place of a reduce-scatter: the exact mean of each rank's part with an exact codec, and nothing lost with any."""

import pytest
import torch

import commhub
from commhub import AllGather, AllReduce, ReduceScatter
from commhub.testing import bitwise_equal
from commhub.toolkit import ErrorFeedback

from .test_two_step import AsTheyAre, Halves, Shared, hook

SHAPES = ((40, 33), (7,), (32, 64), (5, 3), (1,), (16,))


def drawn(rank, step, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def part(tensor, rank, p):
    rows = -(-len(tensor) // p)
    return tensor[rank * rows : (rank + 1) * rows]


def means(p, step, dtype=torch.float64):
    every = [drawn(rank, step, dtype) for rank in range(p)]
    return [sum(one.double() for one in them) / p for them in zip(*every, strict=True)]


def run(of, p, steps=1, dtype=torch.float64, buckets=1, **options):
    def gradients(rank, step):
        return drawn(rank, step, dtype)

    return commhub.simulate(of, gradients, ranks=p, steps=steps, buckets=buckets, sharded=True, **options)


@pytest.mark.parametrize("buckets", [1, 4])
@pytest.mark.parametrize("p", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"within": True}, {"feedback": False}], ids="".join)
def test_an_exact_codec_gives_the_exact_mean_of_each_part(p, buckets, options):
    result = run(hook(AsTheyAre(), min_numel=8, **options), p, steps=2, buckets=buckets)
    for rank, mine in enumerate(result.gradients):
        for mean, found in zip(means(p, 1), mine, strict=True):
            torch.testing.assert_close(found, part(mean, rank, p), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("within", [False, True])
def test_narrow_dtypes_are_worked_on_in_float32(dtype, within):
    result = run(hook(AsTheyAre(), min_numel=8, within=within), 3, dtype=dtype)
    for rank, mine in enumerate(result.gradients):
        for mean, found in zip(means(3, 0, dtype), mine, strict=True):
            assert found.dtype == dtype
            bound = 2 * torch.finfo(dtype).eps  # what travels beside is divided in its own dtype, and then rounded
            torch.testing.assert_close(found.double(), part(mean, rank, 3), rtol=bound, atol=bound)


def lost(of, p, steps=5, **options):
    """How far all results and the mean of what is left are from the sum of all means; how much is left."""
    came = [[torch.zeros_like(part(t, rank, p)) for t in means(p, 0)] for rank in range(p)]
    for step in range(1, steps + 1):
        result = run(of(), p, steps=step, **options)
        for sums, mine in zip(came, result.gradients, strict=True):
            for total, found in zip(sums, mine, strict=True):
                total += found
    wanted = [sum(every) for every in zip(*(means(p, step) for step in range(steps)), strict=True)]
    left = 0.0
    for place, sizes in enumerate(SHAPES):
        tables = [state.export("local").get(str(place), {}) for state in result.states]
        for table in tables:
            if "residual" in table:
                left = max(left, float(table["residual"].abs().max()))
        for rank in range(p):
            kept = [table["residual"][rank] for table in tables if "residual" in table]
            rows = came[rank][place]
            if kept and rows.numel():
                rows += (sum(kept) / p).view(-1, *sizes[1:])[: len(rows)]
    far = [
        float((total - part(mean, rank, p)).abs().max())
        for rank in range(p)
        for total, mean in zip(came[rank], wanted, strict=True)
        if total.numel()
    ]
    return max(far), left


@pytest.mark.parametrize("p", [1, 2, 3, 5])
@pytest.mark.parametrize("codec", [Halves(), Shared(), Shared(seed=3)], ids=repr)
@pytest.mark.parametrize("options", [{}, {"within": True, "min_numel": 20}], ids=["", "within"])
def test_what_a_codec_misses_is_sent_later(p, codec, options):
    far, left = lost(lambda: hook(codec, **options), p)
    assert left > 0.1
    assert far < 1e-12


def test_what_a_codec_misses_is_gone_without_feedback():
    far, left = lost(lambda: hook(Halves(), feedback=False), 2)
    assert left == 0
    assert far > 0.1


@pytest.mark.parametrize("buckets", [1, 3])
def test_a_parameters_numbers_do_not_depend_on_its_bucket(buckets):
    whole = run(hook(Shared(seed=1)), 3, steps=3)
    for mine, theirs in zip(
        whole.gradients, run(hook(Shared(seed=1)), 3, steps=3, buckets=buckets).gradients, strict=True
    ):
        assert all(bitwise_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_chance_is_each_ranks_own_and_each_parts():
    """Equal gradients of equal rows: were the chances equal, so would the parts be, or the ranks' codes."""
    row = torch.linspace(-0.9, 1.0, 16, dtype=torch.float64)
    same = [[torch.cat([row] * 4).view(4, 16)] for _ in range(2)]
    result = commhub.simulate(hook(Shared(row=16, seed=0), feedback=False), same, sharded=True)
    first, second = (mine[0] for mine in result.gradients)
    assert not torch.equal(first, second)
    assert len(first.abs().unique()) > 2  # with one chance for both ranks it would be 0 or 1


def test_it_sends_half_of_what_two_steps_do():
    numel = 64 * 64
    gradients = [[torch.randn(64, 64)] for _ in range(4)]
    whole = commhub.simulate(hook(Halves(row=64)), gradients)
    parts = commhub.simulate(hook(Halves(row=64)), gradients, sharded=True)
    assert parts.sent_bytes == (3 / 4 * (numel + 64 * 4),) * 4
    assert whole.sent_bytes == (2 * parts.sent_bytes[0],) * 4
    assert parts.logical_bytes == whole.logical_bytes / 2


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_not_finite_in_one_part_is_remembered_nowhere(rank):
    def gradients(mine, step):
        given = drawn(mine, step)
        if (mine, step) == (rank, 1):
            given[0][0, 0] = float("inf")
        return given

    one = commhub.simulate(hook(Halves()), gradients, ranks=3, steps=1, sharded=True)
    two = commhub.simulate(hook(Halves()), gradients, ranks=3, steps=2, sharded=True)
    for before, after in zip(one.states, two.states, strict=True):
        before, after = before.export("local"), after.export("local")
        assert all(bitwise_equal(after[name]["residual"], before[name]["residual"]) for name in before)


@pytest.mark.parametrize("name", ["allreduce", "fp16", "bf16", "quantize_per_channel", "quantize_per_tensor"])
@pytest.mark.parametrize("p", [1, 2, 7])
def test_documented_hooks_are_near_the_mean(name, p):
    result = run(name, p, dtype=torch.float32)
    widest = {"allreduce": 1e-6, "fp16": 2**-11, "bf16": 2**-8}.get(name, 0.5 / 127)
    for rank, mine in enumerate(result.gradients):
        for mean, found in zip(means(p, 0, torch.float32), mine, strict=True):
            far = (found.double() - part(mean, rank, p)).abs()
            assert far.numel() == 0 or far.max() <= widest * 5 + 1e-6  # five is beyond the largest number drawn


def test_rules_leave_exact_what_they_say():
    result = run("fp16", 3, dtype=torch.float32, rules={"0": "dense", "5": "dense"})
    exact = run("allreduce", 3, dtype=torch.float32)
    for mine, theirs in zip(result.gradients, exact.gradients, strict=True):
        equal = [bitwise_equal(a, b) for a, b in zip(mine, theirs, strict=True) if a.numel() > 1]
        assert equal[0]
        assert not equal[2]


class Prepared:
    """Says what it is prepared for."""

    def prepare(self, setup):
        self.seen = setup.scatters, setup.shapes, setup.strides

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))

    def reduce_scatter(self, bucket):
        bucket.shard = yield ReduceScatter(bucket.flat)


def test_a_hook_is_told_that_it_scatters():
    gradients = [[torch.ones(5, 4)]] * 2
    (whole, _), (parts, _) = (commhub.simulate(Prepared(), gradients, sharded=s).hooks for s in (False, True))
    assert whole.seen == (False, ((5, 4),), ((4, 1),))
    assert parts.seen == (True, ((2, 3, 4),), ((12, 4, 1),))


class Wrong(Prepared):
    def __init__(self, what):
        self.what = what

    def reduce_scatter(self, bucket):
        if self.what == "segments":
            return bucket.segments
        if self.what == "part":
            bucket.part(bucket.parameters)
        mean = yield AllReduce(bucket.flat) if self.what == "shape" else ReduceScatter(bucket.flat)
        bucket.shard = mean.double() if self.what == "dtype" else mean


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("segments", "has no segments"),
        ("part", "cannot be parted"),
        ("shape", "in bucket.shard for shape (12,)"),
        ("dtype", "Cast it back"),
    ],
)
def test_what_is_wrong_is_said(what, said):
    with pytest.raises(commhub.HookError, match="rank") as raised:
        commhub.simulate(Wrong(what), [[torch.ones(5, 4)]] * 2, sharded=True)
    assert said in str(raised.value)


class Forgets(Prepared):
    def reduce_scatter(self, bucket):
        bucket.shard.copy_(bucket.parts[bucket.rank])


def test_a_method_that_is_no_generator_is_said():
    with pytest.raises(commhub.HookError, match=r"reduce_scatter\(\) returned NoneType"):
        commhub.simulate(Forgets(), [[torch.ones(5, 4)]] * 2, sharded=True)


def test_what_cannot_be_scattered_is_refused():
    with pytest.raises(commhub.HookOptionError, match="has no reduce_scatter"):
        commhub.simulate("noop", [[torch.ones(5, 4)]] * 2, sharded=True)
    with pytest.raises(commhub.HookOptionError, match="no dimension"):
        commhub.simulate("allreduce", [[torch.ones(())]] * 2, sharded=True)


class InAnother(Prepared):
    """The mean in another dtype, by the same bucket in it; what it would not send it keeps."""

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names)

    def reduce_scatter(self, bucket):
        for i, span in enumerate(bucket.spans):
            columns = slice(span.offset, span.offset + span.numel // bucket.world_size)
            pieces = self.feedback.add(bucket, i, bucket.parts[:, columns])
            sent = pieces.to(torch.bfloat16)
            self.feedback.keep(bucket, i, pieces - sent)
            pieces.copy_(sent)
        inner = bucket.to(torch.float64)
        gathered = yield AllGather(inner.flat)
        every = gathered.view(bucket.world_size, *inner.parts.shape)
        bucket.shard.copy_(every[:, bucket.rank].mean(0))


def test_a_hook_of_ones_own_with_feedback():
    far, left = lost(InAnother, 3, dtype=torch.float32)
    assert 0 < left < 0.1
    assert far < 1e-5
