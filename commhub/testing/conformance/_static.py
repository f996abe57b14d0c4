"""What the distribution must be, before any of it runs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import importlib_metadata
from packaging.requirements import Requirement
from packaging.version import Version

from commhub.registry import _index
from commhub.registry._probe import Finding, examine

from ._check import rule

if TYPE_CHECKING:
    from ._subject import Subject

BOTH = ("hook", "averager")
LOADED = ("loads", "factory_takes_the_options")
"""What every check that runs the subject comes after."""
QUICK = 50.0
"""Milliseconds in which a spec module loads."""


@rule("static", kinds=BOTH)
def loads(subject: Subject) -> None:
    """The plugin loads, and its entry points announce exactly what its specs declare."""
    row = subject.info
    assert row.spec is not None, row.error or f"its status is {row.status}"


@rule("static", kinds=BOTH, after=("loads",))
def name_is_its_own(subject: Subject) -> None:
    """The bare name leads to this plugin: it is no documented name and nobody else's."""
    row = subject.info
    assert row.status == "ok", row.error or f"its status is {row.status}"


def _loaded_apart(subject: Subject) -> Finding:
    row = subject.info
    claims = [c for c in _index.claims() if (c.name, c.distribution) == (row.name, row.distribution)]
    siblings = [c for c in _index.claims() if (c.distribution, c.module) == (claims[0].distribution, claims[0].module)]
    return examine(siblings)


@rule("static", kinds=BOTH, after=("loads",))
def spec_without_torch(subject: Subject) -> None:
    """The spec module, its package's __init__ included, does not import torch: listing names stays quick."""
    found = _loaded_apart(subject)
    assert not found["imports_torch"], (
        "loading the spec module imports torch: name the factory as text, import it there"
    )


@rule("static", kinds=BOTH, after=("loads", "spec_without_torch"))
def spec_is_quick(subject: Subject) -> None:
    """The spec module loads within 50 ms."""
    took = [_loaded_apart(subject)["import_ms"] or 0.0]
    while min(took) >= QUICK and len(took) < 5:  # a busy machine is no plugin's fault
        took.append(_loaded_apart(subject)["import_ms"] or 0.0)
    assert min(took) < QUICK, f"loading the spec module took {min(took):.0f} ms at best: import less there"


@rule("static", kinds=BOTH, after=("loads",))
def factory_takes_the_options(subject: Subject) -> None:
    """The factory can be imported, and its parameters are the declared options with their defaults."""
    factory = subject.recipe.load()
    taken = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        assert keyword, f"its parameter {parameter} cannot be given by keyword"
        taken[name] = parameter.default
    declared = {option.name: option.default for option in subject.spec.options}
    assert taken.keys() == declared.keys(), f"the factory takes {sorted(taken)}, the spec declares {sorted(declared)}"
    for name, default in declared.items():
        assert taken[name] == default, f"{name} is {taken[name]!r} by default, and declared as {default!r}"


@rule("static", kinds=BOTH, after=("loads",))
def options_are_documented(subject: Subject) -> None:
    """Every option says in one line what it does."""
    bare = [option.name for option in subject.spec.options if not option.help.strip()]
    assert not bare, f"no help for {', '.join(bare)}"


@rule("static", kinds=BOTH, after=("loads",))
def bytes_are_declared(subject: Subject) -> None:
    """The spec says what is sent, so that users can judge before they train."""
    assert subject.spec.sent_bytes.strip(), (
        "sent_bytes is empty: give a formula, such as '2 * (p-1)/p * numel * itemsize'"
    )


@rule("static", kinds=BOTH, after=("loads",))
def distribution_is_complete(subject: Subject) -> None:
    """The distribution has a README, a licence and a valid version."""
    metadata = importlib_metadata.metadata(subject.info.distribution)
    text = metadata.get("Description") or metadata.json.get("description") or ""
    assert len(str(text).strip()) > 40, "its metadata hold no README: set readme in pyproject.toml"
    licence = metadata.get("License-Expression") or metadata.get("License") or metadata.get_all("License-File")
    assert licence, "its metadata name no licence: set license in pyproject.toml"
    Version(metadata["Version"])


@rule("static", kinds=BOTH, after=("loads",))
def core_has_an_upper_bound(subject: Subject) -> None:
    """It requires commhub below some version: a later major may change what hooks rely on."""
    lines = importlib_metadata.requires(subject.info.distribution) or []
    ranges = [r.specifier for r in map(Requirement, lines) if r.name.lower() == "commhub"]
    assert ranges, "it does not require commhub: add 'commhub>=0.1,<1' to its dependencies"
    bounded = any(one.operator in ("<", "<=", "==", "~=") for specifier in ranges for one in specifier)
    assert bounded, f"it requires commhub{ranges[0]}, without an upper bound: write 'commhub>=0.1,<1'"
