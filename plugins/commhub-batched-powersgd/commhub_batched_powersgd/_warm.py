"""The warm start of a square, kept by parameter although it belongs to all parameters of a bucket.

State is allocated at registration, when buckets are not known, and is keyed by parameter name. A parameter of n_i
elements keeps ceil(sqrt(n_i)) of the right factor's columns: those of any bucket together hold the
ceil(sqrt(sum n_i)) that its square needs. Beside them stands which parameters the factor belonged to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._square import side_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from commhub import Setup

    from ._square import Square


class WarmStart:
    """Right factors from one step to the next, for as long as a bucket holds the same parameters.

    Args:
        setup: what ``prepare`` got; the pieces live in ``setup.state.shared(name)``, as ``"q"`` and ``"grouping"``.
        dtypes: of the parameters' factors, by name.
        rank: of the factors.
    """

    def __init__(self, setup: Setup, dtypes: Mapping[str, torch.dtype], rank: int) -> None:
        self._state, self._rank = setup.state, rank
        sizes = dict(zip(setup.names, (torch.Size(shape).numel() for shape in setup.shapes), strict=True))
        for name, dtype in dtypes.items():
            entries = setup.state.shared(name)
            entries["q"] = torch.zeros(rank, side_of(sizes[name]), dtype=dtype, device=setup.device)
            entries["grouping"] = torch.zeros((), dtype=torch.int64, device=setup.device)

    def load(self, square: Square, fresh: Tensor) -> Tensor:
        """The last step's factor, (rank, side); ``fresh`` where it was another group's. Branch-free."""
        tables = [self._state.shared(name) for name in square.names]
        kept = torch.cat([table["q"] for table in tables], dim=1)[: square.matrix.rank, : square.matrix.cols]
        same = (torch.stack([table["grouping"] for table in tables]) == _number(square)).all()
        return torch.where(same, kept, fresh)

    def store(self, square: Square, q: Tensor) -> None:
        """Keep a factor, (rank, side), for the next step."""
        widths = [side_of(size) for size in square.sizes]
        columns = q.new_zeros(self._rank, sum(widths))
        columns[: len(q), : q.shape[1]] = q
        groupings = torch.full((len(widths),), _number(square), device=q.device)
        for name, piece, grouping in zip(square.names, columns.split(widths, dim=1), groupings, strict=True):
            entries = self._state.shared(name)
            entries["q"], entries["grouping"] = piece, grouping


def _number(square: Square) -> int:
    return int(square.matrix.name, 16) >> 1
