"""What hooks remember, owned by the core and keyed by parameter name.

A hook reads and writes; the core saves, restores, spreads over another number of ranks and discards what a
non-finite step wrote. Nothing here depends on buckets, so a rebuilt bucket changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from commhub._errors import CheckpointError, HookOptionTypeError, StateNameError
from commhub._printable import shown

Scope = Literal["local", "shared"]
Tables = dict[str, dict[str, Tensor]]


class _Store:
    """The tensors of one registration, and what the step under way would change."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = frozenset(names)
        self.tables: dict[Scope, Tables] = {"local": {}, "shared": {}}
        self.staged: dict[tuple[Scope, str, str], Tensor] = {}
        self.step_open = False


class Entries(MutableMapping[str, Tensor]):
    """The tensors kept for one parameter. An assignment within a step counts from the end of that step on.

    In ``prepare`` an assignment counts at once. A tensor that was read may be written in place; then it is the
    hook that keeps non-finite values out (see ``ErrorFeedback``).
    """

    def __init__(self, store: _Store, scope: Scope, parameter: str, prefix: str) -> None:
        self._store, self._scope, self._parameter, self._prefix = store, scope, parameter, prefix

    def _table(self) -> dict[str, Tensor]:
        return self._store.tables[self._scope].setdefault(self._parameter, {})

    def __getitem__(self, key: str) -> Tensor:
        full = self._prefix + key
        staged = self._store.staged.get((self._scope, self._parameter, full))
        return self._table()[full] if staged is None else staged

    def __setitem__(self, key: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise HookOptionTypeError(f"state of {self._parameter!r}: {key!r} is {type(value).__name__}; keep tensors.")
        full = self._prefix + key
        if self._store.step_open:
            self._store.staged[self._scope, self._parameter, full] = value
        else:
            self._table()[full] = value

    def __delitem__(self, key: str) -> None:
        del self._table()[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        staged = (k for s, p, k in self._store.staged if (s, p) == (self._scope, self._parameter))
        every = dict.fromkeys([*self._table(), *staged])
        return (k.removeprefix(self._prefix) for k in every if k.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class State:
    """A hook's memory: ``local(name)`` differs per rank (residuals), ``shared(name)`` is equal everywhere."""

    def __init__(self, names: tuple[str, ...], *, _store: _Store | None = None, _prefix: str = "") -> None:
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise HookOptionTypeError(f"state is for parameters by name, and was given {shown(names)}.")
        self._store = _Store(tuple(names)) if _store is None else _store
        self._prefix = _prefix

    def local(self, name: str) -> Entries:
        """This rank's tensors for the parameter ``name``.

        Raises:
            StateNameError: (a CommhubError and a KeyError) if the model has no such parameter.
        """
        return self._entries("local", name)

    def shared(self, name: str) -> Entries:
        """The tensors for the parameter ``name`` that all ranks hold alike.

        Raises:
            StateNameError: as ``local``.
        """
        return self._entries("shared", name)

    def inner(self, name: str) -> State:
        """The same memory under a prefix, so that a hook inside another never meets its keys."""
        return State((), _store=self._store, _prefix=f"{self._prefix}{name}/")

    def _entries(self, scope: Scope, name: str) -> Entries:
        if not isinstance(name, str) or name not in self._store.names:
            raise StateNameError(f"state is keyed by parameter name, and the model has no parameter {shown(name)}")
        return Entries(self._store, scope, name, self._prefix)

    # The rest is the core's.

    def is_empty(self) -> bool:
        """Whether no tensor is kept and none is about to be."""
        return not self._store.staged and not any(any(t.values()) for t in self._store.tables.values())

    def extend(self, names: Iterable[str]) -> None:
        """Take parameters that are trained only now."""
        self._store.names |= frozenset(names)

    def begin(self) -> None:
        """Start a step: from here assignments wait for ``commit``."""
        self._store.step_open = True

    def commit(self, finite: Tensor | bool) -> None:
        """End a step: keep what it assigned where ``finite``, drop it elsewhere.

        On the host a bool decides; on a device the choice stays there and nothing waits for it.
        """
        store = self._store
        store.step_open = False
        on_device = finite if isinstance(finite, Tensor) and finite.device.type != "cpu" else None
        keep = on_device is not None or bool(finite)
        for (scope, parameter, key), new in store.staged.items():
            table = store.tables[scope].setdefault(parameter, {})
            old = table.get(key)
            if on_device is not None and old is not None and old.shape == new.shape:
                torch.where(on_device, new, old, out=old)
            elif keep:
                table[key] = new
        store.staged.clear()

    def rollback(self) -> None:
        """Drop what the step under way assigned."""
        self._store.step_open = False
        self._store.staged.clear()

    def export(self, scope: Scope) -> Tables:
        """Copies of the tensors, contiguous in their logical shape, as ``{parameter: {key: tensor}}``."""
        tables = self._store.tables[scope]
        return {
            name: {key: value.detach().contiguous().clone() for key, value in sorted(table.items())}
            for name, table in sorted(tables.items())
            if table
        }

    def keeps(self, scope: Scope) -> bool:
        """Whether there is a tensor in this scope."""
        return any(self._store.tables[scope].values())

    def check(self, scope: Scope, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare saved tensors with the ones kept, by name, shape and dtype; nothing is copied.

        Raises:
            CheckpointError: if a tensor is missing, unknown, or of another shape or dtype.
        """
        check_same(self._store.tables[scope], saved)

    def restore(self, scope: Scope, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy saved tensors over the ones kept, in place.

        Raises:
            CheckpointError: if a tensor is missing, unknown, or of another shape or dtype. Nothing is changed then.
        """
        check_same(self._store.tables[scope], saved)
        for name, table in self._store.tables[scope].items():
            for key, mine in table.items():
                mine.copy_(saved[name][key])


def check_same(kept: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError unless ``saved`` has exactly the tensors that are ``kept``, of their shapes and dtypes."""
    mine = {(name, key): value for name, table in kept.items() for key, value in table.items()}
    theirs = {(name, key): value for name, table in saved.items() for key, value in table.items()}
    for name, key in sorted(mine.keys() ^ theirs.keys()):
        where = "is missing from the saved state" if (name, key) in mine else "is saved but not kept here"
        raise CheckpointError(f"{key!r} of parameter {name!r} {where}; save and load with the same model and hook.")
    for name, key in sorted(mine):
        value, other = mine[name, key], theirs[name, key]
        if not isinstance(other, Tensor) or (other.shape, other.dtype) != (value.shape, value.dtype):
            found = f"{tuple(other.shape)} {other.dtype}" if isinstance(other, Tensor) else type(other).__name__
            raise CheckpointError(
                f"{key!r} of parameter {name!r} was saved as {found}; here it is {tuple(value.shape)} {value.dtype}."
            )
