"""What is unfrozen under DiLoCo has no outer optimizer yet: a plain mean serves it, and all ranks end alike."""

import pytest
import torch
import torch.distributed as dist

import commhub


def unfrozen(fragments):
    torch.manual_seed(0)
    module = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    module[1].requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    registration = commhub.manual(module, f"diloco(period=4, fragments={fragments}, outer_lr=0.5)", timeout=20)
    for number in range(8):
        if number == 5:
            module[1].requires_grad_(True)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
        module(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        if number == 7:
            wanted = module[1].weight.detach().double()
            dist.all_reduce(wanted)
        registration.average()
    torch.testing.assert_close(module[1].weight.double(), wanted / dist.get_world_size(), rtol=1e-6, atol=1e-7)
    registration.remove()
    for parameter in module.parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, parameter)


@pytest.mark.parametrize("fragments", [1, 2])
def test_what_is_unfrozen_is_averaged_by_a_plain_mean(ranks, fragments):
    ranks(unfrozen, 2, fragments)
