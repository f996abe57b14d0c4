"""A hook that was swapped in during training works like one that was registered there."""

import pytest
import torch.distributed as dist

import commhub
from commhub.testing import bitwise_equal

from .matrix import EVERYTHING, HOOKS, MANY, build, drawn, give_all, one_of_each_factory, spec_of, state_of

CHOSEN = one_of_each_factory([hook for hook in HOOKS if not spec_of(hook).needs])


def swap_and_register(hooks):
    rank = dist.get_rank()
    for hook in hooks:
        swapped, registration = build("allreduce", MANY)
        registered, _ = build("allreduce", MANY)
        give_all([swapped, registered], drawn(rank, 0))
        registration.swap(hook)
        anew = commhub.register(registered, hook, timeout=30)
        # A hook may draw other random numbers in each step, and only a swap goes on counting.
        anew.load_state_dict({**anew.state_dict(), "step": registration.step})
        for step in range(1, 4):
            found, expected = give_all([swapped, registered], drawn(rank, step))
            found.update(state_of(registration))
            expected.update(state_of(anew))
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert bitwise_equal(tensor, expected[name]), f"{hook}, step {step}: {name}"


@pytest.mark.parametrize("nproc", [2, 4] if EVERYTHING else [2])
def test_every_bit_is_that_of_a_hook_registered_at_the_same_step(ranks, nproc):
    assert len(CHOSEN) >= 8
    ranks(swap_and_register, nproc, CHOSEN)
