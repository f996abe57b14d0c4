"""Functions written for DDP's method as commhub hooks: they communicate by themselves, and commhub waits."""

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches


def layers(count=4):
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(40, 40) for _ in range(count)])


def wrapped(**modes):
    return DistributedDataParallel(layers(), bucket_cap_mb=0.005, **modes)


def trained(model, steps=4, first=0):
    make, rank, gradients = batches(40), dist.get_rank(), []
    for number in range(first, first + steps):
        model.zero_grad()
        model(make(rank, number)[0]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.module.named_parameters()})
    return gradients


def close(a, b, rtol=1e-5):
    return all(torch.allclose(x[name], y[name], rtol, 1e-6) for x, y in zip(a, b, strict=True) for name in x)


def noted(state, bucket):
    """Averages, and notes what it is given."""
    assert [g.shape for g in bucket.gradients()] == [p.shape for p in bucket.parameters()]
    state["seen"].append((bucket.index(), bucket.is_last(), bucket.buffer().numel()))
    group = state["group"]
    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / dist.get_world_size(group))


def averages(modes):
    for state, hook, rtol in (
        (None, default_hooks.allreduce_hook, 1e-5),
        (dist.group.WORLD, default_hooks.allreduce_hook, 1e-5),
        (None, default_hooks.fp16_compress_hook, 1e-2),
        (powerSGD_hook.PowerSGDState(dist.new_group(), start_powerSGD_iter=100), powerSGD_hook.powerSGD_hook, 1e-5),
    ):
        model = wrapped(**modes)
        registration = commhub.register(model, compat.foreign(state, hook))
        assert close(trained(model), trained(wrapped(**modes)), rtol), hook
        assert registration.stats.steps == registration.step == 4
        assert (registration.stats.sent_bytes, registration.stats.last.decode_seconds >= 0) == (0, True)
        assert registration.options["function"].endswith(hook.__name__)
        registration.swap("allreduce")
        assert registration.stats.steps == 4
        assert close(trained(model, 2), trained(wrapped(**modes), 2))
        registration.remove()


@pytest.mark.parametrize("modes", [{}, {"find_unused_parameters": True}], ids=["plain", "unused"])
def test_it_averages_counts_and_can_be_swapped(ranks, modes):
    ranks(averages, 2, modes)


def what_it_is_given():
    state = {"seen": [], "group": dist.new_group()}
    model = wrapped()
    registration = commhub.register(model, compat.foreign(state, noted))
    assert close(trained(model, 2), trained(wrapped(), 2))
    per_step = []
    for seen in state["seen"]:
        if seen[0] == 0:
            per_step.append([])
        per_step[-1].append(seen)
    assert len(per_step) == 2
    for step in per_step:
        assert [index for index, _, _ in step] == list(range(len(step)))
        assert [last for _, last, _ in step] == [False] * (len(step) - 1) + [True]
        assert sum(size for _, _, size in step) == 4 * (1600 + 40)
    registration.remove()


def test_it_is_given_pytorch_s_bucket(ranks):
    ranks(what_it_is_given, 2)


def of_another_kind(state, bucket):
    return state


def raising(state, bucket):
    raise FloatingPointError("no luck")


def wrong():
    short = torch.futures.Future()
    short.set_result(torch.zeros(3))
    for state, hook, text in (
        ({}, raising, "no luck"),
        ({}, of_another_kind, "returned dict; return a torch.futures.Future"),
        ({"a": 1}, lambda state, bucket: None, "returned NoneType"),
        ({"f": short}, lambda state, bucket: state["f"], "gave 3 elements for a bucket of"),
    ):
        model = wrapped()
        registration = commhub.register(model, compat.foreign(state, hook))
        with pytest.raises(commhub.HookError, match=text):
            trained(model, 1)
        registration.swap("allreduce")
        assert close(trained(model, 1), trained(wrapped(), 1))
        registration.remove()


def test_what_it_does_wrong_is_an_error_of_the_backward(ranks):
    ranks(wrong, 2)


def differing():
    model = wrapped()
    hook = (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook)[dist.get_rank()]
    with pytest.raises(commhub.HookMismatchError, match="fp16_compress_hook"):
        commhub.register(model, compat.foreign(None, hook))


def test_ranks_compare_which_function_it_is(ranks):
    ranks(differing, 2)


def in_a_group():
    pair = dist.new_subgroups(group_size=2)[0]
    model = DistributedDataParallel(layers(), process_group=pair)
    with pytest.raises(commhub.RegistrationError, match="Give the group as the state"):
        commhub.register(model, compat.foreign(None, default_hooks.allreduce_hook))
    reference = DistributedDataParallel(layers(), process_group=pair)
    for _ in range(3):  # each with a process group of its own
        registration = commhub.register(model, compat.foreign(pair, default_hooks.allreduce_hook))
        assert close(trained(model, 2), trained(reference, 2))
        registration.remove()


def test_in_a_group_it_averages_over_that(ranks):
    ranks(in_a_group, 4)


def refused():
    model = wrapped()
    for function in (default_hooks.allreduce_hook, compat.allreduce_hook):
        with pytest.raises(
            commhub.HookOptionError, match=r"allreduce_hook is a function of \(state, bucket\).*foreign"
        ):
            commhub.register(model, function)
    with pytest.raises(commhub.HookOptionError, match="is commhub's already"):
        compat.foreign(None, compat.allreduce_hook)
    with pytest.raises(commhub.HookOptionError, match="give a function"):
        compat.foreign(None, "fp16")


def test_register_says_what_to_do_with_such_a_function(ranks):
    ranks(refused, 1)
