"""What a codec is: rows in, bytes and scales out, and what those missed. It knows no rank, bucket or step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

import attrs
import torch

from commhub._errors import HookOptionError

if TYPE_CHECKING:
    from torch import Tensor


class Codec(Protocol):
    """Codes rows of numbers, each row for itself. ``TwoStep`` makes a hook of it.

    A parameter is cut into rows; the last one is filled up with zeros. A row's codes are bytes, and beside them lie
    some scales. Tensors are on one device, with as many rows each, and all but the last contiguous:

    * ``rows``: (n, row), in float32 or float64
    * ``codes``: (n, ``row_bytes``), uint8
    * ``scales``: (n, ``scales``), in the rows' dtype
    * ``counts``: (n, 1), int64: how many elements of each row are the parameter's, at least 1

    Zeros decode to exact zeros, and so do codes and scales that are zero. The first scale is a factor: with half of
    it, the codes stand for half as much. If an element of a row is not finite, then neither is one of its scales.

    A codec may have more, each of which counts as missing where it is not there:

    * ``seed``, an int or None: rounds by chance. ``encode`` then gets a fifth tensor, noise like ``rows``, uniform in
      [0, 1), which depends on the seed, the parameter's name, the step and the rank
    * ``whole``, a bool: a parameter's rows share their scales. ``extents(rows, out)`` then writes for each row, in the
      shape of its scales, what is not negative and grows with it; ``scales_of(extents)`` makes scales of the largest
      ones; and ``encode`` is given them, instead of finding them
    * ``code``, a dtype: torch.int8, if its codes are to be that and not uint8
    * ``bounded``, a bool: what the codes miss of a finite row is finite, also times the ranks. That spares error
      feedback a look
    * ``prepare(dtype, device, elements, keeping=...)``: is called at registration for each dtype of rows to come, with
      how many elements a step puts through it, to compile what is worth it

    Parameters whose codecs are equal are coded together, so a codec can be hashed: a frozen attrs class or dataclass,
    say. Ranks compare what such a class shows of itself when the hook is registered.

    Attributes:
        row: elements of a row.
        scales: how many numbers lie beside a row's codes, at least 1.
    """

    @property
    def row(self) -> int: ...

    @property
    def scales(self) -> int: ...

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a row's codes, without its scales, for rows of ``dtype``."""
        ...

    def encode(self, rows: Tensor, codes: Tensor, scales: Tensor, counts: Tensor, *, keeping: bool) -> None:
        """Write codes and scales. With ``keeping``, ``rows`` hold afterwards what those miss; else anything."""
        ...

    def decode(self, codes: Tensor, scales: Tensor, rows: Tensor, *, adding: bool) -> None:
        """Write into ``rows`` what codes and scales stand for, or add it."""
        ...


class FullCodec(Codec, Protocol):
    """A codec with all that it may have."""

    seed: int | None
    whole: bool
    code: torch.dtype
    bounded: bool

    def encode(
        self,
        rows: Tensor,
        codes: Tensor,
        scales: Tensor,
        counts: Tensor,
        noise: Tensor | None = None,
        *,
        keeping: bool,
    ) -> None: ...

    def extents(self, rows: Tensor, out: Tensor) -> None: ...

    def scales_of(self, extents: Tensor) -> Tensor: ...

    def prepare(self, dtype: torch.dtype, device: torch.device, elements: int, *, keeping: bool) -> None: ...


def code_dtype(codec: Codec) -> torch.dtype:
    """The dtype of a codec's codes."""
    found: torch.dtype = getattr(codec, "code", torch.uint8)
    return found


def checked(codec: Codec) -> Codec:
    """The codec, if it has what a codec has.

    Raises:
        HookOptionError: for what it lacks.
    """
    kind = type(codec).__name__
    if isinstance(codec, type):
        raise HookOptionError(f"the codec is the class {codec.__name__}. Give an instance of it.")
    for name in ("row_bytes", "encode", "decode"):
        if not callable(getattr(codec, name, None)):
            raise HookOptionError(f"{kind} is no codec: it has no method {name}().")
    for name in ("row", "scales"):
        _check_count(f"{kind}.{name}", getattr(codec, name, None))
    _check_count(f"{kind}.row_bytes(torch.float32)", codec.row_bytes(torch.float32))
    try:
        hash(codec)
    except TypeError as error:
        raise HookOptionError(f"{kind} cannot be hashed ({error}). Make its class frozen, its fields too.") from error
    return codec


def _check_count(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HookOptionError(f"{what} is {value!r}; it is a whole number above zero.")


def shown(codec: Codec) -> str:
    """What ranks compare of a codec: its class, and its fields where it is an attrs class or a dataclass.

    Where something lies in memory, as functions show of themselves, is no part of it.
    """
    kind = type(codec)
    plain = attrs.has(kind) or hasattr(kind, "__dataclass_fields__")
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(codec)) if plain else f"{kind.__module__}.{kind.__qualname__}"
