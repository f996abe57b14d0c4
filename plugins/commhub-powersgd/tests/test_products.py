"""Products of large matrices and thin factors, block by block: against float64, and what one pass does in several."""

import pytest
import torch
from commhub_powersgd import _products
from commhub_powersgd._products import Addends, exchange_product, left_factor, right_factor, store_product

ROWS, COLS = 70, 33


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[7 * COLS, 32 * COLS, 1 << 18], ids=["blocks of 7 rows", "blocks of 32 rows", "one block"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(_products, "_BLOCK", request.param)


def placed(batch, offset):
    """Matrices that lie evenly spaced, ``offset`` elements behind an aligned address."""
    flat = drawn(batch * (ROWS * COLS + 5) + offset)
    return flat.as_strided((batch, ROWS, COLS), (ROWS * COLS + 5, COLS, 1), offset)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("rank", [1, 2, 12])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_product_of_a_sum_leaves_the_sum_in_the_matrix(rank, offset):
    """Where there is nothing to add, the matrix stays."""
    for product, length in ((left_factor, COLS), (right_factor, ROWS)):
        matrix, factor, others = placed(3, offset), drawn(3, rank, length), drawn(3, ROWS * COLS)
        before = matrix.clone()
        total = before + 0.5 * others.view(3, ROWS, COLS)
        total[1] = before[1]
        result = product(matrix, factor, Addends([others[0], None, others[2]], 0.5))
        torch.testing.assert_close(matrix, total, rtol=1e-6, atol=1e-6)
        thin = total.double() if product is right_factor else total.double().mT
        torch.testing.assert_close(result.double(), factor.double() @ thin, rtol=1e-4, atol=1e-4)
        assert torch.equal(product(matrix, factor), result)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("rank", [1, 2, 12])
@pytest.mark.parametrize("offset", [0, 1])
def test_an_exchange_leaves_the_error_and_the_mean(rank, offset):
    matrix, error = placed(1, offset)[0], torch.empty(ROWS, COLS)
    before = matrix.clone()
    own, mean = ((drawn(rank, ROWS), k * drawn(rank, COLS)) for k in (1, 2))
    exchange_product(matrix, own, mean, error)
    product = own[0].double().T @ own[1].double()
    torch.testing.assert_close(error.double(), before.double() - product, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrix.double(), 2 * product, rtol=1e-4, atol=1e-4)
    alone = torch.empty(1, ROWS, COLS)
    store_product((mean[0][None], mean[1][None]), alone)
    assert torch.equal(matrix, alone[0])


def test_each_matrix_is_read_in_blocks_of_a_mebibyte():
    assert [len(block) for block in _products._split(torch.empty(600, 1024))] == [256, 256, 88]
    assert [len(block) for block in _products._split(torch.empty(2, 1 << 20))] == [1, 1]
    assert [len(block) for block in _products._split(torch.empty(3000, 100))] == [2608, 392]  # multiples of 16
