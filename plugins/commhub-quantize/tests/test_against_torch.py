"""PyTorch's quantization modes, for comparison: their observers and arithmetic, gathering every rank's codes.

Their hooks themselves fail on Gloo.
"""

import pytest
import torch
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver
from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks

import commhub


class TorchMode:
    """A bucket with one scale, or with one for every 512 elements."""

    def __init__(self, *, per_channel):
        self.per_channel = per_channel

    def reduce(self, bucket):
        rows = bucket.flat.view(1, -1)
        kind, observer = "tensor", MinMaxObserver()
        if self.per_channel:
            rows = torch.nn.functional.pad(bucket.flat, (0, -bucket.flat.numel() % 512)).view(-1, 512)
            kind, observer = "channel", PerChannelMinMaxObserver()
        observer(rows)
        marks = torch.stack([mark.float().flatten() for mark in observer.calculate_qparams()])
        encode = getattr(quantization_hooks, f"_quantize_per_{kind}_backend")
        decode = getattr(quantization_hooks, f"_dequantize_per_{kind}_backend")
        all_marks = (yield commhub.AllGather(marks.flatten().clone())).view(-1, *marks.shape)
        codes = yield commhub.AllGather(encode(rows, *marks).flatten())
        total = sum(decode(c, *m) for c, m in zip(codes.view(-1, *rows.shape), all_marks, strict=True))
        bucket.flat.copy_(total.flatten()[: bucket.flat.numel()] / bucket.world_size)


MODES = {
    "quantize_per_tensor": TorchMode(per_channel=False),
    "quantize_per_channel": TorchMode(per_channel=True),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.parametrize("hook", MODES),
]


def errors(hook, gradients):
    """Of each tensor's mean, relative to the mean's norm."""
    got = commhub.simulate(hook, gradients).gradients[0]
    means = [sum(g.double() for g in same) / len(gradients) for same in zip(*gradients, strict=True)]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, means, strict=True)]


def drawn(rank, *sizes):
    generator = torch.Generator().manual_seed(rank)
    return [size * torch.randn(64, 64, generator=generator) for size in sizes]


def test_two_roundings_are_at_most_twice_as_coarse_as_one(hook):
    gradients = [drawn(rank, 1.0, 1.0) for rank in range(4)]
    assert max(errors(hook, gradients)) < 2 * max(errors(MODES[hook], gradients))


def test_small_gradients_are_lost_there_alone(hook):
    gradients = [drawn(rank, 1e-8) for rank in range(2)]
    assert errors(MODES[hook], gradients) == [1.0]
    assert errors(hook, gradients)[0] < 0.02


def test_a_small_layer_beside_a_large_one_is_lost_with_their_scale_per_bucket_alone(hook):
    gradients = [drawn(rank, 1.0, 1e-4) for rank in range(2)]
    theirs, ours = errors(MODES[hook], gradients)[1], errors(hook, gradients)[1]
    assert ours < 0.02
    assert theirs > 0.9 if hook == "quantize_per_tensor" else theirs < 0.02


@pytest.mark.parametrize("ranks", [2, 4, 9, 16])
def test_bytes_do_not_grow_with_the_ranks(hook, ranks):
    """Theirs do, and are more than those of no compression from nine ranks on."""
    gradients = [[torch.ones(256, 256)] for _ in range(ranks)]
    ours, theirs = (commhub.simulate(which, gradients).compression for which in (hook, MODES[hook]))
    assert ours > 3.5
    assert theirs == pytest.approx(8 / ranks, rel=0.02)
