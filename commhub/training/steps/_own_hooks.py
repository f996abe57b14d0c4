"""The hooks that the core itself needs: plain means and sums, and the exact average of sparse gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commhub._errors import HookError, described
from commhub.protocol._collectives import AllGather, AllReduce, ReduceScatter

if TYPE_CHECKING:
    from typing import NoReturn

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange


class PlainMean:
    """The average and nothing else: what a model does whose hook was removed."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average ``bucket.flat`` over all ranks."""
        bucket.flat.copy_((yield AllReduce(bucket.flat)))

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """Average this rank's part of it."""
        bucket.shard = yield ReduceScatter(bucket.flat)


class WholeMean:
    """The average in the bucket's own dtype, whatever the registration's wire is."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average ``bucket.flat``."""
        bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.float64)))


class Sum:
    """Adds up over the ranks."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Add up ``bucket.flat`` over the bucket's group."""
        bucket.flat.copy_((yield AllReduce(bucket.flat, op="sum", group=bucket.group)))


class Nothing:
    """Asks for nothing: a bucket that this step does not have."""

    def reduce(self, bucket: Bucket) -> Exchange:  # noqa: ARG002 - nothing is exchanged
        """End at once."""
        yield from ()


class Failed:
    """Ends a round in what went wrong elsewhere.

    Args:
        text: what.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def reduce(self, bucket: Bucket) -> NoReturn:  # noqa: ARG002 - nothing is exchanged
        """Raise it."""
        raise HookError(self._text)


class Failure:
    """Ends a round in what went wrong on this rank outside of any exchange, so that all ranks hear of it.

    Args:
        what: what could not be done, a sentence without its end.
        error: why.
    """

    def __init__(self, what: str, error: Exception) -> None:
        self._what, self._error = what, error

    def reduce(self, bucket: Bucket) -> NoReturn:  # noqa: ARG002 - nothing is exchanged
        """Raise it."""
        raise HookError(f"{self._what}: {described(self._error)}") from self._error


class SparseMean:
    """The exact average of a sparse gradient, for every hook: it is small, and no hook needs to know of it.

    It gathers the number of entries of each rank, then indices and values padded to the longest.
    """

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
