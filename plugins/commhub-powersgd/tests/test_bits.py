"""All ranks end a step with the same bits, whichever of them compile their passes; or they are refused."""

import os
from unittest.mock import patch

import commhub_powersgd._bits
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks

EACH = [
    f"{name}(start_step=0, min_compression_rate=0.1, {options})"
    for name in ("powersgd", "batched_powersgd")
    for options in ("rank=1", "rank=2", "rank=4", "rank=9", "rank=2, num_power_iterations=2")
] + [f"powersgd(start_step=0, min_compression_rate=0.1, rank={rank}, alternating=true)" for rank in (1, 3)]
SOME = [EACH[1], EACH[2], EACH[6], EACH[-1]]
SHAPES = ((40, 33), (65,), (24, 48), (17, 19))


class Given(nn.Module):
    """Its gradients are what it is given."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape) for shape in SHAPES])

    def forward(self, gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def same_after_steps(hook, steps=3, **options):
    """Register, and compare what all ranks have after each step."""
    model = DistributedDataParallel(Given())
    registration = commhub.register(model, hook, timeout=100, **options)  # one rank may compile for long
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        model.zero_grad()
        model([torch.randn(shape, generator=generator) for shape in SHAPES]).backward()
        assert_equal_across_ranks({f"{hook}, step {step}: {i}": w.grad for i, w in enumerate(model.module.weights)})
    shared = registration.state_dict()["shared"]
    assert_equal_across_ranks({f"{hook}: {key} of {n}": t for n, table in shared.items() for key, t in table.items()})
    return registration


def one_compiles():
    found = []
    with patch.dict(os.environ, COMMHUB_COMPILE="1" if dist.get_rank() == 0 else "0"):
        for hook in EACH if os.environ.get("COMMHUB_EVERY_CHECK") else SOME:
            registration = same_after_steps(hook)
            found.append(registration.hook._compiled is not None)
            registration.remove()
    return found


def test_a_rank_that_compiles_its_passes_and_one_that_does_not_get_the_same_bits(ranks):
    here, there = ranks(one_compiles, 2, timeout=240)
    if not any(here):
        pytest.skip("there is no compiler here")
    assert (all(here), any(there)) == (True, False)


def other_threads(hook):
    before = torch.get_num_threads()
    torch.set_num_threads(1 + dist.get_rank())
    try:
        same_after_steps(hook)
    except commhub.HookMismatchError as error:
        return str(error)
    finally:
        torch.set_num_threads(before)
    return ""


@pytest.mark.parametrize("hook", ["powersgd(start_step=0, rank=9)", "batched_powersgd(start_step=0, rank=12)"])
def test_ranks_with_other_numbers_of_threads_get_the_same_bits_or_are_refused_alike(ranks, hook):
    told = ranks(other_threads, 2, hook)
    assert [bool(text) for text in told] in ([False, False], [True, True])


def other_bits(hook):
    bits = commhub_powersgd._bits._bits
    with patch.object(
        commhub_powersgd._bits, "_bits", lambda shapes: "another" if dist.get_rank() == 1 else bits(shapes)
    ):
        same_after_steps(hook, verify=False)
        with pytest.raises(commhub.HookMismatchError) as caught:
            same_after_steps(hook)
    same_after_steps(hook)
    return str(caught.value)


@pytest.mark.parametrize("hook", ["powersgd(start_step=0)", "batched_powersgd(start_step=0)"])
def test_ranks_whose_arithmetic_gives_other_bits_are_refused_and_told_what_to_set(ranks, hook):
    for told in ranks(other_bits, 2, hook):
        parts = ("the bits of", "rank 0: ", 'rank 1: ["another"]', "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
        for part in (*parts, "1 thread", "verify=False"):
            assert part in told, told
