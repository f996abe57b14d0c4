"""Nothing that is not finite is remembered, whatever a hook sends: codes, bytes, shares that differ between ranks."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter
from commhub.protocol._finite import all_finite
from commhub.toolkit import ErrorFeedback

INF, NAN = float("inf"), float("nan")
ROW = 8


def coded(rows):
    """Codes and scales of rows (n, ROW)."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return torch.nan_to_num(rows / torch.where(scale == 0, 1.0, scale)).round().to(torch.int8), scale


class Codes:
    """Sends 8-bit codes of rows with a scale each, to the ranks that own them, and their mean's to all."""

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names)

    def reduce(self, bucket):
        p, sizes = bucket.world_size, [s.numel() for s in bucket.segments]
        values = [self.feedback.compensated(bucket, i) for i in range(len(bucket.names))]
        whole = torch.cat(values)
        rows = nn.functional.pad(whole, (0, -len(whole) % (p * ROW))).view(-1, ROW)
        codes, scale = coded(rows)
        unsent = (rows - codes * scale).view(-1)[: len(whole)].split(sizes)
        theirs, scales = yield from self.send(AllToAll, codes, scale)
        mean = (theirs.float() * scales).view(p, -1, ROW).sum(0) / bucket.divisor
        codes, scale = coded(mean)
        found, scales = yield from self.send(AllGather, codes, scale)
        result = (found.float() * scales).view(-1)[: len(whole)].split(sizes)
        for i, error in enumerate(unsent):
            self.feedback.keep(bucket, i, error.clone())
            bucket.segments[i].copy_(result[i])

    def send(self, kind, codes, scale):
        codes, scale = yield kind(codes.view(-1)), kind(scale.view(-1))
        return codes.view(-1, ROW), scale.view(-1, 1)


class Bytes(Codes):
    """The same in one message of bytes: no result is a number."""

    def send(self, kind, codes, scale):
        message = torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], 1)
        rows = (yield kind(message.view(-1))).view(-1, ROW + 4)
        return rows[:, :ROW].contiguous().view(torch.int8), rows[:, ROW:].contiguous().view(torch.float32)


class KeepsFirst:
    """Remembers half of each gradient before anything is sent, and leaves a mean that each rank got for itself."""

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names)
        self.shared = setup.state.shared(setup.names[0])
        self.shared["last"] = torch.zeros(setup.shapes[0])

    def reduce(self, bucket):
        for i, _ in enumerate(bucket.names):
            self.feedback.keep(bucket, i, self.feedback.compensated(bucket, i).mul_(0.5).clone())
        mine = yield ReduceScatter(bucket.flat.repeat(bucket.world_size))
        bucket.flat.copy_(mine)
        self.shared["last"] = bucket.gradients[0] * 1.0


class Spoils:
    """Remembers what is not finite, though all that travels is; in each way there is of remembering."""

    def __init__(self, way="keep", dtype=None, loss_scale=1.0):
        self.way, self.dtype, self.loss_scale = way, dtype, loss_scale

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names, dtype=self.dtype)

    def reduce(self, bucket):
        bucket.loss_scale = self.loss_scale
        bucket.flat.copy_((yield AllReduce(torch.ones_like(bucket.flat))))
        error = torch.full_like(bucket.flat, 2.0)
        error[1] = (INF, NAN, 1e38)[bucket.step - 1] if bucket.step else 2.0
        if self.way == "written":
            self.feedback.writable(bucket, 0).copy_(error)
        elif self.way == "deposited":
            self.feedback.deposit(bucket, 0, 0, error)
        else:
            self.feedback.keep(bucket, 0, error)


class Weights(nn.Module):
    """Its gradients are what it is given."""

    def __init__(self, dtype):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape, dtype=dtype) for shape in ((8, 6), (50,), ())])

    def forward(self, gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def drawn(rank, step, dtype):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 6), (50,), ())]


def residuals(registration):
    table = registration.state_dict()["local"][f"rank{dist.get_rank()}"]
    return {f"{name}: {key}": tensor for name, one in table.items() for key, tensor in one.items()}


def striking(kind, dtype, scaled):
    """Three steps for each rank, value and parameter: a good one, one in which that rank's is struck, a good one."""
    rank, p = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Weights(dtype), bucket_cap_mb=1e-5)  # a bucket for each
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6) if scaled else None
    registration = commhub.register(model, kind(), scaler=scaler, timeout=20)
    scale, step = 8.0 if scaled else 1.0, 0

    def give(gradients):
        nonlocal step
        model.zero_grad()
        (scale * model(gradients)).backward()
        step += 1
        return [w.grad for w in model.module.weights]

    for struck, value, place in itertools.product(range(p), (INF, NAN), (0, 2)):
        where = f"{kind.__name__}, {value} in parameter {place} on rank {struck} of {p}"
        give(drawn(rank, step, dtype))
        before = residuals(registration)
        gradients = drawn(rank, step, dtype)
        if rank == struck:
            gradients[place].view(-1)[-1] = value
        found = give(gradients)
        assert not found[place].isfinite().all(), f"{where} is finite on rank {rank}"
        for key, kept in residuals(registration).items():
            assert kept.isfinite().all(), f"{where}: {key} is not finite"
            if scaled or key.startswith(f"weights.{place}"):
                assert torch.equal(kept, before[key]), f"{where}: {key} has changed in a step that does not count"
        waiting = residuals(registration)
        gradients = drawn(rank, step, dtype)
        found = give(gradients)
        for i, g in enumerate(gradients):
            own = g.float() + waiting.get(f"weights.{i}: residual", 0)
            dist.all_reduce(own)
            off, size = float((found[i].float() / scale - own / p).abs().max()), float(own.abs().max()) + 1.0
            assert off <= 0.02 * size, f"{where}: {off} of {size} in the step after"


CASES = [(Codes, torch.float32, False), (Bytes, torch.float32, False), (Bytes, torch.bfloat16, True)]


@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_what_is_not_finite_on_one_rank_reaches_all_and_leaves_every_residual_as_it_was(ranks, nproc):
    ranks(every_case, nproc, CASES)


def every_case(cases):
    for case in cases:
        striking(*case)


def test_what_is_remembered_before_anything_is_sent_is_forgotten_if_the_result_is_not_finite():
    def gradients(rank, step):
        return [torch.full((4,), INF if (rank, step) == (1, 1) else float(step + 1))]

    results = [commhub.simulate(KeepsFirst(), gradients, ranks=2, steps=steps) for steps in (1, 2, 3)]
    for rank in range(2):
        kept = [result.states[rank].local("0")["residual"].tolist() for result in results]
        assert kept == [[0.5] * 4, [0.5] * 4, [1.75] * 4]  # (3 + 0.5) / 2
        last = [result.states[rank].shared("0")["last"].tolist() for result in results]
        assert last == [[0.5] * 4, [0.5] * 4, [1.75] * 4]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("way", ["keep", "deposited"])
def test_an_error_that_is_not_finite_leaves_the_residual_as_it_was(way, scale):
    for steps in (2, 3):
        result = commhub.simulate(Spoils(way, loss_scale=scale), [[torch.zeros(3)]], steps=steps)
        assert result.states[0].local("0")["residual"].tolist() == [2.0 / scale] * 3


def test_an_error_that_is_beyond_the_residual_s_range_leaves_it_as_it_was():
    result = commhub.simulate(Spoils(dtype=torch.float16), [[torch.zeros(3)]], steps=4)
    assert result.states[0].local("0")["residual"].tolist() == [2.0] * 3


def test_what_is_written_into_a_residual_and_not_finite_becomes_zero():
    for steps in (2, 3):
        result = commhub.simulate(Spoils("written"), [[torch.zeros(3)]], steps=steps)
        assert result.states[0].local("0")["residual"].tolist() == [2.0, 0.0, 2.0]


class Looking:
    """Sends one kind of collective, and says after it what is known."""

    def __init__(self, kind, dtype, value):
        self.kind, self.dtype, self.value = kind, dtype, value

    def prepare(self, setup):
        setup.state.local("0")["something"] = torch.zeros(1)

    def reduce(self, bucket):
        payload = torch.ones(4, dtype=self.dtype)
        if bucket.rank == 1 and self.value is not None:
            payload[0] = torch.tensor(self.value).to(self.dtype)
        yield self.kind(payload, **({"op": "sum"} if self.kind in (AllReduce, ReduceScatter) else {}))
        self.finite, self.judged = bool(bucket.finite), bucket.judged
        bucket.flat.zero_()


FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)


@pytest.mark.parametrize("kind", [AllReduce, AllGather, Broadcast, AllToAll, ReduceScatter])
def test_a_bucket_is_judged_by_the_results_that_are_equal_everywhere(kind):
    alike = kind in (AllReduce, AllGather, Broadcast)
    for dtype, value in itertools.product((*FLOATING, torch.int32), (None, INF, NAN)):
        if dtype == torch.int32 and value is not None:
            continue
        arguments = {"src": 1} if kind is Broadcast else {}
        hook = Looking(partial(kind, **arguments) if arguments else kind, dtype, value)
        for each in commhub.simulate(hook, [[torch.zeros(2)]] * 2).hooks:
            assert each.judged == (alike and dtype != torch.int32), (dtype, value)
            assert each.finite == (value is None or not alike), (dtype, value)


def test_eight_bit_floats_are_looked_at_too():
    for value in (None, NAN):
        hook = Looking(AllGather, torch.float8_e4m3fn, value)
        assert [each.finite for each in commhub.simulate(hook, [[torch.zeros(2)]] * 2).hooks] == [value is None] * 2


def test_finite_numbers_whose_sum_is_beyond_their_range_are_finite():
    assert all_finite(torch.full((8,), 3e38))
    assert not all_finite(torch.tensor([3e38, 3e38, INF, -INF]))


def test_a_result_that_overflows_16_bits_under_a_loss_scale_is_not_remembered():
    class Wide:
        def prepare(self, setup):
            self.feedback = ErrorFeedback(setup, setup.names)

        def reduce(self, bucket):
            bucket.loss_scale = 2.0
            mean = yield AllReduce(bucket.flat.float() * 1.5)
            self.feedback.keep(bucket, 0, mean.clone())
            bucket.flat.copy_(mean)

    given = [torch.tensor([6e4, 1.0], dtype=torch.float16)]
    assert not commhub.simulate(Wide(), [given]).gradients[0][0].isfinite().all()
    assert commhub.simulate(Wide(), [given]).states[0].local("0")["residual"].tolist() == [0.0, 0.0]
    assert commhub.simulate(Wide(), [[given[0] / 2]]).states[0].local("0")["residual"].tolist() == [22500.0, 0.375]


class Widened:
    """Averages 16-bit gradients in float32, says that all is finite, and leaves what has no place in 16 bits."""

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names)

    def reduce(self, bucket):
        mean = yield AllReduce(bucket.flat.float())
        bucket.finite = bucket.finite & all_finite(mean)
        for i, segment in enumerate(bucket.segments):
            self.feedback.keep(bucket, i, segment.float() * 0.5)
        bucket.flat.copy_(mean * 4)


def test_a_result_that_overflows_in_16_bits_leaves_residuals_as_they_were():
    def gradients(_rank, step):
        return [torch.full((8,), 1.0 if step == 0 else 6e4, dtype=torch.float16)]

    for steps in (1, 2):
        run = commhub.simulate(Widened(), gradients, ranks=2, steps=steps)
        assert bool(run.gradients[0][0].isfinite().all()) == (steps == 1)
        assert all(torch.equal(state.local("0")["residual"], torch.full((8,), 0.5)) for state in run.states)
