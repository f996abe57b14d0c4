"""``commhub info``: everything that a plugin declares about one name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from commhub.registry import _documented, _registry
from commhub.registry._hookstring import HookString
from commhub.registry._spec import RESERVED

from ._output import Answering, complete_names, print_json, print_table, say

if TYPE_CHECKING:
    from commhub.registry._spec import AveragerSpec, HookSpec, Option


@click.command(cls=Answering)
@click.argument("name", shell_complete=complete_names)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object.")
def info(name: str, as_json: bool) -> None:
    """Describe NAME: options, needs, bytes on the wire, reference, and an example.

    NAME is a hook or averager, an alias, or package:name. Exits with 1 if it cannot be used.
    """
    row = _registry.info(name)
    if as_json:
        print_json([{**row.as_dict(), **(_details(row.spec, _example(row)) if row.spec else {})}])
    else:
        say(f"{row.name}: {row.kind} of {row.distribution} {row.version}, {row.status}")
        if row.error:
            say(row.error)
        if row.spec:
            _print(row.spec, _example(row))
    if row.spec is None:
        raise SystemExit(1)


def _print(spec: HookSpec | AveragerSpec, example: str) -> None:
    say(f"{spec.summary}\n")
    if spec.options:
        say("options")
        print_table(_option_cells(spec, option) for option in spec.options)
        say()
    facts = [
        ("needs", ", ".join(spec.needs) or "nothing besides the model"),
        ("devices", ", ".join(spec.devices)),
        ("sends", spec.sent_bytes),
        *((title, _yes(getattr(spec, field))) for title, field in _FACTS.items() if hasattr(spec, field)),
        ("reference", spec.reference),
        ("also called", ", ".join(alias.upper() for alias in _aliases(spec.name))),
        ("example", example),
    ]
    print_table((title, text) for title, text in facts if text)


_FACTS = {"exact": "exact", "same on all ranks": "agrees", "tolerance": "tolerance"}


def _yes(value: bool | float | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _aliases(name: str) -> list[str]:
    return [alias for alias, target in _documented.ALIASES.items() if target == name]


def _option_cells(spec: HookSpec | AveragerSpec, option: Option) -> tuple[str, ...]:
    preset = option.name in spec.preset
    value = f"{spec.preset[option.name]!r} (preset)" if preset else repr(option.default)
    choices = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
    return f"  {option.name}", option.type_name, value, f"{option.help}{choices}"


def _details(spec: HookSpec | AveragerSpec, example: str) -> dict[str, object]:
    """Return the declaration as plain values."""
    plain = (
        "factory",
        "preset",
        "needs",
        "devices",
        "sent_bytes",
        "reference",
        "exact",
        "agrees",
        "tolerance",
    )
    options = [
        {
            "name": option.name,
            "type": option.type_name,
            "default": option.default,
            "choices": option.choices,
            "help": option.help,
        }
        for option in spec.options
    ]
    return {
        "options": options,
        **{field: getattr(spec, field) for field in plain if hasattr(spec, field)},
        "aliases": _aliases(spec.name),
        "example": example,
    }


def _example(row: _registry.HookInfo) -> str:
    """Return a line that registers it, with its example's options, or the first one that has a default."""
    assert row.spec is not None
    free = [x for x in row.spec.options if x.name not in row.spec.preset and x.default is not None]
    options = row.spec.example or {option.name: option.default for option in free[:1]}
    distribution = None if row.status == "ok" else row.distribution
    needs = "".join(f", {need}={need}" for need in row.spec.needs if need in RESERVED)
    return f'commhub.register(model, "{HookString(name=row.name, distribution=distribution, options=options)}"{needs})'
