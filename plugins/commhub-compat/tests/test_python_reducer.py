"""DDP models for the python reducer: its casts are PyTorch's own, and other hooks are refused."""

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import compiled_autograd
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal


def gradients(hook, whole=True):
    """Those of one compiled backward with the python reducer; ``whole`` if the compiler is to take it whole."""
    torch.manual_seed(1)
    torch.compiler.reset()  # what was compiled whole before would be compiled whole again
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        model = DistributedDataParallel(nn.Linear(8, 4))
        model.register_comm_hook(None, hook)
        loss = torch.compile(model, backend="eager")(torch.full((2, 8), 1.0 + dist.get_rank())).square().mean()
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=whole)):
            loss.backward()
    assert commhub.registration(model) is None
    return [p.grad for p in model.parameters()]


def casts():
    mine, theirs = gradients(compat.fp16_compress_hook), gradients(default_hooks.fp16_compress_hook)
    assert mine[0].unique().numel() > 1
    assert all(bitwise_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    assert all(bitwise_equal(a, b) for a, b in zip(*of_all, strict=True))


def others():
    with pytest.raises(commhub.RegistrationError, match="python reducer"):
        gradients(compat.allreduce_hook, whole=False)


@pytest.mark.parametrize("what", [casts, others])
def test_with_the_python_reducer(ranks, what):
    ranks(what, 2, fresh=True)
