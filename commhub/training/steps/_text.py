"""What ranks tell one another in words: each sends a list of lines, and all of them know all lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from commhub.protocol._collectives import AllGather, AllReduce

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange

_SHOWN = 6
"""How many differences one message lists."""


@attrs.frozen
class Entry:
    """One tensor as ranks compare it, in a line of its own."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, kind: str, name: str, tensor: torch.Tensor) -> Entry:
        """The entry for a tensor."""
        return cls(kind, name, tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class TextGather:
    """The lines of every rank of the group, in rank order, in ``everyone`` afterwards. None holds a line break."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.everyone: list[list[str]] = []
        self._text = "\n".join(lines).encode()

    def reduce(self, bucket: Bucket) -> Exchange:
        """Gather them; ``bucket`` plays no part."""
        device, text = bucket.flat.device, self._text
        lengths = (yield AllGather(torch.tensor([len(text)], device=device))).tolist()
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else padded[:0]
        gathered = (yield AllGather(padded.to(device))).cpu().view(len(lengths), -1)
        texts = [bytes(row[:n].tolist()).decode() for row, n in zip(gathered, lengths, strict=True)]
        self.everyone = [text.split("\n") if text else [] for text in texts]


class SharedText:
    """The words that all ranks have: gathered where any rank's have changed since they were, else as they were."""

    def __init__(self, mine: frozenset[str], known: tuple[frozenset[str], frozenset[str]] | None) -> None:
        self._mine = mine
        self._changed = known is None or known[0] != mine
        self.common = frozenset() if known is None else known[1]

    def reduce(self, bucket: Bucket) -> Exchange:
        """Ask whether any has changed, and gather them then."""
        changed = yield AllReduce(bucket.flat.fill_(float(self._changed)), op="sum")
        if float(changed) == 0:
            return
        told = TextGather(sorted(self._mine))
        yield from told.reduce(bucket)
        self.common = frozenset.intersection(*map(frozenset, told.everyone))


def difference(everyone: Sequence[Sequence[str]], ranks: Sequence[int]) -> str:
    """Which lines not every rank has, and which ranks have them; empty if there are none."""
    sets = [frozenset(lines) for lines in everyone]
    shared = frozenset.intersection(*sets)
    odd = [line for line in dict.fromkeys(line for lines in everyone for line in lines) if line not in shared]
    told = []
    for line in odd[:_SHOWN]:
        having = [str(rank) for rank, lines in zip(ranks, sets, strict=True) if line in lines]
        told.append(f"{line} (rank{'s' if len(having) > 1 else ''} {', '.join(having)} alone)")
    return "; ".join(told) + (f"; and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else "")
