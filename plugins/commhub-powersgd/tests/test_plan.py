"""Where a bucket's memory is, and what is kept between steps because it stays there."""

import weakref
from types import SimpleNamespace

import torch
from commhub_powersgd._layout import Matrix
from commhub_powersgd._plan import lay_out

SIZES = {"a": 600, "bias": 7, "b": 600}
MATRICES = {name: Matrix(name, 30, 20, 1) for name in "ab"}


def planned(flat, alternating=False):
    bucket = SimpleNamespace(flat=flat, names=tuple(SIZES), segments=flat.split(list(SIZES.values())))
    return lay_out(bucket, MATRICES, batched=True, alternating=alternating)


def test_views_are_kept_while_the_bucket_stays_where_it_is():
    flat = torch.arange(1207.0)
    plan = planned(flat)
    plan.seat(flat)  # is it there in the next step?
    seat, start = plan.seat(flat), torch.ones(2, 1, 20)
    one = seat.approximation(plan.batches[0], start)
    again = plan.seat(flat.view(-1))  # another tensor, the same memory
    assert again is seat
    assert seat.approximation(plan.batches[0], 2 * start) is one
    assert one.start[0, 0, 0] == 2


def test_when_the_bucket_moves_they_follow():
    plan, former = planned(torch.zeros(1207)), torch.zeros(1207)
    for _ in range(3):
        plan.seat(former).approximation(plan.batches[0], torch.ones(2, 1, 20))
    flat = torch.arange(1207.0)
    seat = plan.seat(flat)
    one = seat.approximation(plan.batches[0], torch.ones(2, 1, 20))
    assert [m[0, 0].item() for m in one.m] == [0, 607]
    seat.pack_dense(left=True)
    assert plan.first[-7:].tolist() == list(range(600, 607))


def test_memory_that_is_new_in_each_step_is_not_held():
    plan = planned(torch.zeros(1207))
    for _ in range(4):
        flat = torch.zeros(1207)
        seen = weakref.ref(flat.untyped_storage())
        plan.seat(flat).approximation(plan.batches[0], torch.ones(2, 1, 20))
        del flat
        assert seen() is None


def test_matrices_in_16_bits_are_widened_anew_in_each_step():
    """Nothing of a wide bucket's size may be kept."""
    flat = torch.arange(1207.0).to(torch.bfloat16)
    plan = planned(flat)
    plan.seat(flat)
    seat = plan.seat(flat)
    first, second = (seat.approximation(plan.batches[0], torch.ones(1, 1, 20)) for _ in range(2))
    assert first is not second
    assert first.m.dtype == torch.float32


def test_the_rest_travels_with_whichever_message_is_sent():
    flat = torch.arange(1207.0)
    plan = planned(flat, alternating=True)
    for left, message in ((True, plan.first), (False, plan.second)):
        plan.seat(flat).pack_dense(left=left)
        assert message[-7:].tolist() == list(range(600, 607))
        message[-7:] = -1.0
        plan.seat(flat).unpack_dense(left=left)
        assert flat[600:607].tolist() == [-1.0] * 7
        flat[600:607] = torch.arange(600.0, 607.0)
    assert planned(flat).second.numel() == 40
