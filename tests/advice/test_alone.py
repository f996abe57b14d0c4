"""One rank by itself finds out what a hook asks for among any number of them: just what real and virtual ranks do."""

import pytest
import torch

import commhub
from commhub.advice._alone import work_alone
from commhub.protocol._collectives import AllGather, AllReduce, AllToAll

HOOKS = [
    "allreduce",
    "fp16",
    "quantize_per_tensor",
    "quantize_per_channel",
    "quantize_per_channel(bits=4)",
    "powersgd(start_step=0)",
    "powersgd(rank=4, start_step=0, alternating=true)",
    "batched_powersgd(start_step=0)",
    "noop",
]
SHAPES = [[(64, 48), (64,)], [(33, 7, 3), (5,), ()]]


def gradients(seed=0):
    made = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=made) for shape in shapes] for shapes in SHAPES]


def alone(hook, p, **options):
    return work_alone(commhub.create(hook), hook, gradients(), hosts=(0,) * p, **options)


@pytest.mark.parametrize("p", [1, 2, 3, 8])
@pytest.mark.parametrize("hook", HOOKS)
def test_bytes_are_those_of_virtual_ranks(hook, p):
    tensors = [[t for bucket in gradients(rank) for t in bucket] for rank in range(p)]
    # A hook's first step may differ from the others, so of three steps the last one.
    two, three = (commhub.simulate(hook, tensors, steps=steps).sent_bytes[0] for steps in (2, 3))
    whole = work_alone(commhub.create(hook), hook, [tensors[0]], hosts=(0,) * p, steps=1)
    assert sum(cost.sent_bytes for cost in whole) == pytest.approx(three - two, rel=1e-12)


def test_stages_are_what_the_hook_yields():
    (plain, _), (half, _) = alone("allreduce", 4), alone("fp16", 4)
    size = 64 * 48 + 64
    for cost, width in ((plain, 4), (half, 2)):
        ((one,),) = [stage.asked for stage in cost.stages]
        assert (one.kind, one.payload_bytes, one.ranks) == (AllReduce, size * width, None)
        assert one.sent_bytes == 2 * 3 / 4 * size * width
    first, _ = alone("quantize_per_channel", 4)
    assert [[one.kind for one in stage.asked] for stage in first.stages] == [[AllToAll], [AllGather]]
    assert [len(cost.stages) for cost in alone("noop", 4)] == [0, 0]


def test_a_wire_dtype_counts():
    plain, half = alone("allreduce", 2), alone("allreduce", 2, wire=torch.float16)
    assert [cost.sent_bytes for cost in half] == [cost.sent_bytes / 2 for cost in plain]


def test_times_are_of_this_device_and_all_of_them_positive():
    for cost in alone("powersgd(start_step=0)", 2):
        assert all(stage.seconds > 0 for stage in cost.stages)
        assert cost.decode > 0


def test_gradients_stay_as_they_are():
    tensors = gradients()
    work_alone(commhub.create("fp16"), "fp16", tensors, hosts=(0, 0))
    for mine, before in zip(tensors, gradients(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))


def test_groups_are_those_that_hosts_make():
    hook = "two_level(inner=fp16)"
    pytest.importorskip("commhub_two_level")
    costs = work_alone(commhub.create(hook), hook, gradients(), hosts=(0, 0, 1, 1))
    groups = {one.ranks for cost in costs for stage in cost.stages for one in stage.asked}
    assert (0, 1) in groups
    assert any(ranks is not None and 0 in ranks and len({rank // 2 for rank in ranks}) == 2 for ranks in groups)


def test_what_a_hook_does_wrong_names_it():
    class Wrong:
        def reduce(self, bucket):
            yield "nothing"

    with pytest.raises(commhub.HookError, match=r"mine, bucket 0, step 0, rank 0: yielded str"):
        work_alone(Wrong(), "mine", gradients(), hosts=(0, 0))
