"""What is sent."""

import pytest
import torch
from commhub_quantize import QuantizePerChannel, QuantizePerTensor
from commhub_quantize._coding import Coding, pack, unpack

import commhub


@pytest.mark.parametrize("p", [2, 3, 4, 8, 64])
@pytest.mark.parametrize(
    ("bits", "hook"), [(8, "quantize_per_channel"), (4, "quantize_per_channel"), (8, "quantize_per_tensor")]
)
def test_the_codes_cost_what_an_all_reduce_of_them_would_for_any_number_of_ranks(hook, bits, p):
    n = 1 << 18
    gradients = [[torch.zeros(n // 1024, 1024)] for _ in range(p)]
    result = commhub.simulate(hook, gradients, bits=bits, error_feedback=False)
    codes = 2 * (p - 1) / p * n * bits / 8
    assert codes <= result.sent_bytes[0] < 1.04 * codes + 64 * p  # scales, and filling up
    assert len(set(result.sent_bytes)) == 1


class Counted:
    """Counts what a hook asks for."""

    def __init__(self, hook):
        self.hook, self.asked = hook, []

    def prepare(self, setup):
        self.hook.prepare(setup)

    def reduce(self, bucket):
        exchange, value = self.hook.reduce(bucket), None
        while True:
            try:
                request = exchange.send(value)
            except StopIteration:
                return
            self.asked.append(type(request).__name__)
            value = yield request


@pytest.mark.parametrize("hook", [QuantizePerChannel, QuantizePerTensor])
def test_scales_and_what_is_dense_travel_in_the_same_two_messages(hook):
    gradients = [[torch.ones(64, 64), torch.ones(10), torch.ones(40, 64)] for _ in range(2)]
    rules = {"2": {"bits": 4}}
    assert commhub.simulate(Counted(hook(rules=rules)), gradients).hooks[0].asked == [
        "AllToAll",
        "AllGather",
    ]
    assert commhub.simulate(Counted(hook()), [[torch.ones(10)]] * 2).hooks[0].asked == ["AllReduce"]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_loses_nothing(bits):
    coding = Coding(bits=bits, row=64)
    digits = torch.randint(-coding.half, coding.half, (50, 64)).float()
    packed = pack(digits, coding)
    assert packed.shape == (50, 64 * bits // 8)
    codes = packed.to(torch.int8)
    assert torch.equal(codes.float(), packed)
    assert torch.equal(torch.cat(unpack(codes, coding), 1).float(), digits)
