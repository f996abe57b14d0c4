"""Complex gradients: PyTorch lays them out as pairs of numbers, and a hook must not notice."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks


class Rotation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.turn = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.scale = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (self.turn * x).abs().sum() + (self.scale * x.real.sum()).sum()


class ByParameter:
    """Averages each gradient by itself, and notes what it was given."""

    def __init__(self):
        self.seen = {}

    def reduce(self, bucket):
        for name, view, segment in zip(bucket.names, bucket.gradients, bucket.segments, strict=True):
            self.seen[name] = (tuple(view.shape), view.dtype, segment.numel())
        for view in bucket.gradients:
            view.copy_((yield commhub.AllReduce(view.clone())))


def average():
    model = DistributedDataParallel(Rotation())
    hook = ByParameter()
    commhub.register(model, hook)
    x = torch.complex(torch.full((3, 2), 1.0 + dist.get_rank()), torch.full((3, 2), 0.5))
    with model.no_sync():
        model(x).backward()
    local = model.module.turn.grad.clone()
    model.zero_grad()
    model(x).backward()
    gathered = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(gathered, local)
    torch.testing.assert_close(model.module.turn.grad, (gathered[0] + gathered[1]) / 2)
    assert_equal_across_ranks([p.grad for p in model.parameters()])
    return hook.seen


def test_a_hook_sees_a_complex_gradient_in_its_own_shape_and_dtype(ranks):
    for seen in ranks(average, 2):
        assert seen["turn"] == ((3, 2), torch.complex64, 6)
        assert seen["scale"] == ((4,), torch.float32, 4)
