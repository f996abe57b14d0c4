"""Nothing near the size of a bucket is allocated in a step."""

import pytest
import torch
from commhub_powersgd import PowerSGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import commhub


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that an operation made and that shares no memory with what it was given."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and id_of(one) not in given:
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return out


def id_of(tensor):
    return tensor.untyped_storage().data_ptr()


class Watched(PowerSGD):
    """Looks at every operation of a step."""

    def reduce(self, bucket):
        exchange, value, self.largest = super().reduce(bucket), None, 0
        while True:
            with Largest() as seen:
                try:
                    request = exchange.send(value)
                except StopIteration:
                    return
                finally:
                    self.largest = max(self.largest, seen.nbytes)
            value = yield request


@pytest.mark.parametrize("rank", [1, 2, 12])
@pytest.mark.parametrize("first", [1, 16], ids=["misaligned", "aligned"])
def test_a_step_allocates_at_most_a_tenth_of_the_bucket(rank, first):
    """Here 26 MiB; also where no matrix lies at an aligned address."""
    gradients = [torch.ones(1300, 1300) for _ in range(4)] + [torch.ones(first)]
    result = commhub.simulate(Watched(rank=rank, start_step=0), [gradients], steps=2)
    assert 0 < result.hooks[0].largest <= 0.1 * sum(g.nbytes for g in gradients)


def test_the_messages_are_kept_between_steps():
    gradients = [torch.ones(40, 30), torch.ones(5), torch.ones(30, 40)]
    hook = commhub.simulate(PowerSGD(start_step=0), [gradients], steps=3, buckets=3).hooks[0]
    elements = {names: plan.first.numel() for names, plan in hook._plans.made.items()}
    assert elements == {("2",): 30, ("1",): 0, ("0",): 40}
