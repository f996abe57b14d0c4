"""How a call crosses to a rank's process, and its result comes back: by reference and by value.

A test module is imported by pytest under a name that no other process can import, so a function travels as
(module name, file, qualified name) and the file is loaded there under the same name: classes of that module
unpickle on both sides. Values travel as bytes of ``torch.save``, never through shared memory: a rank may be
killed at any moment, and nothing of it may live on in another process.
"""

import importlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable
from typing import Any, Self

import attrs

from commhub._errors import HookOptionTypeError
from commhub._printable import shown


def dumps(value: object) -> bytes:
    """``value`` as bytes, tensors by value with their strides and shared storages."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The value that ``dumps`` wrote; both ends belong to one test session, so anything may be unpickled."""
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


@attrs.frozen(kw_only=True)
class Call:
    """A call of a module-level function that another process can make."""

    module: str
    path: str | None
    qualname: str
    arguments: bytes

    @classmethod
    def of(cls, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """The call ``fn(*args, **kwargs)``.

        Raises:
            HookOptionTypeError: if another process cannot find ``fn`` by its name.
        """
        module_name = getattr(fn, "__module__", None) or ""
        qualname = getattr(fn, "__qualname__", "")
        module = sys.modules.get(module_name)
        if module is None or _attribute(module, qualname) is not fn:
            raise HookOptionTypeError(
                f"{shown(fn)} cannot run in another process: pass a function that is defined at the top of a "
                "module (no lambda, no closure, no bound method) and hand it what it needs as arguments."
            )
        path = getattr(module, "__file__", None)
        if module_name == "__main__" and path is None:
            raise TypeError(f"{qualname} was typed in, so no other process can read it: put it in a file.")
        path = None if path is None else os.path.realpath(path)
        return cls(module=module_name, path=path, qualname=qualname, arguments=dumps((args, kwargs)))

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"

    def __call__(self) -> Any:
        """Make the call here."""
        # The module first: arguments may be instances of its classes.
        fn = _attribute(load_module(self.module, self.path), self.qualname)
        if fn is None:
            raise LookupError(f"{self.path or self.module} defines no {self.qualname} here")
        args, kwargs = loads(self.arguments)
        return fn(*args, **kwargs)


def _attribute(owner: Any, qualname: str) -> Any:
    for name in qualname.split("."):
        owner = getattr(owner, name, None)
    return owner


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source each time: cached bytecode counts whole seconds, and a test may write faster."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        code: types.CodeType = self.source_to_code(self.get_data(path), path)
        return code


_loaded: dict[str, tuple[str, int]] = {}  # the modules loaded from a file here: name -> (path, mtime)


def load_module(name: str, path: str | None) -> types.ModuleType:
    """The module ``name``, imported where that finds ``path``, else loaded from it (again if that changed)."""
    if path is None:
        return importlib.import_module(name)
    present, stamp = sys.modules.get(name), (path, os.stat(path).st_mtime_ns)
    if present is not None and name in _loaded and _loaded[name] == stamp:
        return present
    if name != "__main__" and name not in _loaded and _importable(name, path):
        return importlib.import_module(name)
    _add_parents(name, path)
    # As multiprocessing does: the `if __name__ == "__main__"` part of the parent's script must not run here.
    own_name = "__rank_main__" if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(own_name, path, loader=_SourceLoader(own_name, path))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[name] = stamp
    return module


def _importable(name: str, path: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == path


def _add_parents(name: str, path: str) -> None:
    """Stand-ins for packages that cannot be imported: unpickling ``a.b.C`` imports ``a`` first."""
    folder = os.path.dirname(path)
    while "." in name:
        name = name.rpartition(".")[0]
        if name not in sys.modules and not _importable_package(name):
            package = types.ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package
        folder = os.path.dirname(folder)


def _importable_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
