"""Plugins that exist for one test: a real distribution in a temporary folder, found like any installed one.

    with temporary_plugin(tmp_path, "commhub-foo", hooks={"foo": "Foo"}, source="class Foo: ...") as plugin:
        assert "foo" in commhub.hooks()

Its package ``commhub_foo`` has a spec module and a module ``_hook`` with ``source``. While installed it is on
PYTHONPATH too, so subprocesses find it; the pool's ranks take over ``sys.path`` with each call.
"""

import base64
import contextlib
import hashlib
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import attrs

from commhub._errors import HookOptionError
from commhub._printable import shown

from ._isolation import forget_modules

Fields = str | Mapping[str, object]
"""A hook's class in ``source``, or its spec's fields: ``{"factory": "Foo", "options": [{"name": ...}], ...}``."""


@attrs.frozen(kw_only=True)
class TemporaryPlugin:
    """A plugin that was written to ``folder``; as a context manager it is installed for the block."""

    name: str
    version: str
    folder: Path
    package: str

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *exc: object) -> None:
        self.uninstall()

    def install(self) -> None:
        """Put it first on ``sys.path`` and PYTHONPATH."""
        sys.path.insert(0, str(self.folder))
        rest = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{self.folder}{os.pathsep}{rest}" if rest else str(self.folder)
        forget_modules(())

    def uninstall(self) -> None:
        """Take it off again and forget its modules."""
        with contextlib.suppress(ValueError):
            sys.path.remove(str(self.folder))
        entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        with contextlib.suppress(ValueError):
            entries.remove(str(self.folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)
        if not os.environ["PYTHONPATH"]:
            del os.environ["PYTHONPATH"]
        forget_modules((os.path.join(self.folder, ""),))


def temporary_plugin(
    folder: Path,
    name: str = "commhub-foo",
    *,
    hooks: Mapping[str, Fields] | None = None,
    averagers: Mapping[str, Fields] | None = None,
    source: str = "",
    spec: str | None = None,
    init: str = "",
    entry_points: Mapping[str, Mapping[str, str]] | None = None,
    version: str = "1.0",
    requires: Sequence[str] = ("commhub>=0.1,<1",),
) -> TemporaryPlugin:
    """Write the distribution ``name`` into ``folder``, which may hold others; ``with`` installs it.

    Args:
        folder: it is put first on the path.
        name: of the distribution.
        hooks, averagers: by name, a class in ``source`` or the fields of a spec.
        source: the text of the module ``_hook``.
        spec: the text of the spec module instead of the one that follows from ``hooks`` and ``averagers``.
        init: the text of the package's ``__init__``.
        entry_points: group -> name -> value, instead of those that ``hooks`` and ``averagers`` would get.
        version: of the distribution.
        requires: what it depends on.

    Raises:
        HookOptionError: if the name is none, which would lead out of the folder.
    """
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z]([\w.-]*[A-Za-z0-9])?", name, re.ASCII) is None:
        raise HookOptionError(f"{shown(name)} is no distribution's name.")
    hooks, averagers = hooks or {}, averagers or {}
    package = re.sub("[-.]+", "_", name).lower()
    if spec is None:
        spec = _spec_module(package, hooks, averagers)
    if entry_points is None:
        entry_points = {
            group: dict.fromkeys(names, f"{package}._spec")
            for group, names in {"commhub.hooks.v1": hooks, "commhub.averagers.v1": averagers}.items()
            if names
        }
    info = f"{package}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    sections = [
        "\n".join([f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items()), ""])
        for group, entries in entry_points.items()
    ]
    files = {
        f"{package}/__init__.py": textwrap.dedent(init),
        f"{package}/_spec.py": textwrap.dedent(spec),
        f"{package}/_hook.py": textwrap.dedent(source),
        f"{info}/METADATA": "\n".join(
            [*metadata, "License: MIT", "", f"# {name}\n\nA plugin for one test, which is all.\n"]
        ),
        f"{info}/entry_points.txt": "\n".join(sections),
    }
    record = [_record_line(path, text) for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())
    return TemporaryPlugin(name=name, version=version, folder=folder, package=package)


def _record_line(path: str, text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(text.encode())}"


def _spec_module(package: str, hooks: Mapping[str, Fields], averagers: Mapping[str, Fields]) -> str:
    lines = ["from commhub import AveragerSpec, HookSpec, Option, hookimpl"]
    for point, kind, specs in (
        ("commhub_hooks", "HookSpec", hooks),
        ("commhub_averagers", "AveragerSpec", averagers),
    ):
        if specs:
            rows = [f"        {_spec(package, kind, name, fields)}," for name, fields in specs.items()]
            lines += ["", "", "@hookimpl", f"def {point}():", "    return [", *rows, "    ]"]
    return "\n".join([*lines, ""])


def _spec(package: str, kind: str, name: str, fields: Fields) -> str:
    given = {"factory": fields} if isinstance(fields, str) else dict(fields)
    factory = str(given.pop("factory", "Foo"))
    if ":" not in factory:
        factory = f"{package}._hook:{factory}"
    options = given.pop("options", ())
    assert isinstance(options, Sequence), "options: a list of the fields of each"
    whole = {"name": name, "summary": f"{name}, for a test.", "factory": factory} | given
    arguments = [f"{key}={value!r}" for key, value in whole.items()]
    if options:
        arguments.append(f"options=[{', '.join(_option(option) for option in options)}]")
    return f"{kind}({', '.join(arguments)})"


def _option(fields: Mapping[str, object]) -> str:
    values = {key: v.__name__ if isinstance(v, type) else repr(v) for key, v in fields.items()}
    return f"Option({', '.join(f'{key}={value}' for key, value in values.items())})"
