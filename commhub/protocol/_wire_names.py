"""How wire dtypes are written. This module imports no torch, so that hook strings are written without loading it."""

from __future__ import annotations

from typing import Final

from commhub._printable import shown

WIRES: Final = {
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
}
"""What ``wire=`` may say, and torch's own name of the dtype; the shortest comes first."""


def bare(wire: str) -> str:
    """The key in ``WIRES`` that a spelling such as ``"torch.BFloat16"`` stands for, if it stands for any."""
    return wire.lower().removeprefix("torch.")


def short_name(wire: object) -> str:
    """The shortest spelling of a wire: of text, or of a ``torch.dtype``; what is none of ``WIRES`` stays as it is."""
    text = wire if isinstance(wire, str) else shown(wire)
    dtype = WIRES.get(bare(text))
    return next((name for name, known in WIRES.items() if known == dtype), text.removeprefix("torch."))
