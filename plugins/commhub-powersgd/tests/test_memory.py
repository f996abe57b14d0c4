"""Nothing near the size of a bucket is allocated in a step."""

import pytest
import torch
from commhub_powersgd import PowerSGD
from torch.multiprocessing.reductions import StorageWeakRef
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


class Living(TorchDispatchMode):
    """How many bytes made since the beginning were alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.peak, self._made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and id_of(one) not in given:
                storage = one.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return out


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


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", [{}, {"alternating": True}, {"num_power_iterations": 2}], ids=str)
@pytest.mark.parametrize("first", [1, 16], ids=["misaligned", "aligned"])
def test_beyond_residuals_and_factors_at_most_a_tenth_of_the_bucket_is_alive_at_once(rank, ranks, options, first):
    """All that is made from registration on, gradients and the simulator's own copies apart."""
    gradients = [torch.ones(1300, 1300) for _ in range(4)] + [torch.ones(first)]
    bucket = sum(g.nbytes for g in gradients)
    factors = 4 * 4 * 2 * 1300 * rank

    class Measured(PowerSGD):
        def prepare(self, setup):
            self.living = Living()
            with self.living:
                super().prepare(setup)

        def reduce(self, bucket):
            exchange, value = super().reduce(bucket), None
            while True:
                with self.living:
                    try:
                        request = exchange.send(value)
                    except StopIteration:
                        return
                value = yield request

    hook = Measured(rank=rank, start_step=0, **options)
    for measured in commhub.simulate(hook, [gradients] * ranks, steps=3).hooks:
        assert bucket - 64 <= measured.living.peak - factors <= 1.1 * bucket  # the residual is as large as the bucket


def test_the_messages_are_kept_between_steps():
    gradients = [torch.ones(40, 30), torch.ones(5), torch.ones(30, 40)]
    hook = commhub.simulate(PowerSGD(start_step=0), [gradients], steps=3, buckets=3).hooks[0]
    elements = {names: plan.first.numel() for names, plan in hook._plans.made.items()}
    assert elements == {("2",): 30, ("1",): 0, ("0",): 40}
