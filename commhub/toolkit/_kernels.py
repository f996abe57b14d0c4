"""Elementwise work on large tensors, fused by a compiler where that is there and pays, in cache-sized blocks elsewhere.

A kernel is written once, as an ordinary function of tensors. Compiled or not, it computes the same numbers.
"""

from __future__ import annotations

import logging
import os
import threading
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

WORTH_COMPILING = 1 << 20
"""Elements per step from which a few seconds of compiling at registration are well spent."""

_BLOCK = 1 << 17
"""Elements of one eager block: its temporaries stay in a core's second-level cache."""

_compiling = threading.RLock()
"""One thread compiles at a time; the others find what it compiled."""

logger = logging.getLogger("commhub")


class Kernel:
    """A function of tensors that changes some of them in place, row by row.

    Args:
        function: takes tensors that agree in their first dimension, the rows, and returns nothing. What it does with
            one row must not depend on the others, nor on how many there are.

    On the host an uncompiled kernel runs on some rows at a time, so that its temporaries stay in the cache; on a
    device it runs at once.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._name = getattr(function, "__name__", "kernel")
        self._compiled: Callable[..., None] | None = None
        self._warming = False
        self._traits: set[tuple[object, ...]] = set()
        self.compilations = 0

    def __call__(self, *tensors: Tensor) -> None:
        """Run on all rows."""
        if not tensors[0].numel():
            return
        if self._compiled is not None and len(tensors[0]) > 1 and _traits(tensors) in self._traits:
            self._compiled(*map(_alone, tensors))
        elif tensors[0].device.type != "cpu":
            self._function(*tensors)
        else:
            rows = len(tensors[0])
            step = max(_BLOCK * rows // max(t.numel() for t in tensors), 1)
            for low in range(0, rows, step):
                self._function(*(tensor[low : low + step] for tensor in tensors))

    def warm(self, *examples: Tensor, elements: int) -> None:
        """Compile for tensors like ``examples``, if that is wanted: in ``prepare``, so that no step waits for it.

        It is wanted from ``WORTH_COMPILING`` elements on. ``COMMHUB_COMPILE=0`` in the environment means never,
        ``COMMHUB_COMPILE=1`` always. Where there is no compiler, a line in the log says so and nothing else changes.

        Args:
            examples: of the dtypes, device and row sizes to come; some rows each, overwritten.
            elements: how many a training step puts through this kernel.
        """
        with _compiling:
            self._warm(examples, elements)

    def _warm(self, examples: tuple[Tensor, ...], elements: int) -> None:
        traits = _traits(examples)
        if traits in self._traits or not wants_compiling(elements):
            return
        compiled = self._compiled or torch.compile(_own(self._function), backend=self._compile)
        self._warming = True
        try:
            with torch.no_grad():
                alone = [_alone(example) for example in examples]
                for example in alone:
                    torch._dynamo.mark_dynamic(example, 0)
                compiled(*alone)
        except Exception as err:  # noqa: BLE001 - a compiler can fail in any way, and none of them matters here
            reason = " ".join(str(err).split())[:300]
            logger.warning("%s runs uncompiled: %s: %s", self._name, type(err).__name__, reason)
            return
        finally:
            self._warming = False
        self._compiled = compiled
        self._traits.add(traits)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor import compile as inductor

        self.compilations += 1
        if not self._warming:
            logger.warning("%s is compiled in a training step, which is slower for it", self._name)
        made: Callable[..., Any] = inductor(graph, inputs)
        return made


def wants_compiling(elements: int) -> bool:
    """Whether kernels that work on so many elements per step are compiled here: see ``Kernel.warm``."""
    asked = os.environ.get("COMMHUB_COMPILE", "")
    return asked != "0" and (asked == "1" or elements >= WORTH_COMPILING)


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that is no view: the compiler would build in what it is a view of."""
    alone = tensor.new_empty(0)
    return alone.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _own(function: Callable[..., None]) -> Callable[..., None]:
    """The same function with a code object of its own: the compiler keeps a few variants per code object, not more."""
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _traits(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple((t.dtype, t.device.type, t.shape[1:]) for t in tensors)
