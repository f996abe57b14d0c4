"""What hooks remember: kept by parameter name, committed by finite steps only; and error feedback on top of it."""

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce, Bucket, Setup, State
from commhub.protocol._spans import lay_out
from commhub.testing import bitwise_equal
from commhub.toolkit._feedback import ErrorFeedback

MANY = 1e-6  # a bucket for each parameter, from the second step on

# State by itself.


@pytest.fixture
def state():
    return State(("w", "b"))


def test_what_prepare_assigns_counts_at_once(state):
    state.local("w")["residual"] = torch.ones(2)
    assert torch.equal(state.local("w")["residual"], torch.ones(2))
    assert state.export("local").keys() == {"w"}


def test_what_a_step_assigns_is_seen_in_it_and_kept_by_a_finite_end(state):
    state.shared("w")["q"] = torch.zeros(2)
    state.begin()
    state.shared("w")["q"] = torch.ones(2)
    assert torch.equal(state.shared("w")["q"], torch.ones(2))
    assert torch.equal(state.export("shared")["w"]["q"], torch.zeros(2))
    state.commit(torch.tensor(True))
    assert torch.equal(state.export("shared")["w"]["q"], torch.ones(2))


@pytest.mark.parametrize(
    "end",
    [lambda state: state.commit(torch.tensor(False)), lambda state: state.commit(False), State.rollback],
    ids=["tensor", "bool", "rollback"],
)
def test_what_a_step_assigns_is_dropped_by_a_non_finite_end_and_by_a_failure(state, end):
    state.shared("w")["q"] = torch.zeros(2)
    state.begin()
    state.shared("w")["q"] = torch.ones(2)
    state.shared("b")["new"] = torch.ones(1)
    end(state)
    assert torch.equal(state.shared("w")["q"], torch.zeros(2))
    assert "new" not in state.shared("b")
    state.begin()
    assert torch.equal(state.shared("w")["q"], torch.zeros(2))


def test_local_and_shared_and_inner_memories_never_meet(state):
    inner, deeper = state.inner("fp16"), state.inner("fp16").inner("deep")
    for number, one in enumerate((state.local, state.shared, inner.local, inner.shared, deeper.local)):
        assert "x" not in one("w")
        one("w")["x"] = torch.tensor(number)
    for number, one in enumerate((state.local, state.shared, inner.local, inner.shared, deeper.local)):
        assert one("w")["x"].item() == number
    assert list(deeper.local("w")) == ["x"]
    assert state.export("local")["w"].keys() == {"x", "fp16/x", "fp16/deep/x"}


def test_the_entries_of_a_parameter_are_a_mapping(state):
    entries = state.local("w")
    entries.update(a=torch.zeros(1), b=torch.ones(1))
    state.begin()
    entries["c"] = torch.ones(1)
    assert (list(entries), len(entries), "c" in entries, "d" in entries) == (["a", "b", "c"], 3, True, False)
    assert entries.get("d") is None
    with pytest.raises(KeyError):
        entries["d"]
    state.commit(True)
    del entries["a"]
    assert list(state.local("w")) == ["b", "c"]


def test_an_unknown_parameter_is_refused_by_name(state):
    for one in (state.local, state.shared, state.inner("i").local):
        with pytest.raises(KeyError, match="no parameter 'v'"):
            one("v")


def test_only_tensors_are_kept(state):
    with pytest.raises(TypeError, match=r"'w'.*'count' is int; keep tensors"):
        state.local("w")["count"] = 3


def test_restoring_refuses_what_does_not_fit_and_changes_nothing(state):
    state.local("w").update(a=torch.zeros(2), b=torch.zeros(2))
    good = {"w": {"a": torch.ones(2), "b": torch.ones(2)}}
    for bad, message in (
        ({"w": {"a": torch.ones(2)}}, "'b' of parameter 'w' is missing"),
        ({"w": {**good["w"], "c": torch.ones(1)}}, "'c' of parameter 'w' is saved but not kept"),
        ({"w": {"a": torch.ones(2), "b": torch.ones(3)}}, r"\(3,\) torch.float32; here it is \(2,\)"),
        ({"w": {"a": torch.ones(2), "b": torch.ones(2).double()}}, "float64"),
        ({"w": {"a": torch.ones(2), "b": 1.0}}, "float"),
        ({}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            state.restore("local", bad)
        assert not state.local("w")["a"].any()
    state.restore("local", good)
    assert state.local("w")["b"].all()


# State under a hook.


class Remembers:
    """Averages, and keeps the sum of all averages twice: once for all ranks, once of this rank's own."""

    def prepare(self, setup):
        self.state = setup.state
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
            self.state.shared(name)["sum"] = torch.zeros(shape, dtype=dtype)
            self.state.local(name)["sum"] = torch.zeros(shape, dtype=dtype)

    def reduce(self, bucket):
        for name, gradient in zip(bucket.names, bucket.gradients, strict=True):
            self.state.local(name)["sum"] = self.state.local(name)["sum"] + gradient
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
        for name, gradient in zip(bucket.names, bucket.gradients, strict=True):
            self.state.shared(name)["sum"] = self.state.shared(name)["sum"] + gradient


@pytest.mark.parametrize("buckets", [1, 2])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_non_finite_gradient_anywhere_keeps_the_whole_step_out_of_every_rank_s_memory(buckets, value):
    def gradients(rank, step):
        first, second = torch.full((2,), 1.0 + rank), torch.ones(3)
        if step == 1 and rank == 1:
            first[0] = value
        return [first, second]

    result = commhub.simulate(Remembers(), gradients, ranks=2, steps=3, buckets=buckets)
    for rank, state in enumerate(result.states):
        assert state.shared("0")["sum"].tolist() == [3.0] * 2
        assert state.shared("1")["sum"].tolist() == [2.0] * 3
        assert state.local("0")["sum"].tolist() == [2.0 + 2 * rank] * 2
        assert state.local("1")["sum"].tolist() == [2.0] * 3


# Error feedback.


def kit(tensors, used=None, scale=1.0):
    """A bucket over these gradients, and error feedback for all of them."""
    names = tuple(f"p{i}" for i in range(len(tensors)))
    spans = lay_out(names, tensors)
    bucket = Bucket(
        flat=torch.cat([t.as_strided((t.numel(),), (1,)).clone() for t in tensors]),
        parameters=tuple(tensors),
        used=used or (True,) * len(tensors),
        index=0,
        step=0,
        divisor=1,
        rank=0,
        world_size=1,
        loss_scale=scale,
        spans=spans,
    )
    setup = Setup(
        names=names,
        shapes=tuple(s.shape for s in spans),
        dtypes=tuple(t.dtype for t in tensors),
        strides=tuple(s.stride for s in spans),
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        hosts=(0,),
        state=State(names),
        connect=lambda groups: (),
        after_step=lambda function: None,
    )
    return bucket, ErrorFeedback(setup, names), setup.state, setup


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
def test_a_residual_has_the_wider_of_float32_and_the_gradient_s_dtype(dtype, kept):
    bucket, feedback, state, _ = kit([torch.ones(3, dtype=dtype)])
    values = feedback.compensated(bucket, 0)
    assert values.dtype == state.local("p0")["residual"].dtype == kept
    feedback.keep(bucket, 0, torch.full((3,), 2.0**-20, dtype=kept))
    again = feedback.compensated(bucket, 0)
    assert torch.equal(again, (torch.ones(3, dtype=kept) + 2.0**-20))


def test_a_residual_has_the_parameter_s_strides_and_is_added_element_by_element():
    weight = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    bucket, feedback, state, _ = kit([weight, torch.arange(6.0).view(2, 3).t()])
    for i in range(2):
        feedback.keep(bucket, i, bucket.segments[i] * 0.5)
        residual = state.local(f"p{i}")["residual"]
        assert residual.stride() == bucket.parameters[i].stride()
        assert torch.equal(residual, bucket.parameters[i] * 0.5)
        feedback.compensated(bucket, i)
        assert torch.equal(bucket.gradients[i], bucket.parameters[i] * 1.5)


def test_the_residual_of_an_unused_parameter_waits():
    bucket, feedback, state, _ = kit([torch.ones(2), torch.ones(2)], used=(True, False))
    for i in range(2):
        state.local(f"p{i}")["residual"].fill_(0.25)
    assert feedback.compensated(bucket, 0).tolist() == [1.25, 1.25]
    assert feedback.compensated(bucket, 1).tolist() == [1.0, 1.0]
    for i in range(2):
        feedback.keep(bucket, i, torch.full((2,), 0.5))
    assert state.local("p0")["residual"].tolist() == [0.5, 0.5]
    assert state.local("p1")["residual"].tolist() == [0.25, 0.25]


def test_a_non_finite_bucket_leaves_the_residual_as_it_was():
    bucket, feedback, state, _ = kit([torch.ones(2)])
    state.local("p0")["residual"].fill_(0.25)
    bucket.finite = torch.tensor(False)
    feedback.keep(bucket, 0, torch.tensor([float("nan"), float("inf")]))
    assert state.local("p0")["residual"].tolist() == [0.25, 0.25]


def test_residuals_are_stored_unscaled_whatever_the_loss_scale():
    bucket, feedback, state, _ = kit([torch.full((2,), 8.0)], scale=8.0)
    feedback.keep(bucket, 0, torch.full((2,), 2.0))
    assert state.local("p0")["residual"].tolist() == [0.25, 0.25]
    assert feedback.compensated(bucket, 0).tolist() == [10.0, 10.0]


def test_only_named_parameters_have_a_residual():
    setup = kit([torch.ones(2), torch.ones(2)])[3]
    setup = attrs.evolve(setup, state=State(setup.names))
    ErrorFeedback(setup, ["p1"])
    assert setup.state.export("local").keys() == {"p1"}
    with pytest.raises(KeyError):
        ErrorFeedback(setup, ["nobody"])


def top_half(values):
    """The upper half of each number's bits: what TopHalf sends."""
    if values.dtype == torch.float64:
        return values.float().double()
    return values.view(torch.int32).bitwise_and(-65536).view(torch.float32)


class TopHalf:
    """Sends the upper 16 bits of each number and keeps the rest for the next step."""

    def __init__(self):
        self.own = []

    def prepare(self, setup):
        self.feedback = ErrorFeedback(setup, setup.names)

    def reduce(self, bucket):
        values = [self.feedback.compensated(bucket, i) for i in range(len(bucket.names))]
        sent = [top_half(v) for v in values]
        errors = [v - s for v, s in zip(values, sent, strict=True)]
        self.own.append(dict(zip(bucket.names, sent, strict=True)))
        mean = yield AllReduce(torch.cat(sent))
        for i, error in enumerate(errors):
            self.feedback.keep(bucket, i, error)
        bucket.flat.copy_(mean)


@pytest.mark.parametrize("buckets", [1, 3])
def test_the_residual_is_gradient_plus_residual_minus_own_contribution_at_every_step(buckets):
    generator = torch.Generator().manual_seed(0)
    drawn = [[[torch.randn(5, generator=generator) for _ in range(3)] for _ in range(50)] for _ in range(2)]
    result = commhub.simulate(TopHalf(), lambda rank, step: drawn[rank][step], ranks=2, steps=50, buckets=buckets)
    for rank in range(2):
        for name in range(3):
            residual = torch.zeros(5)
            for step in range(50):
                whole = drawn[rank][step][name] + residual
                residual = whole - top_half(whole)
            assert bitwise_equal(residual, result.states[rank].local(str(name))["residual"])
            assert residual.any()
    # All that was ever given has been sent, or is in the residuals.
    for name in range(3):
        given = sum(drawn[rank][step][name].double() for rank in range(2) for step in range(50))
        sent = sum(part[str(name)].double() for hook in result.hooks for part in hook.own if str(name) in part)
        left = sum(state.local(str(name))["residual"].double() for state in result.states)
        torch.testing.assert_close(sent + left, given, rtol=0, atol=1e-4)


def test_residuals_stay_bounded_where_ranks_pull_in_opposite_directions():
    def gradients(rank, step):
        return [torch.linspace(0.1, 1.1, 7) * (1 if rank else -1)]

    result = commhub.simulate(TopHalf(), gradients, ranks=2, steps=2000)
    for state in result.states:
        assert state.local("0")["residual"].abs().max() < 2.0**-6
    assert result.gradients[0][0].abs().max() < 2.0**-6


# On real ranks.


class Given(nn.Module):
    """Parameters whose gradient is what `forward` is given; None leaves one out."""

    def __init__(self, count=2):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(4) for _ in range(count))

    def forward(self, *gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True) if g is not None)


def step(model, *gradients):
    model.zero_grad()
    model(*gradients).backward()


class Scaler:
    """The part of a GradScaler that matters."""

    scale, enabled = 8.0, True

    def get_scale(self):
        return self.scale

    def is_enabled(self):
        return self.enabled


def drawn(rank, number):
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return [torch.randn(4, generator=generator) for _ in range(2)]


def residuals(registration):
    tables = registration.state_dict()["local"][f"rank{dist.get_rank()}"]
    return {name: table["residual"] for name, table in tables.items()}


def scaled(cap):
    plain, model = (DistributedDataParallel(Given(), bucket_cap_mb=cap) for _ in range(2))
    scaler = Scaler()
    reference = commhub.register(plain, TopHalf())
    registration = commhub.register(model, TopHalf(), scaler=scaler)
    for number in range(8):
        scaler.scale = 2.0 ** (4 + number // 3)  # it grows while training goes on
        mine = drawn(dist.get_rank(), number)
        step(plain, *mine)
        step(model, *(g * scaler.scale for g in mine))
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            assert bitwise_equal(a.grad * scaler.scale, b.grad)
    a, b = residuals(reference), residuals(registration)
    assert all(a[name].any() and bitwise_equal(a[name], b[name]) for name in a)
    scaler.enabled, scaler.scale = False, 64.0
    mine = drawn(dist.get_rank(), 9)
    step(plain, *mine)
    step(model, *mine)
    assert all(bitwise_equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
def test_a_loss_scale_that_changes_leaves_residuals_as_without_one(ranks, cap):
    ranks(scaled, 2, cap)


def skipped(cap):
    model = DistributedDataParallel(Given(), bucket_cap_mb=cap)
    registration = commhub.register(model, TopHalf(), scaler=Scaler())
    rank = dist.get_rank()
    for number in range(3):
        step(model, *drawn(rank, number))
    before = residuals(registration)
    first, second = drawn(rank, 3)
    if rank == 1:
        first[2] = float("inf")
    step(model, first, second)
    after = residuals(registration)
    assert not torch.isfinite(model.module.weights[0].grad).all()
    return {name: bitwise_equal(before[name], after[name]) for name in before}


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
def test_a_step_that_a_loss_scaler_skips_keeps_all_residuals(ranks, cap):
    assert ranks(skipped, 2, cap) == [{"weights.0": True, "weights.1": True}] * 2


def waiting(cap):
    model = DistributedDataParallel(Given(), find_unused_parameters=True, bucket_cap_mb=cap)
    registration = commhub.register(model, TopHalf())
    rank = dist.get_rank()
    step(model, *drawn(rank, 0))
    before = residuals(registration)["weights.1"]
    (first, second), (_, theirs) = drawn(rank, 1), drawn(0, 1)
    step(model, first, None if rank == 1 else second)
    after = residuals(registration)["weights.1"]
    assert bitwise_equal(before, after) == (rank == 1)
    zeroth = drawn(0, 0)[1]
    whole = theirs + (zeroth - top_half(zeroth))  # rank 0's alone: rank 1 brought neither gradient nor residual
    assert bitwise_equal(model.module.weights[1].grad, top_half(whole) * 0.5)


@pytest.mark.parametrize("cap", [25, MANY], ids=["one bucket", "many buckets"])
def test_a_parameter_unused_on_one_rank_keeps_its_residual_there(ranks, cap):
    ranks(waiting, 2, cap)


def rebuilt():
    model = DistributedDataParallel(Given(6), bucket_cap_mb=MANY)
    registration = commhub.register(model, TopHalf())
    rank, kept = dist.get_rank(), {f"weights.{i}": torch.zeros(4) for i in range(6)}
    for number in range(4):
        mine = [drawn(rank, 10 * number + i)[0] for i in range(6)]
        step(model, *mine)
        for (name, residual), gradient in zip(kept.items(), mine, strict=True):
            whole = gradient + residual
            kept[name] = whole - top_half(whole)
    found = residuals(registration)
    assert all(bitwise_equal(found[name], kept[name]) for name in kept)


def test_residuals_follow_their_parameters_when_buckets_are_rebuilt(ranks):
    ranks(rebuilt, 2)
