"""What the compiled last pass writes past the caches, and what through them."""

import pytest
import torch
from commhub_powersgd._compiled import compiled_passes
from commhub_powersgd._products import products


def drawn(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_written_past_the_caches_is_what_is_written_through_them(rank, dtype, monkeypatch):
    """It goes past them at aligned addresses alone; and to nothing but the matrix, whatever the number of threads."""
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    rows, cols, guard = 70, 64, 16
    elements = rows * cols
    found = []
    for offset, threads in ((0, 1), (1, 1), (0, 3), (5, 3)):
        torch.set_num_threads(threads)
        rooms = [torch.full((elements + 2 * guard,), 7.0, dtype=dtype) for _ in range(3)]
        places = [room[guard + offset :][:elements] for room in rooms]
        assert (places[0].data_ptr() % 64 == 0) == (offset == 0)
        settled, error, stored = places
        for place in (settled, stored):
            place.copy_(drawn(elements, dtype=dtype))
        for place, keeps in ((settled, True), (stored, False)):
            pair = products(place.view(1, rows, cols), rank, compiled_passes(1))
            pair.left.values.copy_(drawn(1, rank, rows, dtype=dtype))
            pair.right.values.copy_(drawn(1, rank, cols, dtype=dtype))
            mean = pair.averaged(left=False)
            mean.values.copy_(drawn(1, rank, cols + 1, dtype=dtype)[..., 1:])
            if keeps:
                assert pair.exchange(0, pair.left, mean, error)
            else:
                pair.store(slice(None), pair.left, mean)
        for room in rooms:
            outside = torch.cat([room[: guard + offset], room[guard + offset + elements :]])
            assert outside.eq(7).all()
        product = pair.left.values[0].double().mT @ pair.right.values[0].double()
        missed = drawn(elements, dtype=dtype).double().view(rows, cols) - product
        torch.testing.assert_close(error.view(rows, cols).double(), missed, rtol=1e-4, atol=1e-4)
        assert torch.equal(settled, stored)
        found.append((settled.clone(), error.clone()))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))
