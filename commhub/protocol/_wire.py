"""Wire dtypes: what ``wire=`` may say, and how it is written."""

from __future__ import annotations

import torch

from commhub._errors import HookOptionError

_WIRES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def wire_dtype(wire: object) -> torch.dtype | None:
    """The dtype that ``wire=`` means: a floating ``torch.dtype`` or a name such as ``"bf16"``.

    Raises:
        HookOptionError: if it means none.
    """
    if wire is None or (isinstance(wire, torch.dtype) and wire.is_floating_point):
        return wire
    if isinstance(wire, str) and wire.lower().removeprefix("torch.") in _WIRES:
        return _WIRES[wire.lower().removeprefix("torch.")]
    raise HookOptionError(
        f"wire is {wire!r}; it is None, a floating torch.dtype, or one of {', '.join(sorted(_WIRES))}."
    )


def short_dtype(dtype: torch.dtype) -> str:
    """The shortest name that ``wire_dtype`` reads back."""
    return next((name for name, known in _WIRES.items() if known is dtype), str(dtype).removeprefix("torch."))
