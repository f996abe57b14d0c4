"""A hook in place of the reduce-scatter of a model that FSDP2 shards: what comes out, and what the hook is given."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import commhub
from commhub import ReduceScatter
from commhub.testing import current
from commhub.testing._recorded import Recorder

from .sharding import EVERY, Loop, Transformer, gradients, inside, loss_of, parameters, same, whole
from .test_replicas import Checkpointed, Uneven

QUANTIZED = "quantize_per_channel(dense_small=False, group_size=32)"


class Seen:
    """The plain mean of this rank's part, which writes down what it is given."""

    def __init__(self):
        self.buckets, self.setup = [], None

    def prepare(self, setup):
        self.setup = setup

    def reduce(self, bucket):
        raise AssertionError("reduce_scatter is called here")

    def reduce_scatter(self, bucket):
        local = [tuple(g.shape) for g in bucket.gradients]
        pieces = torch.cat([g.flatten(1) for g in bucket.gradients], dim=1)
        assert torch.equal(pieces, bucket.parts)
        assert bucket.parts.data_ptr() == bucket.flat.data_ptr()
        self.buckets.append((bucket.step, bucket.index, bucket.names, local, bucket.shard.shape, bucket.used))
        bucket.shard.copy_((yield ReduceScatter(bucket.flat)))


def against_native(hook, *, steps=4, loop=None, **options):
    """Whether a run with the hook is native FSDP's, bit by bit; and the number of steps."""
    native, _ = inside(**options)
    hooked, registration = inside(hook, **options)
    expected, found = (Loop(model, **(loop or {})).run(steps) for model in (native, hooked))
    assert all(any(g.abs().sum() > 0 for g in step.values()) for step in expected)
    return same(expected, found), registration.step


def long_run():
    return against_native("allreduce", steps=20)


def accumulates():
    return against_native("allreduce", steps=6, loop={"accumulate": 3})


def computed_in_16_bits():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return against_native("allreduce", mp_policy=policy)


def reduced_in_float16():
    return against_native("allreduce", mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))


def keeps_parameters():
    return against_native("allreduce", reshard_after_forward=False)


def offloads():
    return against_native("allreduce", offload_policy=CPUOffloadPolicy(pin_memory=False))


def tied():
    return against_native("allreduce", make=lambda: Transformer(tied=True))


def frozen():
    def make():
        model = Transformer()
        model.embedding.requires_grad_(False)
        model.blocks[0].linear1.requires_grad_(False)
        return model

    return against_native("allreduce", make=make)


def checkpointed():
    return against_native("allreduce", make=lambda: Checkpointed(True))


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        (long_run, 20),
        (accumulates, 6),
        (reduced_in_float16, 4),
        (tied, 4),
        *[(run, 4) for run in (computed_in_16_bits, keeps_parameters, offloads, frozen, checkpointed)] * EVERY,
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_allreduce_on_two_ranks_is_native_fsdp_bit_for_bit(ranks, run, steps):
    assert ranks(run, 2) == [(True, steps)] * 2


def first_gradients(hook, **options):
    """This rank's shards of the first gradient, with the hook, without it, and in float64 on all ranks' data."""
    found = []
    for one in (None, hook):
        model, _ = inside(one, **options)
        loss_of(model, 0).backward()
        found.append(gradients(model))
    exact = Transformer().double()
    each = []
    for rank in range(dist.get_world_size()):
        exact.zero_grad()
        loss_of(exact, 0, rank).backward()
        each.append({name: part_of(p.grad).clone() for name, p in exact.named_parameters()})
    return *found, each


def part_of(gradient):
    """This rank's rows."""
    rank, p = dist.get_rank(), dist.get_world_size()
    rows = -(-len(gradient) // p)
    return gradient[rank * rows : (rank + 1) * rows]


def distances(hook):
    """The largest distance from the float64 mean, of native FSDP and of the hook, in units of the largest gradient."""
    native, found, each = first_gradients(hook)
    p, largest = len(each), max(float(g.abs().max()) for one in each for g in one.values())
    means = {name: sum(one[name] for one in each) / p for name in native}
    return [max(float((x[n] - means[n]).abs().max()) for n in x) / largest for x in (native, found)]


@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_allreduce_is_as_near_to_the_mean_in_float64_as_native_fsdp(ranks, nproc):
    for native, found in ranks(distances, nproc, "allreduce"):
        assert native < 1e-5
        assert found < 2 * native + torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("hook", "bits"), [("fp16", 11), ("bf16", 8)])
@pytest.mark.parametrize("nproc", [2, 4])
def test_casts_round_once(ranks, hook, bits, nproc):
    for _, found in ranks(distances, nproc, hook):
        assert 0 < found < 2.0**-bits + 1e-5  # each share of the mean to the nearest, and their sum in float32


def coded_plainly(bits):
    """How far the result is from the mean of each rank's codes: rows of 32 of each rank's part, rounded to nearest."""
    hook = f"quantize_per_channel(bits={bits}, dense_small=False, group_size=32, error_feedback=False)"
    model, registration = inside(hook)
    loss_of(model, 0).backward()
    found, top = gradients(model), 2 ** (bits - 1) - 1
    whole_model = Transformer()
    total = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in found.items()}
    exact = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in found.items()}
    p = dist.get_world_size()
    for rank in range(p):
        whole_model.zero_grad()
        loss_of(whole_model, 0, rank).backward()
        for name, q in whole_model.named_parameters():
            mine = part_of(q.grad)
            exact[name] += mine.double() / p
            rows = nn.functional.pad(mine.flatten().double(), (0, -mine.numel() % 32)).view(-1, 32)
            scale = rows.abs().amax(1, keepdim=True) / top
            codes = torch.where(scale > 0, (rows / scale).round(), 0)
            total[name] += (codes * scale).flatten()[: mine.numel()].view_as(mine) / p
    far = max(float((found[n] - total[n]).abs().max()) for n in found)
    lost = max(float((exact[n] - total[n]).abs().max()) for n in found)
    return far, lost, registration.stats.last.sent_bytes


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("nproc", [2, 4])
def test_quantized_parts_are_those_of_the_plain_algorithm(ranks, bits, nproc):
    for far, lost, sent in ranks(coded_plainly, nproc, bits):
        # A value that lies between two codes but for the last bit of its float32 may be rounded to either.
        assert far < lost / 20
        assert sent > 0


def units_of(model):
    """Elements of each parameter's piece of a rank's part, unit by unit."""
    p, in_blocks = dist.get_world_size(), {id(q) for block in model.blocks for q in block.parameters()}
    units = [list(block.parameters()) for block in model.blocks]
    units.append([q for q in model.parameters() if id(q) not in in_blocks])
    return [[-(-q.shape[0] // p) * q[0].numel() for q in unit] for unit in units]


def share(unit, hook):
    """Bytes that a rank sends another for a unit: elements, or rows of 32 codes and their scales, 16 bytes aligned."""
    if hook != QUANTIZED:
        return sum(unit) * {"allreduce": 4, "fp16": 2}[hook]
    rows = sum(-(-numel // 32) for numel in unit)
    return sum(-(-size // 16) * 16 for size in (rows * 32, rows * 4))


def payloads(hook):
    """What a step sent, as torch's flight recorder says, as commhub does, and as shapes do; as plain elements, too."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"
    me = current()
    dist.init_process_group("gloo", store=me.store, rank=me.rank, world_size=me.world_size)
    p, units = dist.get_world_size(), units_of(Transformer())
    model, registration = inside(hook)
    recorder = Recorder()
    for step in range(3):
        model.zero_grad()
        loss_of(model, step).backward()
    seen, stats = recorder.sent_bytes(p), registration.stats
    dist.barrier()
    dist.destroy_process_group()
    said, plain = ((p - 1) * sum(share(unit, how) for unit in units) for how in (hook, "allreduce"))
    return seen / 3, stats.last.sent_bytes, said, stats.last.logical_bytes, plain


@pytest.mark.parametrize(("nproc", "hook"), [(2, QUANTIZED), (3, "fp16"), *[(3, QUANTIZED), (4, "allreduce")] * EVERY])
def test_sent_bytes_are_p_minus_1_of_p_of_the_payload_and_those_of_the_flight_recorder(ranks, nproc, hook):
    for seen, sent, said, logical, plain in ranks(payloads, nproc, hook, init=False, fresh=True):
        assert seen == sent == said
        assert logical == plain


def what_it_is_given():
    hook, p = Seen(), dist.get_world_size()
    model, _ = inside(hook, make=Uneven)
    model(torch.ones(2, 16)).sum().backward()
    names = [name for name, _ in Uneven().named_parameters()]
    shapes = {name: (p, -(-q.shape[0] // p), *q.shape[1:]) for name, q in Uneven().named_parameters()}
    setup = hook.setup
    given = {name: shape for *_, names, local, _, _ in hook.buckets for name, shape in zip(names, local, strict=True)}
    return (
        list(setup.names) == names,
        dict(zip(setup.names, setup.shapes, strict=True)) == shapes == given,
        setup.scatters,
        [(step, index) for step, index, *_ in hook.buckets],
        all(
            shard.numel() * p == sum(map(torch.Size.numel, map(torch.Size, local)))
            for *_, local, shard, _ in hook.buckets
        ),
    )


@pytest.mark.parametrize("nproc", [2, 3])
def test_each_unit_is_a_bucket_of_every_ranks_part(ranks, nproc):
    indices = [(0, 0), (0, 1), (0, 2)]
    assert ranks(what_it_is_given, nproc) == [(True, True, True, indices, True)] * nproc


def uneven(hook):
    """Five steps of SGD on parameters of 1, 3 and 5 rows; how far from native FSDP's."""
    runs = []
    for one in (None, hook):
        model, registration = inside(one, make=Uneven)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(parameters(model))
    far = max([float((runs[0][n] - runs[1][n]).abs().max()) for n in runs[0] if runs[0][n].numel()], default=0.0)
    empty = sum(t.numel() == 0 for t in runs[1].values())
    return far, empty, registration.step


@pytest.mark.parametrize("nproc", [2, 3, 4] if EVERY else [4])
def test_uneven_and_empty_shards(ranks, nproc):
    results = ranks(uneven, nproc, "allreduce")
    assert all(far < 1e-5 and step == 5 for far, _, step in results)
    assert nproc == 2 or any(empty for _, empty, _ in results)
    assert all(far < 0.05 for far, *_ in ranks(uneven, nproc, QUANTIZED))


def divided(factor, sums):
    """The gradients under a divide factor: with the hook, and native FSDP's, which on Gloo can only sum."""
    found = []
    for hook in (None, "allreduce"):
        model, _ = inside(hook)
        for module in (model, *model.blocks):
            module.set_force_sum_reduction_for_comms(hook is None or sums)
            module.set_gradient_divide_factor(factor)
        loss_of(model, 0).backward()
        found.append([gradients(model)])
    return same(*found)


@pytest.mark.parametrize("sums", [False, True])
def test_a_divide_factor_divides_the_sum(ranks, sums):
    assert ranks(divided, 2, 8.0, sums) == [True] * 2


def no_sync():
    hook = Seen()
    model, registration = inside(hook)
    model.set_requires_gradient_sync(False)
    loss_of(model, 0).backward()
    before = len(hook.buckets), registration.step, registration.stats.last.sent_bytes
    model.set_requires_gradient_sync(True)
    loss_of(model, 1).backward()
    return before, len(hook.buckets), registration.step


def test_without_gradient_sync_nothing_is_sent_and_no_step_counts(ranks):
    assert ranks(no_sync, 2) == [((0, 0, 0.0), 3, 1)] * 2


class Optional(nn.Module):
    """Two layers, of which a rank may leave one parameter out; and a gradient of zeros for those that do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 8), nn.Linear(8, 4)])

    def forward(self, x, *, biased=True):
        first, second = self.blocks
        x = first(x)
        return second(x) if biased else nn.functional.linear(x, second.weight)


def unused(everywhere):
    """A step in which one rank, or each, leaves a parameter out, with and without the hook."""
    found = []
    for hook in (None, "allreduce"):
        model = Optional()
        fully_shard(model.blocks[0])
        fully_shard(model)
        model.set_reduce_scatter_unused_params(not everywhere)
        registration = None if hook is None else commhub.register(model, hook)
        for _ in range(2):
            model.zero_grad()
            biased = not everywhere and dist.get_rank() == 0
            model(torch.ones(2, 16) + dist.get_rank(), biased=biased).sum().backward()
        found.append([gradients(model)])
    return same(*found), "blocks.1.bias" in found[0][0], registration.step


@pytest.mark.parametrize("everywhere", [False, True])
def test_parameters_without_gradients(ranks, everywhere):
    assert ranks(unused, 2, everywhere) == [(True, not everywhere, 2)] * 2


def unfrozen_later(hook):
    """Parameters that are trained only after register come by a plain mean."""
    model = Transformer()
    model.blocks[1].linear1.requires_grad_(False)
    native = Transformer()
    for one in (model, native):
        for block in one.blocks:
            fully_shard(block)
        fully_shard(one)
    registration = commhub.register(model, hook)
    loss_of(model, 0).backward()
    model.zero_grad()
    model.blocks[1].linear1.requires_grad_(True)
    for one in (model, native):
        loss_of(one, 1).backward()
    found, expected = gradients(model), gradients(native)
    exact = [name for name in found if torch.equal(found[name], expected[name])]
    return "blocks.1.linear1.weight" in exact, len(exact) == len(found), registration.step


def test_parameters_that_are_trained_later_are_averaged_plainly(ranks):
    assert ranks(unfrozen_later, 2, "allreduce") == [(True, True, 2)] * 2
    assert ranks(unfrozen_later, 2, QUANTIZED) == [(True, False, 2)] * 2


def alone():
    native, _ = inside()
    model, registration = inside("allreduce")
    return same(Loop(native).run(3), Loop(model).run(3)), registration.step


def test_one_rank(ranks):
    assert ranks(alone, 1) == [(True, 3)]


def in_compiled():
    found = []
    for hook in (None, "allreduce"):
        model, registration = inside(hook, make=lambda: Transformer(blocks=1))
        compiled = torch.compile(model, backend="aot_eager")
        for step in range(2):
            loss_of(compiled, step).backward()
        found.append([{name: whole(p.grad) for name, p in model.named_parameters()}])
    return same(*found), registration.step


def test_a_compiled_model(ranks):
    assert ranks(in_compiled, 2, timeout=120, fresh=True) == [(True, 2)] * 2


class Custom:
    """Somebody's own reduce-scatter."""

    def __init__(self):
        self.calls = 0

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.calls += 1
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def removed():
    """After remove() everything of FSDP's is as it was: a reduce-scatter of the user's own is called again."""
    custom = Custom()
    model, _ = inside()
    for module in (model, *model.blocks):
        module.set_custom_reduce_scatter(custom)
    registration = commhub.register(model, "fp16")
    loss_of(model, 0).backward()
    before = custom.calls
    registration.remove()
    model.zero_grad()
    loss_of(model, 0).backward()
    plain, _ = inside()
    loss_of(plain, 0).backward()
    names = [key for m in model.modules() for key in m.__dict__ if "commhub" in key]
    return before, custom.calls, same([gradients(model)], [gradients(plain)]), names, commhub.registration(model)


def test_remove_restores_what_was_there(ranks):
    assert ranks(removed, 2) == [(0, 3, True, [], None)] * 2


def many_times(rounds, blocks):
    """Registered, trained, swapped, trained and removed, again and again; native FSDP each time."""
    native, _ = inside(make=lambda: Transformer(blocks))
    model, _ = inside(make=lambda: Transformer(blocks))
    loops = [Loop(one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1)) for one in (model, native)]
    far = 0.0
    for _ in range(rounds):
        registration = commhub.register(model, QUANTIZED, timeout=30)
        loops[0].run(1)
        with torch.no_grad():
            for p, q in zip(model.parameters(), native.parameters(), strict=True):
                p.to_local().copy_(q.to_local())
        loops[0].step = loops[1].step
        registration.swap("allreduce")
        ours, theirs = (loop.run(1) for loop in loops)
        far = max(far, *(float((ours[0][n] - theirs[0][n]).abs().max()) for n in ours[0] if ours[0][n].numel()))
        registration.remove()
    return far


@pytest.mark.parametrize("nproc", [2, 3, 4] if EVERY else [4])
@pytest.mark.parametrize("blocks", [1, 11] if EVERY else [1])
def test_every_time(ranks, nproc, blocks):
    results = ranks(many_times, nproc, 30 if blocks == 1 and EVERY else 8, blocks, timeout=300)
    assert all(far == 0.0 if nproc == 2 else far < 1e-5 for far in results)
