"""Products of large matrices and thin factors, run by run: against float64, and what one pass does in several."""

import pytest
import torch
from commhub_powersgd import _products
from commhub_powersgd._products import Addends, products, run_length

ROWS, COLS = 70, 33


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[7 * COLS, 32 * COLS, 1 << 18], ids=["runs of 7 rows", "runs of 32 rows", "one run"])
def _runs(request, monkeypatch):
    monkeypatch.setattr(_products, "_RUN", request.param)


@pytest.fixture(params=["host", "device"])
def made(request):
    """What makes products: a device's way works on the host as well."""
    return products if request.param == "host" else _products._OnDevice


def placed(batch, offset):
    """Matrices that lie evenly spaced, ``offset`` elements behind an aligned address."""
    flat = drawn(batch * (ROWS * COLS + 5) + offset)
    return flat.as_strided((batch, ROWS, COLS), (ROWS * COLS + 5, COLS, 1), offset)


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize("rank", [1, 2, 12])
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
@pytest.mark.parametrize("rank", [1, 2, 12])
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
@pytest.mark.parametrize("rank", [1, 2, 12])
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
        torch.testing.assert_close(error.view(ROWS, COLS), errors[i], rtol=0, atol=0)
    assert torch.equal(matrix, other)


def test_where_the_left_factor_is_averaged_it_makes_the_result():
    matrix = placed(2, 0)
    pair, _, product = filled(matrix, 2, products)
    mean = pair.averaged(left=True)
    mean.values.copy_(3 * pair.left.values)
    pair.store(slice(None), mean, pair.right)
    torch.testing.assert_close(matrix.double(), 3 * product, rtol=1e-4, atol=1e-4)


def test_only_what_an_exchange_wrote_is_held():
    """It is the next step's addend. Another addend's memory is free when the step is over."""

    def holders(tensor):
        return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

    pair, mean, _ = filled(placed(1, 0), 1, products)
    kept, passing = torch.zeros(ROWS * COLS), torch.zeros(ROWS * COLS)
    alone = holders(kept)
    pair.multiply_right(drawn(1, 1, COLS), Addends([passing]))
    assert holders(passing) == alone
    pair.exchange(0, pair.left, mean, kept)
    assert holders(kept) > alone
    pair.multiply_right(drawn(1, 1, COLS), Addends([passing]))
    assert holders(kept) == holders(passing) == alone


def test_each_matrix_is_read_in_runs_of_half_a_mebibyte():
    assert run_length(600, 1024) == 128
    assert run_length(2, 1 << 20) == 1
    assert run_length(3000, 100) == 1296  # a multiple of 16
    assert run_length(10, 100) == 10
