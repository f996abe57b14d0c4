"""The table of hooks that every rule is tested for, and what the rules' tests share.

To test another hook, add its line to HOOKS, or to AS_ONE, with options that make it compress these small models from
the first step on. What a rule asks of a hook follows from its spec and options, never from its name.
"""

import itertools
import os
from functools import cache
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.registry._hookstring import parse
from commhub.registry._recipe import choose

AS_ONE = (
    "batched_powersgd(start_step=0, min_compression_rate=0.5)",
    "batched_powersgd_rank2(start_step=0, min_compression_rate=0.5)",
)
"""Hooks that compress a whole bucket at once: its parameters share one approximation, and what they remember starts
afresh where buckets change."""

HOOKS = (
    "allreduce",
    "noop",
    "fp16",
    "bf16",
    "powersgd(start_step=0, min_compression_rate=0.5)",
    "powersgd_rank2(start_step=0, min_compression_rate=0.5)",
    *AS_ONE,
    "quantize_per_tensor(dense_small=false)",
    "quantize_per_channel(dense_small=false, group_size=16)",
    "post_local_sgd(start_step=0, period=2, local_gradients=false)",
    "optimizer_overlap",
)

ONE, MANY = 25.0, 1e-6  # bucket_cap_mb: everything in one bucket; one for each parameter, from the second step on
BUCKETS = {"one bucket": ONE, "many buckets": MANY}

# What a dtype's own rounding leaves of a mean of four.
ROUNDING = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.complex64: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


def name_of(hook):
    return parse(hook).name


# What is installed stays the same for all of these tests; to look it up anew each time took most of their time.
@cache
def spec_of(hook):
    return commhub.hooks()[name_of(hook)].spec


def agrees(hook):
    """Whether the result is the same on all ranks. What leaves each rank its own gradient promises nothing about it."""
    return spec_of(hook).agrees


def communicates(hook):
    return spec_of(hook).sent_bytes != "0"


@cache
def feeds_back(hook):
    """Whether what a step leaves unsent is added to the next one's gradient."""
    return bool(choose(hook, {}).options.get("error_feedback"))


def collectives(hook):
    """How many collectives, each built on the one before, a bucket takes at most."""
    kind, most = type(choose(hook, {}).make()), 0

    def counting(self, bucket, reduce=kind.reduce):
        nonlocal most
        exchange, answer = reduce(self, bucket), None
        for number in itertools.count():
            most = max(most, number)
            try:
                answer = yield exchange.send(answer)
            except StopIteration:
                return

    with patch.object(kind, "reduce", counting):
        commhub.simulate(hook, [list(drawn(rank, 0).values()) for rank in range(2)])
    return most


def one_of_each_factory(hooks):
    """Names that are presets of one class run the same code: in what takes long, the first stands for all."""
    return list({spec_of(hook).factory: hook for hook in reversed(hooks)}.values())[::-1]


EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
"""Whether two ranks and four see every hook and every step; `.ci/run` asks for it, `make test` has no time for it."""


def one_of_each_promise(hooks):
    """The first hook of each method (the paper it refers to) and kind of promise: exact, local, feeding back."""

    def promise(hook):
        spec = spec_of(hook)
        return spec.reference, spec.exact, spec.agrees, feeds_back(hook), hook in AS_ONE, spec.needs

    return list({promise(hook): hook for hook in reversed(hooks)}.values())[::-1]


def on_ranks(holds=lambda hook: True):
    """Parametrise a test by one hook of each promise that `holds` on two ranks; on four, with feedback and without.

    With `EVERYTHING`, by each hook that `holds` on two ranks and on four.
    """
    chosen = [hook for hook in HOOKS if holds(hook)]
    on_two = chosen if EVERYTHING else one_of_each_promise(chosen)
    on_four = chosen if EVERYTHING else list({feeds_back(hook): hook for hook in reversed(on_two)}.values())
    return pytest.mark.parametrize(("hook", "nproc"), [*((h, 2) for h in on_two), *((h, 4) for h in on_four)])


SHAPES = {"tall": (12, 8), "conv": (6, 3, 2, 2), "vector": (7,), "wide": (8, 12), "scalar": (), "square": (9, 9)}


class Given(nn.Module):
    """Parameters of several shapes, whose gradients are those that `forward` is given by name."""

    def __init__(self, shapes=None):
        super().__init__()
        shapes = SHAPES if shapes is None else shapes
        self.weights = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, gradients):
        return sum((self.weights[name] * gradient).sum() for name, gradient in gradients.items())


def drawn(rank, step, shapes=None):
    """Normal gradients for `Given`, different on each rank and in each step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shapes = SHAPES if shapes is None else shapes
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def build(hook, cap, module=None, **ddp):
    """A DDP model with this hook, and its registration; None is a model without one."""
    model = DistributedDataParallel(Given() if module is None else module, bucket_cap_mb=cap, **ddp)
    return model, None if hook is None else register(model, hook, timeout=30)


def register(model, hook, **arguments):
    """`commhub.register`, with an optimizer where the hook's spec says that it needs one."""
    if "optimizer" not in spec_of(hook).needs:
        return commhub.register(model, hook, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    registration = commhub.register(model, hook, optimizer=optimizer, **arguments)
    # Whoever steps early wants a step() after each backward; gradients stay what they are.
    registration._session.engine.callbacks.after_step.append(lambda _step: optimizer.step())
    return registration


def give(model, gradients):
    """One backward with these gradients on this rank; copies of what came of them, by name."""
    model.zero_grad()
    model(gradients).backward()
    return results(model)


def give_all(models, gradients):
    """The same for several models in one backward: their exchanges overlap, which is far quicker than one by one."""
    for model in models:
        model.zero_grad()
    sum(model(gradients) for model in models).backward()
    return [results(model) for model in models]


def results(model):
    """Copies of the gradients that there are, by name."""
    weights = model.module.weights if isinstance(model.module, Given) else dict(model.module.named_parameters())
    return {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}


def local_state(registration):
    """This rank's tensors: {parameter: {key: tensor}}."""
    return registration.state_dict()["local"][f"rank{dist.get_rank()}"]


def state_of(registration):
    """All that this rank remembers, as {where: tensor}."""
    saved = {"local": local_state(registration), "shared": registration.state_dict()["shared"]}
    return {
        f"{scope} {key} of {name}": tensor
        for scope, tables in saved.items()
        for name, table in tables.items()
        for key, tensor in table.items()
    }


def true_means(own, divisor=None):
    """The mean of the ranks' own gradients and that of their sizes, dense, in float64 or complex128. Collective."""
    dense = [g.to_dense() if g.is_sparse else g for g in own.values()]
    wide = [g.to(torch.complex128 if g.is_complex() else torch.float64).contiguous() for g in dense]
    parts = [torch.view_as_real(w) if w.is_complex() else w for w in [*wide, *(w.abs() for w in wide)]]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    flat /= dist.get_world_size() if divisor is None else divisor
    summed = [f.view(part.shape) for f, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    means = [torch.view_as_complex(m) if w.is_complex() else m for m, w in zip(summed, wide, strict=False)]
    return dict(zip(own, zip(means, summed[len(wide) :], strict=True), strict=True))


def promised_error(hook, dtype, *, exactly=False):
    """The relative error that one step may have, None where none is promised; `exactly`: not compressed."""
    if spec_of(hook).exact or exactly:
        return ROUNDING[dtype]
    tolerance = spec_of(hook).tolerance
    return None if tolerance is None else max(tolerance, ROUNDING[dtype])


def assert_mean(hook, registration, found, own, where, divisor=None):
    """Compare {name: gradient} with the mean of the ranks' own, as closely as the hook promises. Collective.

    The error is that of a whole tensor, relative to the ranks' gradients: what nearly cancels has no digits left.
    """
    compressed = {name.removeprefix("weights.") for name in local_state(registration)}
    for name, (mean, size) in true_means(own, divisor).items():
        got, mine = found[name], own[name]
        # Sparse gradients never reach a hook; error feedback leaves no residual where all is sent.
        exactly = mine.is_sparse or (feeds_back(hook) and name not in compressed)
        bound = promised_error(hook, mine.dtype, exactly=exactly)
        got = (got.to_dense() if got.is_sparse else got).to(mean.dtype)
        assert got.isfinite().all(), f"{where}: {name} is not finite"
        error, scale = float((got - mean).norm()), float(size.norm())
        assert bound is None or error <= bound * scale, f"{where}: {name} is off by {error:.3g} of {scale:.3g}"
