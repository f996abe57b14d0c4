"""PyTorch's names register commhub's hooks, by DDP's own method, by the enumeration, and by the wrappers."""

import pickle

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches, bitwise_equal


def layers():
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(40, 40) for _ in range(4)])


def wrapped():
    return DistributedDataParallel(layers(), bucket_cap_mb=0.005)


def trained(model, steps=4):
    """The gradients after each of some steps."""
    make, rank, gradients = batches(40), dist.get_rank(), []
    for number in range(steps):
        model.zero_grad()
        model(make(rank, number)[0]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.module.named_parameters()})
    return gradients


def same(a, b):
    return all(bitwise_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def powersgd(**more):
    return compat.PowerSGDState(None, start_powerSGD_iter=2, **more)


POWERSGD = "(rank={}, start_step=2, min_compression_rate=2.0, stats_frequency=10000)"
HOOKS = {
    "allreduce_hook": (lambda: None, "allreduce"),
    "fp16_compress_hook": (lambda: None, "fp16"),
    "bf16_compress_hook": (lambda: dist.group.WORLD, "bf16"),
    "quantization_pertensor_hook": (lambda: None, "quantize_per_tensor"),
    "quantization_perchannel_hook": (lambda: None, "quantize_per_channel(group_size=512)"),
    "noop_hook": (dict, "noop"),
    "powerSGD_hook": (powersgd, "powersgd(rank=1, start_step=2)"),
    "batched_powerSGD_hook": (lambda: powersgd(matrix_approximation_rank=2), "batched_powersgd(rank=2, start_step=2)"),
}


def by_ddp_s_method(names):
    for name in names:
        state, text = HOOKS[name]
        model, reference = wrapped(), wrapped()
        model.register_comm_hook(state(), getattr(compat, name))
        first = commhub.register(reference, text)
        assert same(trained(model), trained(reference)), name
        registration = commhub.registration(model)
        assert registration.name == first.name
        assert dict(registration.options) == dict(first.options)
        assert registration.step == first.step == 4
        assert registration.stats.sent_bytes == first.stats.sent_bytes
        registration.close()
        first.close()


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_given_to_ddp_trains_as_commhub_s_does(ranks, name):
    ranks(by_ddp_s_method, 2, [name])


MEMBERS = {
    "ALLREDUCE": "allreduce",
    "FP16_COMPRESS": "fp16",
    "BF16_COMPRESS": "bf16",
    "QUANTIZE_PER_TENSOR": "quantize_per_tensor",
    "QUANTIZE_PER_CHANNEL": "quantize_per_channel",
    "POWER_SGD": "powersgd",
    "POWER_SGD_RANK2": "powersgd",
    "BATCHED_POWER_SGD": "batched_powersgd",
    "BATCHED_POWER_SGD_RANK2": "batched_powersgd",
    "NOOP": "noop",
}


def by_the_enumeration():
    assert list(MEMBERS) == list(compat.DDPCommHookType.__members__)
    model = wrapped()
    for name, hook in MEMBERS.items():  # registering again replaces
        compat.DDPCommHookType[name].value(model=model, state=dist.group.WORLD)
        registration = commhub.registration(model)
        assert registration.name == hook, name
        assert registration.options.get("rank", 0) == (2 if "RANK2" in name else "POWER" in name), name
    compat.register_ddp_comm_hook(compat.DDPCommHookType.FP16_COMPRESS, model)
    registration = commhub.registration(model)
    assert str(registration) == "fp16"
    reference = wrapped()
    commhub.register(reference, "fp16")
    assert same(trained(model, 2), trained(reference, 2))
    with pytest.raises(commhub.HookOptionError, match="a member of DDPCommHookType"):
        compat.register_ddp_comm_hook("FP16_COMPRESS", model)


def test_the_enumeration_has_pytorch_s_members_and_registers_at_once_and_anew(ranks):
    from torch.distributed.algorithms.ddp_comm_hooks import DDPCommHookType

    assert list(compat.DDPCommHookType.__members__) == list(DDPCommHookType.__members__)
    ranks(by_the_enumeration, 2)


def by_wrappers():
    cases = {
        "allreduce fp16": (compat.fp16_compress_wrapper(compat.allreduce_hook), None, ("allreduce", "fp16")),
        "allreduce bf16": (compat.bf16_compress_wrapper(compat.allreduce_hook), None, ("allreduce", "bf16")),
        "cast": (compat.fp16_compress_wrapper(compat.fp16_compress_hook), None, ("fp16", None)),
        "twice": (
            compat.fp16_compress_wrapper(compat.bf16_compress_wrapper(compat.allreduce_hook)),
            None,
            ("allreduce", "bf16"),
        ),
        "powersgd": (
            compat.bf16_compress_wrapper(compat.powerSGD_hook),
            powersgd(),
            ("powersgd(start_step=2)", "bf16"),
        ),
    }
    for case, (hook, state, (name, wire)) in cases.items():
        model, reference = wrapped(), wrapped()
        model.register_comm_hook(state, hook)
        commhub.register(reference, name, wire=wire)
        assert same(trained(model), trained(reference)), case


def own_in_half(state, bucket):
    assert bucket.buffer().dtype == torch.float16
    state.append(bucket.index())
    return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()


def by_wrappers_around_functions():
    seen, model, reference = [], wrapped(), wrapped()
    model.register_comm_hook(seen, compat.fp16_compress_wrapper(own_in_half))
    for own, bare in zip(trained(model), trained(reference), strict=True):
        assert seen
        assert all(torch.allclose(own[name], bare[name], rtol=0.01, atol=1e-5) for name in own)


def test_wrappers_have_a_hook_s_payload_travel_in_16_bits(ranks):
    ranks(by_wrappers, 2)
    ranks(by_wrappers_around_functions, 2)


def averaged_and_doubled(state, bucket):
    return compat.allreduce_hook(state, bucket).then(lambda future: future.value() * 2)


def within_a_function_of_the_script():
    model, reference = wrapped(), wrapped()
    model.register_comm_hook(None, averaged_and_doubled)
    for doubled, plain in zip(trained(model, 3), trained(reference, 3), strict=True):
        assert all(torch.equal(doubled[name], 2 * plain[name]) for name in plain)
    assert commhub.registration(model).name == "allreduce"


def test_a_function_of_the_script_s_own_may_call_a_hook(ranks):
    ranks(within_a_function_of_the_script, 2)


def differing():
    model = wrapped()
    hook = (compat.fp16_compress_hook, compat.bf16_compress_hook)[dist.get_rank()]
    model.register_comm_hook(None, hook)
    with pytest.raises(commhub.HookMismatchError, match="fp16"):
        trained(model, 1)
    assert commhub.registration(model) is None
    registration = commhub.register(model, "allreduce")
    assert same(trained(model, 2), trained(wrapped(), 2))
    registration.close()


def test_ranks_that_differ_are_told_so_by_their_first_backward(ranks):
    ranks(differing, 2)


def wrong_states():
    for state, hook, text in (
        ({}, compat.fp16_compress_hook, "the state is dict; this hook takes a process group"),
        (None, compat.powerSGD_hook, "Give a commhub_compat.PowerSGDState"),
        (None, compat.post_localSGD_hook, "Give a commhub_compat.PostLocalSGDState"),
        (compat.PowerSGDState({}), compat.powerSGD_hook, "takes a process group"),
        (powersgd(matrix_approximation_rank=0), compat.powerSGD_hook, "rank"),
    ):
        model = wrapped()
        model.register_comm_hook(state, hook)
        with pytest.raises(commhub.HookOptionError, match=text):
            trained(model, 1)


def test_a_state_that_is_none_is_an_error_of_the_first_backward(ranks):
    ranks(wrong_states, 2)


def test_functions_have_their_names_and_can_be_saved():
    for name in HOOKS:
        hook = getattr(compat, name)
        assert hook.__qualname__ == name
        assert hook.__doc__
        assert pickle.loads(pickle.dumps(hook)) is hook
    # the one name by which PyTorch refuses a hook on all backends but NCCL
    assert compat.bf16_compress_hook.__name__ != "bf16_compress_hook"
