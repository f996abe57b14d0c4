"""What a hook keeps per bucket is made once, and goes when DDP rebuilds its buckets."""

import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import mlp, train


class Counting:
    """Averages plainly; remembers for which buckets something was made, and what there is after each one."""

    def prepare(self, setup):
        self.asked, self.kept = [], []
        self.plans = commhub.toolkit.PerBucket(self.make)

    def make(self, bucket):
        self.asked.append((bucket.names, bucket.rank, bucket.world_size))
        return bucket.names

    def reduce(self, bucket):
        assert self.plans[bucket] == bucket.names
        assert self.plans[bucket] is self.plans[bucket]
        self.kept.append(set(self.plans.made))
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def test_it_is_made_once_for_each_bucket():
    gradients = [torch.ones(4), torch.ones(2), torch.ones(3)]
    [one, two] = commhub.simulate(Counting(), [gradients] * 2, steps=3, buckets=3).hooks
    assert one.asked == [((name,), 0, 2) for name in "210"]
    assert two.asked == [((name,), 1, 2) for name in "210"]
    assert one.kept[-1] == {("0",), ("1",), ("2",)}


class Parts(Counting):
    """Takes a bucket as two parts in every other step, and once among fewer ranks."""

    def reduce(self, bucket):
        first = bucket.part(bucket.parameters[:1])
        if bucket.step == 1:
            yield from super().reduce(first)
            yield from super().reduce(bucket.part(bucket.parameters[1:]))
        else:
            bucket.world_size -= bucket.step == 3
            yield from super().reduce(bucket)


def test_what_shares_a_parameter_is_dropped_and_other_ranks_are_another_bucket():
    [hook] = commhub.simulate(Parts(), [[torch.ones(4), torch.ones(2)]], steps=4).hooks
    (whole, *_), (first, *_), (second, *_) = hook.asked[:3]
    assert hook.kept == [{whole}, {first}, {first, second}, {whole}, {whole}]
    assert hook.asked == [(whole, 0, 1), (first, 0, 1), (second, 0, 1), (whole, 0, 1), (whole, 0, 0)]


def rebuilt():
    model = DistributedDataParallel(mlp([8] * 5), bucket_cap_mb=1 / 4096)
    hook = commhub.register(model, Counting()).hook
    train(model, 4)
    return len(hook.asked), hook.kept[-1]


def test_nothing_is_left_of_the_buckets_before_ddp_rebuilt_them(ranks):
    [(made, left)] = ranks(rebuilt, 1)
    names = [name for bucket in left for name in bucket]
    assert len(names) == len(set(names)) == 8
    assert len(left) == 4
    assert made == 1 + 4
