"""What a hook has the ranks compare when it is prepared."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub


class Asking:
    """The mean; asks what it is told to in ``prepare``."""

    def __init__(self, *asked):
        self.asked, self.values = asked, 0

    def prepare(self, setup):
        for what, value in self.asked:
            setup.agree(what, lambda value=value: self.value(value), f"it has {value}")

    def value(self, value):
        self.values += 1
        return value

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def model():
    return DistributedDataParallel(torch.nn.Linear(2, 1))


def asking():
    rank = dist.get_rank()
    one = model()
    with pytest.raises(commhub.HookMismatchError) as caught:
        commhub.register(one, Asking(("the moon", f"phase {rank}"), ("the sun", "up")), timeout=10)
    commhub.register(one, Asking(("the moon", "full"), ("the moon", "blue")), timeout=10)
    commhub.register(one, Asking(("the moon", f"phase {rank}")), timeout=10, verify=False)
    with pytest.raises(commhub.HookMismatchError):
        commhub.register(one, Asking(*[("the moon", "full")][: 1 - rank]), timeout=10)
    one(torch.ones(1, 2)).sum().backward()
    return str(caught.value)


def test_ranks_whose_values_differ_are_refused_and_say_what_they_have(ranks):
    for rank, told in enumerate(ranks(asking, 2)):
        assert told == (
            'ranks disagree on the moon (rank 0: ["phase 0"]; rank 1: ["phase 1"]). '
            f"Of this rank: it has phase {rank}, or pass verify=False."
        )


def alone():
    hook = Asking(("the moon", "full"))
    commhub.register(model(), hook, timeout=10)
    return hook.values


def test_nothing_is_asked_for_where_nobody_is_to_compare_with(ranks):
    assert ranks(alone, 1) == [0]
    assert [hook.values for hook in commhub.simulate(Asking(("a", "b")), [[torch.ones(1)]] * 2).hooks] == [0, 0]
