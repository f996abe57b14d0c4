"""A model's buckets are DDP's own, ready in their order, within the step."""

import pytest
import torch
from torch import nn

from commhub.advice._backward import loss_of, observe


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))


def observed(cap):
    module = model()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    found = observe(module, (torch.randn(32, 64),), bucket_cap_mb=cap, steps=3)
    kept = all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    return found, kept and all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("p", [1, 2])
def test_buckets_are_in_the_order_of_backward(ranks, p):
    answers = ranks(observed, p, 0.1)
    found, kept = answers[0]
    assert kept
    assert len(found.buckets) > 1
    assert sum(bucket.numel for bucket in found.buckets) == sum(each.numel() for each in model().parameters())
    assert (8, 256) in found.buckets[0].shapes  # the last layer's gradient is there first
    assert (256, 64) in found.buckets[-1].shapes
    times = [bucket.seconds for bucket in found.buckets]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] <= found.seconds
    assert all(other == answers[0] for other in answers)


def test_one_bucket_holds_a_small_model(ranks):
    found, _ = ranks(observed, 2, None)[0]
    assert len(found.buckets) == 1
    assert found.buckets[0].dtype == torch.float32


def test_a_loss_is_made_of_whatever_tensor_comes():
    assert loss_of(torch.tensor(3.0)) == 3.0
    assert loss_of(torch.tensor([1.0, 3.0])) == 5.0
    with pytest.raises(TypeError, match="the model returned dict"):
        loss_of({})
