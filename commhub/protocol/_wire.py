"""Wire dtypes: from what ``wire=`` says to a ``torch.dtype``, and back to its shortest name."""

from __future__ import annotations

import torch

from commhub._errors import HookOptionError
from commhub._printable import shown

from ._wire_names import WIRES, bare, short_name


def wire_dtype(wire: object) -> torch.dtype | None:
    """The dtype that ``wire=`` means: a floating ``torch.dtype`` or a name such as ``"bf16"``.

    Raises:
        HookOptionError: if it means none.
    """
    if wire is None or (isinstance(wire, torch.dtype) and wire.is_floating_point):
        return wire
    if isinstance(wire, str) and bare(wire) in WIRES:
        dtype: torch.dtype = getattr(torch, WIRES[bare(wire)])
        return dtype
    raise HookOptionError(
        f"wire is {shown(wire)}; it is None, a floating torch.dtype, or one of {', '.join(sorted(WIRES))}."
    )


def short_dtype(dtype: torch.dtype) -> str:
    """The shortest name that ``wire_dtype`` reads back."""
    return short_name(dtype)
