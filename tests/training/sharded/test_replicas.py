"""A hook between the replicas of a model that FSDP2 shards: what comes out, and what the hook is given."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import commhub
from commhub import AllReduce
from commhub.testing import assert_equal_across_ranks

from .sharding import EVERY, Loop, Transformer, gradients, loss_of, mesh, parameters, same, sharded, whole


class Seen:
    """The plain mean, which writes down what it is given."""

    def __init__(self):
        self.buckets, self.setup = [], None

    def prepare(self, setup):
        self.setup = setup

    def reduce(self, bucket):
        shapes = [tuple(g.shape) for g in bucket.gradients]
        fit = [tuple(p.shape) for p in bucket.parameters] == shapes
        elements = sum(s.numel for s in bucket.spans) == bucket.flat.numel()
        self.buckets.append((bucket.step, bucket.index, bucket.names, shapes, bucket.flat.dtype, bucket.used))
        assert fit
        assert elements
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def against_native(hook, *, steps=4, loop=None, **options):
    """Whether a run with the hook is native HSDP's, bit by bit; and the number of synchronised steps."""
    on = mesh()
    native, _ = sharded(on, native=True, **options)
    hooked, registration = sharded(on, hook, **options)
    expected, found = (Loop(model, **(loop or {})).run(steps) for model in (native, hooked))
    assert all(any(g.abs().sum() > 0 for g in step.values()) for step in expected)
    return same(expected, found), registration.step


def long_run():
    return against_native("allreduce", steps=20)


def accumulates():
    return against_native("allreduce", steps=6, loop={"accumulate": 3})


def in_16_bits():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return against_native("allreduce", mp_policy=policy)


def reduced_in_16_bits():
    return against_native("allreduce", mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))


def computed_in_16_bits():
    return against_native("allreduce", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def keeps_parameters():
    return against_native("allreduce", reshard_after_forward=False)


def offloads():
    return against_native("allreduce", offload_policy=CPUOffloadPolicy(pin_memory=False))


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        (long_run, 20),
        (accumulates, 6),
        (reduced_in_16_bits, 4),
        *[(in_16_bits, 4), (computed_in_16_bits, 4), (keeps_parameters, 4), (offloads, 4)] * EVERY,
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_allreduce_between_replicas_is_native_hsdp_bit_for_bit(ranks, run, steps):
    assert ranks(run, 4) == [(True, steps)] * 4


def tied():
    return against_native("allreduce", make=lambda: Transformer(tied=True))


def frozen():
    def make():
        model = Transformer()
        model.embedding.requires_grad_(False)
        model.blocks[0].linear1.requires_grad_(False)
        return model

    return against_native("allreduce", make=make)


class Checkpointed(Transformer):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, numbers):
        x = self.embedding(numbers)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def checkpointed(reentrant):
    return against_native("allreduce", make=lambda: Checkpointed(reentrant))


def test_tied_and_frozen_parameters(ranks):
    assert ranks(tied, 4) == ranks(frozen, 4) == [(True, 4)] * 4


@pytest.mark.parametrize("reentrant", [False, True] if EVERY else [True])
def test_activation_checkpointing(ranks, reentrant):
    assert ranks(checkpointed, 4, reentrant) == [(True, 4)] * 4


def what_it_is_given():
    on = mesh()
    hook = Seen()
    model, _ = sharded(on, hook, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    local = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    loss_of(model, 0).backward()
    given = {name: shape for *_, names, shapes, _, _ in hook.buckets for name, shape in zip(names, shapes, strict=True)}
    setup = hook.setup
    return (
        given == local == dict(zip(setup.names, setup.shapes, strict=True)),
        {*setup.dtypes, *(dtype for *_, dtype, _ in hook.buckets)} == {torch.float64},
        [(step, index) for step, index, *_ in hook.buckets],
        (setup.rank, setup.world_size),
    )


def test_each_unit_is_a_bucket_of_this_ranks_shards_by_the_models_names(ranks):
    indices = [(0, 0), (0, 1), (0, 2)]
    assert ranks(what_it_is_given, 4) == [(True, True, indices, (rank // 2, 2)) for rank in range(4)]


class Uneven(nn.Module):
    """Parameters of 1, 3 and 5 rows, for two and for three shards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 5), nn.Linear(5, 3), nn.Linear(3, 1)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def uneven(shards):
    on = mesh(shards)
    native, _ = sharded(on, native=True, make=Uneven)
    hooked, registration = sharded(on, "allreduce", make=Uneven)
    runs = []
    for model in (native, hooked):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([parameters(model)])
    empty = sum(p.to_local().numel() == 0 for p in hooked.parameters())
    return same(*runs), empty, registration.step


def test_uneven_and_empty_shards(ranks):
    assert ranks(uneven, 4, 2) == [(True, empty, 5) for empty in (0, 2)] * 2
    assert ranks(uneven, 6, 3) == [(True, empty, 5) for empty in (0, 2, 2)] * 2


def divided(factor):
    """The gradients under a divide factor, and native HSDP's."""
    on, found = mesh(), []
    for native in (True, False):
        model, _ = sharded(on, "allreduce", native=native)
        for module in (model, *model.blocks):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(factor)
        loss_of(model, 0).backward()
        found.append([gradients(model)])
    return same(*found)


def test_a_divide_factor_divides_the_whole(ranks):
    assert ranks(divided, 4, 8.0) == [True] * 4


def no_sync():
    on, hook = mesh(), Seen()
    model, registration = sharded(on, hook)
    model.set_requires_gradient_sync(False)
    loss_of(model, 0).backward()
    before = len(hook.buckets), registration.step, registration.stats.last.sent_bytes
    model.set_requires_gradient_sync(True)
    loss_of(model, 1).backward()
    return before, len(hook.buckets), registration.step


def test_without_gradient_sync_nothing_is_sent_and_no_step_counts(ranks):
    assert ranks(no_sync, 4) == [((0, 0, 0.0), 3, 1)] * 4


def no_all_reduce(steps=3):
    """Two backwards of which the first is not all-reduced, against native HSDP."""
    on, found, count = mesh(), [], 0
    for native in (True, False):
        model, registration = sharded(on, "allreduce", native=native)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        seen = []
        for step in range(steps):
            for part in range(2):
                model.set_requires_all_reduce(part == 1)
                loss_of(model, 2 * step + part).backward()
            seen.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
        found.append([*seen, parameters(model)])
        count = 0 if registration is None else registration.step
    return same(*found), count


def test_without_all_reduce_shards_are_kept_until_the_next_exchange(ranks):
    assert ranks(no_all_reduce, 4) == [(True, 3)] * 4


def twice_backward():
    """Two backwards of one forward each, and two of one, against native HSDP."""
    on, found = mesh(), []
    for native in (True, False):
        model, registration = sharded(on, "allreduce", native=native)
        first, second = loss_of(model, 0), loss_of(model, 1)
        first.backward()
        second.backward()
        third = loss_of(model, 2)
        third.backward(retain_graph=True)
        third.backward()
        found.append([gradients(model)])
        steps = None if registration is None else registration.step
    return same(*found), steps


def test_several_backward_passes(ranks):
    assert ranks(twice_backward, 4) == [(True, 4)] * 4


def alike(hook):
    on = mesh()
    model, registration = sharded(on, hook)
    Loop(model).run(5)
    every = {name: p.full_tensor() for name, p in model.named_parameters()}
    assert_equal_across_ranks(every)
    return registration.step


HOOKS = ["powersgd(rank=1, start_step=0)", "bf16", "batched_powersgd(rank=1, start_step=0)"]
HOOKS += ["quantize_per_tensor(dense_small=false)"]


@pytest.mark.parametrize("hook", HOOKS if EVERY else HOOKS[:1])
@pytest.mark.parametrize("nproc", [2, 4])
def test_replicas_stay_bit_equal(ranks, hook, nproc):
    assert ranks(alike, nproc, hook) == [5] * nproc


def in_compiled():
    on, found = mesh(), []
    for native in (True, False):
        model = Transformer(blocks=1)
        for block in model.blocks:
            fully_shard(block, mesh=on if native else on["shard"])
        fully_shard(model, mesh=on if native else on["shard"])
        registration = None if native else commhub.register(model, "allreduce", process_group=on["replicate"])
        compiled = torch.compile(model, backend="aot_eager")
        assert native or commhub.registration(compiled) is registration
        for step in range(2):
            loss_of(compiled, step).backward()
        found.append([{name: whole(p.grad) for name, p in model.named_parameters()}])
    return same(*found), registration.step


def test_a_compiled_model(ranks):
    assert ranks(in_compiled, 4, timeout=120, fresh=True) == [(True, 2)] * 4


def removed():
    """After remove() everything of FSDP's is as it was: a hook of the user's own is called again."""
    on, called = mesh(), []
    model, _ = sharded(on)
    model.set_all_reduce_hook(lambda buffer: called.append(buffer.numel()))
    registration = commhub.register(model, "fp16", process_group=on["replicate"])
    loss_of(model, 0).backward()
    before = len(called)
    registration.remove()
    model.zero_grad()
    loss_of(model, 0).backward()
    plain, _ = sharded(on)
    loss_of(plain, 0).backward()
    names = [key for m in model.modules() for key in m.__dict__ if "commhub" in key]
    return before, len(called), same([gradients(model)], [gradients(plain)]), names, commhub.registration(model)


def test_remove_restores_what_was_there(ranks):
    assert ranks(removed, 4) == [(0, 1, True, [], None)] * 4


def sent(rank):
    """Bytes of a step of PowerSGD, and what the shapes of this rank's shards say."""
    on = mesh()
    model, registration = sharded(on, f"powersgd(rank={rank}, start_step=0, min_compression_rate=1)")
    for step in range(2):
        loss_of(model, step).backward()
    elements = 0
    for shard in (p.to_local() for p in model.parameters()):
        factors = rank * (shard.shape[0] + shard.numel() // max(shard.shape[0], 1))
        elements += factors if shard.dim() > 1 and factors < shard.numel() else shard.numel()
    return registration.stats.last.sent_bytes, 4.0 * elements


def test_powersgd_sends_what_the_shards_shapes_say(ranks):
    for bytes_sent, said in ranks(sent, 4, 2):
        assert bytes_sent == said
