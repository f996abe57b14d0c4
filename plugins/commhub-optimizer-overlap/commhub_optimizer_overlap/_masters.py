"""Float32 masters of parameters that are kept in 16 bits, and an optimizer's state that fits them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ._changes import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

    from torch import Tensor

    from commhub import Setup

LOW = (torch.float16, torch.bfloat16)
_KEY = "master"


class Masters:
    """The masters of all 16-bit parameters: part of the hook's state, so saved and loaded with it."""

    def __init__(self, setup: Setup) -> None:
        self._tables: dict[int, MutableMapping[str, Tensor]] = {}
        self._written: dict[int, tuple[int, int]] = {}
        for name, parameter in zip(setup.names, setup.parameters, strict=True):
            if parameter.dtype in LOW:
                table = setup.state.shared(name)
                table[_KEY] = parameter.detach().to(torch.float32)
                self._tables[id(parameter)] = table

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._tables

    def of(self, parameter: Tensor) -> Tensor | None:
        """The parameter's master: its value in float32, unless the parameter was since set to something else.

        The first time values are compared, as weights are often loaded after registration, also through ``.data``.
        """
        if id(parameter) not in self._tables:
            return None
        master = self._tables[id(parameter)][_KEY]
        if fingerprint(parameter) != self._written.get(id(parameter)):
            if not torch.equal(parameter, master.to(parameter.dtype)):
                master.copy_(parameter)
            self._written[id(parameter)] = fingerprint(parameter)
        return master

    def write(self, parameter: Tensor) -> None:
        """Set the parameter to its master, rounded."""
        parameter.copy_(self._tables[id(parameter)][_KEY])
        self._written[id(parameter)] = fingerprint(parameter)


def widen(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Have the parameter's state in float32, as its master's would be."""
    _convert(optimizer, parameter, LOW, torch.float32)


def narrow(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Have the parameter's state in the parameter's own dtype again."""
    _convert(optimizer, parameter, (torch.float32,), parameter.dtype)


def _convert(
    optimizer: torch.optim.Optimizer, parameter: Tensor, found: Sequence[torch.dtype], wanted: torch.dtype
) -> None:
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if key != "step" and isinstance(value, torch.Tensor) and value.dtype in found:
            state[key] = value.to(wanted)


class Loading:
    """Keeps ``optimizer.load_state_dict`` exact: PyTorch casts state to the parameters' dtype."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Masters) -> None:
        self._masters = masters
        self._saved: Mapping[str, Any] | None = None
        self._handles = [
            optimizer.register_load_state_dict_pre_hook(self._before),
            optimizer.register_load_state_dict_post_hook(self._after),
        ]

    def _before(self, _optimizer: object, state: Mapping[str, Any]) -> None:
        self._saved = state

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        saved, self._saved = self._saved, None
        assert saved is not None
        keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
        for parameter, key in zip(_parameters(optimizer), keys, strict=True):
            if parameter in self._masters:
                for name, value in saved["state"].get(key, {}).items():
                    if name != "step" and isinstance(value, torch.Tensor) and value.is_floating_point():
                        optimizer.state[parameter][name] = value.to(parameter.device, copy=True)

    def end(self) -> None:
        """Leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    return chain.from_iterable(group["params"] for group in groups)
