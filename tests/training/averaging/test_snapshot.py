"""Any write to tensors is seen, whatever they are like and whichever way it was made."""

import pytest
import torch

from commhub.training.averaging._snapshot import Snapshot

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool)
KINDS = {
    "scalar": lambda t: t[0].clone().view(()),
    "odd": lambda t: t[:7].clone(),
    "starts within a word": lambda t: t[1:],
    "transposed": lambda t: t[:21].clone().view(7, 3).t(),
    "channels last": lambda t: t[:120].clone().view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "with gaps": lambda t: t[:36].view(4, 9)[:, 1:8:2],
    "long": lambda t: t,
    "long, starts within a word": lambda t: t[3:],
    "long and transposed": lambda t: t[:50_000].view(50, 1000).t(),
}


def drawn(dtype):
    wide = torch.rand(50_001, generator=torch.Generator().manual_seed(0)) * 10
    return wide > 5 if dtype is torch.bool else wide.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_that_is_written_through_data_is_seen(dtype, kind):
    tensor = KINDS[kind](drawn(dtype))
    place = Snapshot([torch.zeros(3), torch.zeros(0, 3), tensor])
    place.keep(bits=True)
    assert place.holds()
    before = tensor._version
    for at in (0, tensor.numel() // 2, tensor.numel() - 1):
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape))
        element = tensor.data[where]
        kept = element.clone()
        raw = element.view(1).view(torch.uint8) if dtype is not torch.bool else element.view(1)
        raw[0] = ~raw[0] if dtype is torch.bool else raw[0] ^ 1
        assert tensor._version == before
        assert not place.holds(), at
        element.copy_(kept)
        assert place.holds()


def test_what_counts_up_or_is_elsewhere_is_seen_without_bits_too():
    for write in (lambda p: p.add_(0), lambda p: setattr(p, "data", p.data.clone())):
        parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        place = Snapshot([parameter])
        assert place.holds()  # nothing is noted yet
        place.keep(bits=False)
        assert place.holds()
        write(parameter)
        assert not place.holds()
        place.keep(bits=True)  # which does not make the place another
        assert not place.holds()
        place.forget()
        place.keep(bits=True)
        assert place.holds()


def test_memory_that_came_in_another_s_stead_is_read():
    parameter = torch.nn.Parameter(torch.ones(20_000), requires_grad=False)
    place = Snapshot([parameter])
    for _ in range(2):
        place.forget()
        place.keep(bits=True)
        parameter.data[17] += 1
        assert not place.holds()
        parameter.data = torch.zeros(20_000)


def test_what_moves_from_one_row_to_another_is_seen():
    parameter = torch.nn.Parameter(torch.arange(20_000.0), requires_grad=False)
    place = Snapshot([parameter])
    place.keep(bits=True)
    parameter.data.copy_(parameter.data.flip(0))
    assert not place.holds()
