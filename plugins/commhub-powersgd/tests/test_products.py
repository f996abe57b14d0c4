"""Products of large matrices and thin factors, run by run: against float64, and what one pass does in several."""

import copy
import logging

import pytest
import torch
from commhub_powersgd import Approximation, _on_host
from commhub_powersgd._compiled import Fused, compiled_passes
from commhub_powersgd._factors import Addends
from commhub_powersgd._on_device import OnDevice
from commhub_powersgd._on_host import OnHost, run_length
from commhub_powersgd._products import products

import commhub

ROWS, COLS = 70, 37


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.fixture(params=[7 * COLS, 32 * COLS, 1 << 18], ids=["runs of 7 rows", "runs of 32 rows", "one run"])
def _runs(request, monkeypatch):
    monkeypatch.setattr(_on_host, "_RUN", request.param)


@pytest.fixture(params=["host", "device", "compiled"])
def made(request, monkeypatch):
    """What makes products: a device's way works on the host as well; beyond rank 8 none is compiled."""
    if request.param != "compiled":
        return {"host": OnHost, "device": OnDevice}[request.param]
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    compiled = compiled_passes(1)
    assert compiled is not None

    def make(matrix, rank):
        found = products(matrix, rank, compiled)
        assert type(found) is (Fused if rank <= 8 else OnHost)
        return found

    return make


def placed(batch, offset):
    """Matrices that lie evenly spaced, ``offset`` elements behind an aligned address."""
    flat = drawn(batch * (ROWS * COLS + 5) + offset)
    return flat.as_strided((batch, ROWS, COLS), (ROWS * COLS + 5, COLS, 1), offset)


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_product_of_a_sum_leaves_the_sum_in_the_matrix(made, rank, offset, side):
    """Where there is nothing to add, the matrix stays."""
    matrix, others = placed(3, offset), drawn(3, ROWS * COLS)
    before = matrix.clone()
    total = before + 0.5 * others.view(3, ROWS, COLS)
    total[1] = before[1]
    pair = made(matrix, rank)
    if side == "right":
        factor, multiply, result = drawn(3, rank, COLS), pair.multiply_right, pair.left.values
    else:
        factor, multiply, result = drawn(3, rank, ROWS), pair.multiply_left, pair.right.values
    multiply(factor, Addends([others[0], None, others[2]], 0.5))
    torch.testing.assert_close(matrix, total, rtol=1e-6, atol=1e-6)
    thin = total.double().mT if side == "right" else total.double()
    torch.testing.assert_close(result.double(), factor.double() @ thin, rtol=1e-4, atol=1e-4)
    assert side == "right" or torch.equal(pair.left.values, factor)  # P and Q belong together
    first = result.clone()
    multiply(factor)
    assert torch.equal(result, first)


def filled(matrix, rank, made):
    """Products with factors of their own and a mean right factor, twice the own one."""
    pair = made(matrix, rank)
    pair.multiply_left(drawn(len(matrix), rank, ROWS))  # what it multiplied is the left factor
    pair.left.values.copy_(drawn(len(matrix), rank, ROWS))
    pair.right.values.copy_(drawn(len(matrix), rank, COLS))
    mean = pair.averaged(left=False)
    mean.values.copy_(2 * pair.right.values)
    return pair, mean, pair.left.values.double().mT @ pair.right.values.double()


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("offset", [0, 1])
def test_an_exchange_leaves_the_error_and_the_mean(made, rank, offset):
    matrix, error = placed(2, offset), torch.empty(2, ROWS * COLS)
    before = matrix.clone()
    pair, mean, product = filled(matrix, rank, made)
    for i in reversed(range(2)):
        pair.exchange(i, pair.left, mean, error[i])
    found = error.view(2, ROWS, COLS).double()
    torch.testing.assert_close(found, before.double() - product, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrix.double(), 2 * product, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("offset", [0, 1])
def test_an_exchange_is_a_subtraction_and_a_result(made, rank, offset):
    matrix, error = placed(2, offset), torch.empty(ROWS * COLS)
    pair, mean, _ = filled(matrix, rank, made)
    other = matrix.clone()
    twin, its_mean, _ = filled(other, rank, made)
    for part in twin.parts():
        twin.subtract(part)
    errors = other.clone()
    for part in twin.parts():
        twin.store(part, twin.left, its_mean)
    for i in range(2):
        pair.exchange(i, pair.left, mean, error)
        torch.testing.assert_close(error.view(ROWS, COLS), errors[i], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(matrix, other, rtol=1e-6, atol=1e-5)


def test_where_the_left_factor_is_averaged_it_makes_the_result(made):
    matrix = placed(2, 0)
    pair, _, product = filled(matrix, 2, made)
    mean = pair.averaged(left=True)
    mean.values.copy_(3 * pair.left.values)
    pair.store(slice(None), mean, pair.right)
    torch.testing.assert_close(matrix.double(), 3 * product, rtol=1e-4, atol=1e-4)


def test_only_what_an_exchange_wrote_is_held():
    """It is the next step's addend. Another addend's memory is free when the step is over."""

    def holders(tensor):
        return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

    pair, mean, _ = filled(placed(1, 0), 1, OnHost)
    kept, passing = torch.zeros(ROWS * COLS), torch.zeros(ROWS * COLS)
    alone = holders(kept)
    pair.multiply_right(drawn(1, 1, COLS), Addends([passing]))
    assert holders(passing) == alone
    pair.exchange(0, pair.left, mean, kept)
    assert holders(kept) > alone
    pair.multiply_right(drawn(1, 1, COLS), Addends([passing]))
    assert holders(kept) == holders(passing) == alone


@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 64), (130, 300), (67, 8 * 16 + 1)], ids=str)
def test_compiled_passes_do_every_rank_dtype_and_shape(rank, dtype, shape, monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    rows, cols = shape
    m, q, other = (
        drawn(2, rows, cols, dtype=dtype),
        drawn(2, rank, cols, dtype=dtype),
        drawn(2, rows * cols, dtype=dtype),
    )
    close = {"rtol": 1e-12, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    before = m.double().clone()
    pair = products(m, rank, compiled_passes(1))
    pair.multiply_right(q, Addends(list(other), 0.5))
    total = before + 0.5 * other.double().view(2, rows, cols)
    torch.testing.assert_close(m.double(), total, **close)
    torch.testing.assert_close(pair.left.values.double(), q.double() @ total.mT, **close)
    pair.multiply_left(drawn(2, rank, rows, dtype=dtype), Addends(list(other), -0.5))
    torch.testing.assert_close(m.double(), before, **close)
    torch.testing.assert_close(pair.right.values.double(), drawn(2, rank, rows, dtype=dtype).double() @ before, **close)
    product = pair.left.values.double().mT @ pair.right.values.double()
    mean, error = pair.averaged(left=False), torch.empty_like(other)
    mean.values.copy_(3 * pair.right.values)
    for i in range(2):
        pair.exchange(i, pair.left, mean, error[i])
    torch.testing.assert_close(error.double().view(2, rows, cols), before - product, **close)
    torch.testing.assert_close(m.double(), 3 * product, **close)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_compiled_sums_depend_on_no_address_and_no_number_of_threads(rank, monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    found = []
    for offset, threads in ((0, 1), (1, 1), (0, 2), (3, 2)):
        torch.set_num_threads(threads)
        room = torch.empty(2 * 70 * 150 + offset)
        m = room[offset:].view(2, 70, 150).copy_(drawn(2, 70, 150))
        pair = products(m, rank, compiled_passes(1))
        pair.multiply_right(drawn(2, rank, 150), Addends([drawn(70 * 150), None]))
        pair.multiply_left(pair.left.values)
        found.append((m.clone(), pair.left.values.clone(), pair.right.values.clone()))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_an_addend_of_another_dtype_is_refused(monkeypatch):
    """Its memory would be read as something else."""
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    pair = products(placed(1, 0), 1, compiled_passes(1))
    with pytest.raises(ValueError, match=r"addend is torch\.float64"):
        pair.multiply_right(drawn(1, 1, COLS), Addends([torch.zeros(ROWS * COLS, dtype=torch.float64)]))


def test_each_matrix_is_read_in_runs_of_half_a_mebibyte():
    assert run_length(600, 1024) == 128
    assert run_length(2, 1 << 20) == 1
    assert run_length(3000, 100) == 1296  # a multiple of 16
    assert run_length(10, 100) == 10


@pytest.mark.parametrize(("wanted", "found"), [("0", OnHost), ("1", Fused)])
def test_the_environment_decides_whether_passes_are_compiled(wanted, found, monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", wanted)
    made = []
    monkeypatch.setattr(
        "commhub_powersgd._iteration.products", lambda *given: made.append(products(*given)) or made[-1]
    )
    commhub.simulate("powersgd(start_step=0)", [[torch.ones(40, 30)]])
    assert [type(one) for one in made] == [found]


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog):
    def broken(*_args):
        raise RuntimeError("no compiler here")

    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", broken)
    with caplog.at_level(logging.WARNING, "commhub"):
        result = commhub.simulate("powersgd(start_step=0)", [[torch.ones(40, 30)]] * 2)
    assert "powersgd runs uncompiled: RuntimeError: no compiler here" in caplog.text
    torch.testing.assert_close(result.gradients[0][0], torch.ones(40, 30))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("options", [{}, {"alternating": True}, {"num_power_iterations": 2}], ids=str)
def test_no_addend_is_held_when_the_step_is_over(options, monkeypatch):
    """With a loss scaler another tensor becomes the residual, and two would be alive."""
    made = []

    class Kept(Approximation):
        def __attrs_post_init__(self):
            super().__attrs_post_init__()
            made.append(self)

    monkeypatch.setattr("commhub_powersgd._plan.Approximation", Kept)
    commhub.simulate("powersgd", [[torch.ones(40, 30)]], steps=3, start_step=0, **options)
    assert made
    assert all(one.addends is None for one in made)


def test_a_factor_of_another_dtype_or_shape_is_refused(made):
    """Compiled, its memory would be read as something else."""
    pair = made(placed(2, 0), 2)
    for wrong in (drawn(2, 2, COLS, dtype=torch.float64), drawn(2, 2, COLS - 1), drawn(1, 2, COLS)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            pair.multiply_right(wrong)


def test_matrices_with_gaps_in_their_rows_are_not_for_compiled_passes(monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    assert type(products(drawn(2, COLS, ROWS).mT, 1, compiled_passes(1))) is OnHost


def test_a_library_that_exports_nothing_counts_as_none(monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    monkeypatch.setattr("commhub_powersgd._compiled.cpp_library", lambda *_, **__: object())
    assert compiled_passes(1) is None


@pytest.mark.usefixtures("passes")
def test_a_hook_that_was_at_work_can_be_copied_and_begins_anew():
    hook = commhub.simulate("powersgd(start_step=0, rank=2)", [[torch.ones(40, 30)]] * 2, steps=2).hooks[0]
    other = copy.deepcopy(hook)
    assert (other.rank, other.start_step) == (2, 0)
    assert other._plans is None
    commhub.simulate(hook, [[torch.ones(40, 30)]] * 2, steps=2)
