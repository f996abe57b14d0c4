"""The passes over matrices on the host, compiled: each reads and writes every element once."""

from __future__ import annotations

import ctypes
from importlib import resources
from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub.toolkit import cpp_library

from ._factors import Factor, addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ._factors import Addends

_RANKS = range(1, 9)
_NAMES = {torch.float32: "float32", torch.float64: "float64"}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


@attrs.frozen(eq=False)
class Passes:
    """The functions of ``_passes.cpp`` for one dtype and rank. Pointers are to contiguous memory."""

    multiply: Callable[..., None]
    project: Callable[..., None]
    settle: Callable[..., int]


class Compiled:
    """What there is compiled, whatever the dtype and the rank."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions

    def passes(self, dtype: torch.dtype, rank: int) -> Passes | None:
        """``None`` where a large product is as fast: beyond rank 8."""
        if dtype not in _NAMES or rank not in _RANKS:
            return None
        sizes = [_SIZE, _SIZE, ctypes.c_int]
        adding = [_POINTER, _POINTER, ctypes.c_double, _POINTER, _POINTER, *sizes]
        return Passes(
            multiply=self._function("multiply", dtype, rank, adding),
            project=self._function("project", dtype, rank, adding),
            settle=self._function("settle", dtype, rank, [*[_POINTER] * 6, *sizes], ctypes.c_int),
        )

    def _function(
        self, name: str, dtype: torch.dtype, rank: int, arguments: Sequence[type], result: type | None = None
    ) -> Callable[..., Any]:
        found = getattr(self._functions, f"{name}_{_NAMES[dtype]}_{rank}")
        found.argtypes, found.restype = arguments, result
        made: Callable[..., Any] = found
        return made


class Fused:
    """See ``Products``. Matrix by matrix, each pass against the direction of the one before it, as in ``OnHost``."""

    def __init__(self, m: Tensor, rank: int, passes: Passes) -> None:
        batch, self._rows, self._cols = m.shape
        self._m, self._passes = m, passes
        self._at = addresses(m)
        self._shapes = {"left": (batch, rank, self._rows), "right": (batch, rank, self._cols)}
        self.left, self.right = self._factor("left"), self._factor("right")

    def averaged(self, *, left: bool) -> Factor:
        return self._factor("left" if left else "right")

    def multiply_right(self, q: Tensor, addends: Addends | None = None) -> None:
        if q.dtype != self._m.dtype or tuple(q.shape) != self._shapes["right"]:
            raise ValueError(f"a factor is {q.dtype} {tuple(q.shape)} for {self._m.dtype} {self._shapes['right']}.")
        q = q.contiguous()
        others, scale = self._others(addends)
        places = list(zip(self._at, others, addresses(q), self.left.addresses, strict=True))
        for matrix, other, right, left in reversed(places):
            self._passes.multiply(matrix, other, scale, right, left, *self._sizes())

    def multiply_left(self, p: Tensor, addends: Addends | None = None) -> None:
        if p is not self.left.values:
            self.left.values.copy_(p)
        others, scale = self._others(addends)
        for matrix, other, left, right in zip(self._at, others, self.left.addresses, self.right.addresses, strict=True):
            self._passes.project(matrix, other, scale, left, right, *self._sizes())

    def parts(self) -> Sequence[slice]:
        return [slice(i, i + 1) for i in reversed(range(len(self._at)))]

    def subtract(self, part: slice) -> None:
        for i in range(len(self._at))[part]:
            own = self.left.addresses[i], self.right.addresses[i]
            self._passes.settle(self._at[i], self._at[i], *own, None, None, *self._sizes())

    def store(self, part: slice, left: Factor, right: Factor) -> None:
        for i in range(len(self._at))[part]:
            new = left.addresses[i], right.addresses[i]
            self._passes.settle(self._at[i], None, None, None, *new, *self._sizes())

    def exchange(self, i: int, left: Factor, right: Factor, error: Tensor) -> bool:
        factors = [factor.addresses[i] for factor in (self.left, self.right, left, right)]
        return bool(self._passes.settle(self._at[i], self._address(error), *factors, *self._sizes()))

    def _factor(self, side: str) -> Factor:
        values = self._m.new_empty(self._shapes[side])
        return Factor(values, addresses=addresses(values))

    def _others(self, addends: Addends | None) -> tuple[list[int | None], float]:
        if addends is None:
            return [None] * len(self._at), 1.0
        return [None if other is None else self._address(other) for other in addends.tensors], addends.scale

    def _address(self, other: Tensor) -> int:
        if other.dtype != self._m.dtype or not other.is_contiguous():
            raise ValueError(f"an addend is {other.dtype}, or has gaps; the matrices are {self._m.dtype}.")
        return other.data_ptr()

    def _sizes(self) -> tuple[int, int, int]:
        return self._rows, self._cols, torch.get_num_threads()


def compiled_passes(elements: int) -> Compiled | None:
    """The compiled passes, where so many elements per step are worth it and a compiler is there: ``cpp_library``.

    The sums differ from uncompiled ones in their last bits: whoever wants the bits of a run again compiles again.
    """
    source = resources.files(__package__ or "").joinpath("_passes.cpp").read_text(encoding="utf-8")
    found = cpp_library(source, name="powersgd", elements=elements)
    # Some compilers export only what they are told to.
    return Compiled(found) if found is not None and hasattr(found, "multiply_float32_1") else None
