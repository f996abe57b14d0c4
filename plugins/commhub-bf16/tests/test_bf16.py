"""bf16: the mean first, then the cast, then a sum in bfloat16, then the cast back."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp, train


def reference(gradients):
    """The algorithm in plain torch: one rank's share of the mean at a time, in rank order, in bfloat16."""
    shares = [(g * (1 / len(gradients))).to(torch.bfloat16) for g in gradients]
    total = shares[0].clone()
    for share in shares[1:]:
        total = total + share
    return total.to(gradients[0].dtype)


def normal(rank, n=1000, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
def test_it_is_the_reference_bit_by_bit(p):
    gradients = [normal(rank) for rank in range(p)]
    result = commhub.simulate("bf16", [[g] for g in gradients])
    assert all(bitwise_equal(mine[0], reference(gradients)) for mine in result.gradients)


def test_the_range_of_float32_survives():
    gradients = [torch.tensor([3e38, 1e-30, 1e5]), torch.tensor([3e38, 1e-30, 0.0])]
    result = commhub.simulate("bf16", [[g] for g in gradients])
    assert result.gradients[0][0].tolist() == pytest.approx([3e38, 1e-30, 5e4], rel=8e-3)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_on_one_rank_reaches_all(bad):
    result = commhub.simulate("bf16", [[torch.tensor([1.0])], [torch.tensor([bad])], [torch.tensor([1.0])]])
    assert not any(mine[0].isfinite().any() for mine in result.gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_gradients_dtype(dtype):
    gradients = [normal(rank, dtype=dtype) for rank in range(2)]
    mean = (gradients[0].double() + gradients[1].double()) / 2
    (got, _) = (mine[0] for mine in commhub.simulate("bf16", [[g] for g in gradients]).gradients)
    assert got.dtype == dtype
    assert torch.linalg.norm(got.double() - mean) <= 8e-3 * torch.linalg.norm(mean)


def test_complex_gradients_are_averaged_part_by_part():
    gradients = [torch.complex(normal(rank), normal(rank + 10)) for rank in range(2)]
    got = commhub.simulate("bf16", [[g] for g in gradients]).gradients[0][0]
    assert bitwise_equal(got.real.contiguous(), reference([g.real for g in gradients]))
    assert bitwise_equal(got.imag.contiguous(), reference([g.imag for g in gradients]))


def test_the_error_of_one_step_is_within_the_declared_tolerance():
    gradients = [normal(rank, 100_000) for rank in range(4)]
    mean = sum(g.double() for g in gradients) / 4
    got = commhub.simulate("bf16", [[g] for g in gradients]).gradients[0][0]
    assert torch.linalg.norm(got - mean) <= commhub.info("bf16").spec.tolerance * torch.linalg.norm(mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_two_bytes_travel_for_each_element(dtype):
    result = commhub.simulate("bf16", [[normal(rank, dtype=dtype)] for rank in range(4)])
    assert result.sent_bytes == (2 * 3 / 4 * 1000 * 2,) * 4
    assert result.compression == dtype.itemsize / 2


def test_a_parameter_without_elements_or_dimensions_is_no_exception():
    gradients = [[torch.zeros(0, 3), torch.tensor(2.0 * rank), normal(rank)] for rank in range(2)]
    empty, scalar, _ = commhub.simulate("bf16", gradients).gradients[1]
    assert (empty.shape, scalar.item()) == ((0, 3), 1.0)


def first_step(cap):
    """This rank's own gradients of the first step, and those that the hook made of them, in many buckets or one."""
    widths, rank = [16] * 5, dist.get_rank()
    bare, model = mlp(widths), DistributedDataParallel(mlp(widths), bucket_cap_mb=cap)
    commhub.register(model, "bf16")
    bare(*batches(16)(rank, 0)).square().mean().backward()
    run = train(model, 3)
    assert_equal_across_ranks(run.parameters)
    return {name: p.grad for name, p in bare.named_parameters()}, run.gradients[0]


@pytest.mark.parametrize("cap", [25, 1 / 1024], ids=["one bucket", "many buckets"])
def test_two_real_ranks_get_the_reference_bit_by_bit(ranks, cap):
    (mine, averaged), (others, _) = ranks(first_step, 2, cap)
    assert all(bitwise_equal(averaged[name], reference([mine[name], others[name]])) for name in mine)


def test_an_option_that_it_does_not_have_is_refused():
    with pytest.raises(commhub.HookOptionError, match="bf16"):
        commhub.create("bf16", rank=2)
    assert commhub.info("BF16_COMPRESS").name == "bf16"


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_a_wire_that_would_change_nothing_is_refused(wire):
    gradients = [[torch.ones(4)], [torch.ones(4)]]
    with pytest.raises(commhub.HookOptionError, match=f"wire={wire} changes nothing: all .* is cast to bf16 already"):
        commhub.simulate("bf16", gradients, wire=wire)


def test_a_wire_is_for_what_rules_send_uncast():
    gradients = [[torch.full((4,), 1 / 3), torch.full((4,), 1 / 3)]] * 2
    result = commhub.simulate("bf16", gradients, wire="fp16", rules={"1": "dense"})
    cast, dense = result.gradients[0]
    assert bitwise_equal(cast, gradients[0][0].to(torch.bfloat16).float())
    assert bitwise_equal(dense, gradients[0][1].to(torch.float16).float())


def test_inside_another_hook_it_is_not_asked():
    gradients = [[torch.ones(4)], [torch.ones(4)]]
    result = commhub.simulate("optimizer_overlap(inner='bf16')", gradients, wire="fp16")
    assert result.gradients[0][0].tolist() == [1.0] * 4
