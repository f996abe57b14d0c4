"""The work on rows on the host, compiled: each pass reads and writes every number once."""

from __future__ import annotations

import ctypes
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from commhub.toolkit import cpp_library

if TYPE_CHECKING:
    from torch import Tensor

    from ._coding import Coding

_REALS = {torch.float32: "float", torch.float64: "double"}
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool


class Passes:
    """See ``Work``: the numbers that tensor operations give, for values of one dtype on the host.

    Where all are finite, only the sign of a zero that is left may differ.
    """

    def __init__(self, functions: ctypes.CDLL, coding: Coding, dtype: torch.dtype) -> None:
        self._coding, self._dtype = coding, dtype
        self._extents, self._encode, self._decode = functions.extents, functions.encode, functions.decode
        sizes = [_SIZE, ctypes.c_int]
        self._extents.argtypes = [_POINTER, _POINTER, *sizes]
        self._encode.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _FLAG, *sizes]
        self._decode.argtypes = [_POINTER, _POINTER, _POINTER, _FLAG, *sizes]
        for function in (self._extents, self._encode, self._decode):
            function.restype = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Passes:
        return self  # functions alone: a copy of a hook calls the same ones

    def extents(self, values: Tensor, out: Tensor) -> None:
        rows = len(values)
        self._extents(self._values(values, rows), self._marks(out, rows), rows, torch.get_num_threads())

    def encode(self, values: Tensor, marks: Tensor, codes: Tensor, noise: Tensor | None, *, keeping: bool) -> None:
        if (noise is not None) != self._coding.stochastic:
            raise ValueError(f"noise is {'missing' if noise is None else 'given'} for {self._coding}.")
        rows = len(values)
        chance = None if noise is None else self._values(noise, rows, "noise")
        places = self._values(values, rows), chance, self._marks(marks, rows), self._codes(codes, rows)
        self._encode(*places, keeping, rows, torch.get_num_threads())

    def decode(self, codes: Tensor, marks: Tensor, values: Tensor, *, adding: bool) -> None:
        rows = len(values)
        places = self._codes(codes, rows), self._marks(marks, rows), self._values(values, rows)
        self._decode(*places, adding, rows, torch.get_num_threads())

    def _values(self, tensor: Tensor, rows: int, name: str = "values") -> int:
        return _address(name, tensor, (rows, self._coding.row), self._dtype)

    def _marks(self, tensor: Tensor, rows: int) -> int:
        return _address("marks", tensor, (rows, self._coding.marks), self._dtype)

    def _codes(self, tensor: Tensor, rows: int) -> int:
        return _address("codes", tensor, (rows, self._coding.row_bytes), torch.int8)


def _address(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> int:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} are {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"they must be {dtype} {shape}, contiguous, on the host."
        )
    return tensor.data_ptr()


def compiled_passes(coding: Coding, dtype: torch.dtype, elements: int) -> Passes | None:
    """The compiled passes, where so many elements per step are worth it and a compiler is there: ``cpp_library``."""
    if dtype not in _REALS:
        return None
    settings = {"kSymmetric": coding.symmetric, "kWhole": coding.whole, "kStochastic": coding.stochastic}
    lines = [
        f"using Real = {_REALS[dtype]};",
        f"constexpr int kRow = {coding.row}, kBits = {coding.bits};",
        *(f"constexpr bool {name} = {str(value).lower()};" for name, value in settings.items()),
        resources.files(__package__ or "").joinpath("_passes.cpp").read_text(encoding="utf-8"),
    ]
    found = cpp_library("\n".join(lines), name="quantize", elements=elements)
    # Some compilers export only what they are told to.
    return Passes(found, coding, dtype) if found is not None and hasattr(found, "decode") else None
