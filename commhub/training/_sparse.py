"""The exact average of a sparse gradient, for every hook: what is sparse is small, and no hook needs to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commhub.protocol._collectives import AllGather

if TYPE_CHECKING:
    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange


class SparseMean:
    """Gathers the number of entries of each rank, then indices and values padded to the longest."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average ``bucket.flat``, a sparse COO tensor, over the ranks."""
        mine = bucket.flat.coalesce()
        indices, values = mine.indices(), mine.values()
        counts = yield AllGather(torch.tensor([values.shape[0]], device=values.device))
        per_rank = [int(n) for n in counts]
        longest = max(per_rank)
        padded_indices = indices.new_zeros((longest, indices.shape[0]))
        padded_values = values.new_zeros((longest, *values.shape[1:]))
        padded_indices[: indices.shape[1]] = indices.t()
        padded_values[: values.shape[0]] = values * (1.0 / bucket.divisor)
        all_indices, all_values = yield AllGather(padded_indices), AllGather(padded_values)
        all_indices = all_indices.view(len(per_rank), longest, -1)
        all_values = all_values.view(len(per_rank), longest, *values.shape[1:])
        bucket.flat = torch.sparse_coo_tensor(
            torch.cat([all_indices[r, :n] for r, n in enumerate(per_rank)]).t(),
            torch.cat([all_values[r, :n] for r, n in enumerate(per_rank)]),
            mine.shape,
            check_invariants=False,  # torch warns where nobody says
        ).coalesce()
