"""Functions for DDP's own ``register_comm_hook`` where the first backward has several buckets, one for each dtype."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import commhub
from commhub.testing import batches, bitwise_equal


@commhub.comm_hook
def plain(model, state):
    """Registers the plain average."""
    commhub.register(model, "allreduce", process_group=state)


class Mixed(nn.Module):
    """Layers of several dtypes, each in a checkpoint, whose backward runs within the model's."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(1)
        dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
        self.layers = nn.ModuleList([nn.Linear(8, 8).to(dtype) for dtype in dtypes])
        self.reentrant = reentrant

    def forward(self, x):
        x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(lambda x, one=layer: one(x.to(one.weight.dtype)).float(), x, use_reentrant=self.reentrant)
        return x


def as_without_a_hook(modes, reentrant):
    models = [DistributedDataParallel(Mixed(reentrant), **modes) for _ in range(2)]
    models[1].register_comm_hook(None, plain)
    for number in range(3):
        for model in models:
            model.zero_grad()
            model(batches(8)(dist.get_rank(), number)[0]).square().mean().backward()
        pairs = zip(*(model.parameters() for model in models), strict=True)
        assert all(bitwise_equal(a.grad, b.grad) for a, b in pairs)
    assert commhub.registration(models[1]).step == 3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("modes", [{}, {"static_graph": True}], ids=["plain", "static"])
def test_several_buckets_of_the_first_backward_wait_for_the_last(ranks, modes, reentrant):
    ranks(as_without_a_hook, 2, modes, reentrant)


class Frozen(nn.Module):
    """Layers of three dtypes, so that DDP's first buckets are one for each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16, torch.float64)
        self.layers = nn.ModuleList([nn.Linear(8, 8).to(dtype) for dtype in dtypes])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).float()
        return x


def changed_after_wrapping(modes, frozen, thawed):
    """As without a hook, and as with one that was registered before; nobody waits for what does not come."""
    nets = [Frozen() for _ in range(3)]
    for net in nets:
        for number in thawed:
            net.layers[number].requires_grad_(False)
    models = [DistributedDataParallel(net, **modes) for net in nets]
    for net in nets:
        for number in range(6):
            net.layers[number].requires_grad_(number not in frozen)
    models[1].register_comm_hook(None, plain)
    commhub.register(models[2], "allreduce")
    for number in range(4):
        for model in models:
            model.zero_grad()
            model(batches(8)(dist.get_rank(), number)[0]).square().mean().backward()
        for bare, *ours in zip(*(model.parameters() for model in models), strict=True):
            assert all((one.grad is None) == (bare.grad is None) for one in ours)
            assert bare.grad is None or all(bitwise_equal(bare.grad, one.grad) for one in ours)
    assert [commhub.registration(model).step for model in models[1:]] == [4, 4]


@pytest.mark.parametrize(
    ("frozen", "thawed"),
    [((1, 4), ()), ((0, 2), ()), ((3, 5), ()), ((0, 1, 2), ()), ((), (3,)), ((5,), (0, 2))],
    ids=str,
)
@pytest.mark.parametrize("cap", [25, 0.0005])
@pytest.mark.parametrize("views", [False, True], ids=["", "views"])
def test_parameters_may_be_frozen_and_unfrozen_before_static_graph_s_first_step(ranks, frozen, thawed, cap, views):
    modes = {"static_graph": True, "bucket_cap_mb": cap, "gradient_as_bucket_view": views}
    ranks(changed_after_wrapping, 2, modes, frozen, thawed)
