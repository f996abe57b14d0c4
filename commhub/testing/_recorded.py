"""What torch's flight recorder says that hooks have sent: an account of bytes that is not commhub's own."""

from __future__ import annotations

import json
import math
from typing import Any

_BYTES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Byte": 1, "Char": 1, "Int": 4, "Long": 8, "Bool": 1}


class Recorder:
    """The collectives of this process from now on, in groups of commhub's own.

    The environment variable ``TORCH_FR_BUFFER_SIZE`` must have given the recorder room, such as ``2000``, before the
    process's first group was made; what no longer fits in it is not counted. Requests that travel in pieces are
    recorded piece by piece.
    """

    def __init__(self) -> None:
        self._next = 1 + max((entry["record_id"] for entry in _entries()), default=-1)

    def sent_bytes(self, ranks: int) -> float:
        """What this rank has sent, by the bandwidth-optimal collectives, as ``Registration.stats`` counts.

        The single number by which ranks tell each other that a step ended well is no part of it.

        Args:
            ranks: how many take part in each collective.
        """
        return sum(_sent(entry, ranks) for entry in _entries() if entry["record_id"] >= self._next and _is_ours(entry))


def _entries() -> list[dict[str, Any]]:
    from torch._C import _distributed_c10d

    recorded = _distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]  # torch's stub leaves it out
    entries: list[dict[str, Any]] = json.loads(recorded).get("entries", [])  # none before the first group
    return entries


def _is_ours(entry: dict[str, Any]) -> bool:
    """Whether it is in a group without a name, and no confirmation."""
    return entry["process_group"] == ["", ""] and (entry["input_sizes"], entry["input_dtypes"]) != ([[1]], ["Float"])


def _sent(entry: dict[str, Any], ranks: int) -> float:
    given = zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
    nbytes: float = sum(math.prod(shape) * _BYTES[dtype] for shape, dtype in given)
    match entry["profiling_name"].partition(":")[2]:
        case "all_reduce":
            return 2 * (ranks - 1) / ranks * nbytes
        case "all_to_all" | "reduce_scatter":
            return (ranks - 1) / ranks * nbytes
        case "all_gather":
            return float((ranks - 1) * nbytes)
    raise ValueError(f"{entry['profiling_name']} is none of the collectives that hooks ask for")
