"""Averaging without DistributedDataParallel: the same hooks on a bare module, when the user says so."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import EveryKind, assert_equal_across_ranks, bitwise_equal


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def batch(step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def compare_with_ddp():
    bare, wrapped = net(), DistributedDataParallel(net())
    registration = commhub.manual(bare, "allreduce")
    for step in range(3):
        for model in (bare, wrapped):
            model.zero_grad()
            model(batch(step)).pow(2).mean().backward()
        registration.average()
        for a, b in zip(bare.parameters(), wrapped.parameters(), strict=True):
            if dist.get_world_size() == 2:
                assert bitwise_equal(a.grad, b.grad)
            else:  # more than two summands are added in another order where they lie in other buckets
                torch.testing.assert_close(a.grad, b.grad)
    assert registration.step == 3
    assert registration.stats.sent_bytes > 0


@pytest.mark.parametrize("nproc", [2, 4])
def test_manual_averaging_gives_what_ddp_gives(ranks, nproc):
    ranks(compare_with_ddp, nproc)


def leave_parameters_out():
    module = net()
    registration = commhub.manual(module, "fp16")
    module(batch(0)).sum().backward()
    module[0].weight.grad = None
    if dist.get_rank() == 1:
        module[2].bias.grad = None
    registration.average()
    assert module[0].weight.grad is None
    assert module[2].bias.grad.tolist() == [2.0] * 4  # 4 rows on rank 0, nothing on rank 1
    assert_equal_across_ranks([module[2].bias.grad, module[2].weight.grad])


def test_a_parameter_without_a_gradient_counts_as_zero_and_is_left_alone_where_no_rank_has_one(ranks):
    ranks(leave_parameters_out, 2)


def average_every_kind():
    module = EveryKind()
    registration = commhub.manual(module, "allreduce")
    module(*EveryKind.batch(dist.get_rank(), 0)).backward()
    local = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    registration.average()
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        mine = local[name].to_dense() if local[name].is_sparse else local[name]
        both = [torch.empty_like(mine).contiguous() for _ in range(2)]
        dist.all_gather_object(gathered := [None, None], mine)
        both = [g.to(torch.complex128 if g.is_complex() else torch.float64) for g in gathered]
        got = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        torch.testing.assert_close(got.to(both[0].dtype), (both[0] + both[1]) / 2, rtol=1e-2, atol=1e-6)


def test_every_kind_of_parameter_is_averaged(ranks):
    ranks(average_every_kind, 2)


def swap_and_save(path):
    module = net()
    registration = commhub.manual(module, "allreduce")
    for step in range(2):
        module.zero_grad()
        module(batch(step)).sum().backward()
        registration.average()
    registration.swap("bf16")
    module(batch(3)).sum().backward()
    registration.average()
    registration.save(path)
    again = commhub.manual(net(), "bf16")
    again.load(path)
    assert again.step == 3
    registration.remove()
    with pytest.raises(commhub.RegistrationError, match="removed"):
        registration.average()


def test_a_manual_registration_swaps_saves_loads_and_ends(ranks, tmp_path):
    ranks(swap_and_save, 2, str(tmp_path))


class Raises:
    def reduce(self, bucket):
        yield commhub.AllReduce(bucket.flat)
        if bucket.rank == 1:
            raise ZeroDivisionError("planned")


def fail():
    module = net()
    registration = commhub.manual(module, Raises(), timeout=20)
    module(batch(0)).sum().backward()

    def three_times():
        for _ in range(3):
            registration.average()

    with pytest.raises(commhub.HookError, match="planned"):
        three_times()
    registration.swap("allreduce")
    registration.average()


def test_a_fault_is_raised_from_average_on_every_rank(ranks):
    ranks(fail, 2)


def close_and_again():
    """A closed registration gives its hook object back, and averages nothing."""
    module, hook = net(), Raises()
    commhub.manual(module, hook).close()
    again = commhub.manual(module, hook)
    with pytest.raises(commhub.RegistrationError, match="at work already"):
        commhub.manual(net(), hook)
    again.close()
    with pytest.raises(commhub.HookError, match="was closed"):
        again.average()


def test_a_closed_registration_gives_its_hook_back(ranks):
    ranks(close_and_again, 2)


def refuse():
    with pytest.raises(commhub.RegistrationError, match=r"commhub\.register"):
        commhub.manual(DistributedDataParallel(net()), "allreduce")
    with pytest.raises(commhub.RegistrationError, match="no trainable"):
        commhub.manual(torch.nn.ReLU(), "allreduce")
    with pytest.raises(commhub.RegistrationError, match="manual"):
        commhub.register(net(), "allreduce")


def test_what_has_another_way_in_is_refused_and_told_so(ranks):
    ranks(refuse, 1)


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(commhub.RegistrationError, match="init_process_group"):
        commhub.manual(net(), "allreduce")


def not_a_member():
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(commhub.RegistrationError, match="not in the process group"):
            commhub.manual(net(), "allreduce", process_group=group)


def test_a_group_that_this_process_is_not_in_is_refused(ranks):
    ranks(not_a_member, 2)
