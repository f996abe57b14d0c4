"""Write docs/hooks.md, the catalogue of the documented hooks, from the specs that their plugins declare.

    python docs/generate_catalogue.py            writes it
    python docs/generate_catalogue.py --check    exits with 1 if it is stale

Every plugin in plugins/ must be installed. Imports no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import commhub
from commhub.registry._documented import ALIASES, AVERAGERS, HOOKS, owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commhub import HookInfo, Option

CATALOGUE = Path(__file__).with_name("hooks.md")

HEAD = """\
<!-- Generated from the plugins' own declarations by docs/generate_catalogue.py: do not edit. -->

# The hooks

`commhub list` shows what is installed on your machine, third parties' hooks included, and `commhub info NAME` prints
what stands here. Every hook is chosen by its name: `commhub.register(model, "NAME")`, or with options
`commhub.register(model, "NAME(option=value)")`. Upper and lower case, `-` and `_` are the same to the look-up.

The formulas give the bytes that one rank sends in a step for one parameter: p is the number of ranks, h that of the
ranks on one host, `rows`, `cols` and `numel` are the gradient's sizes, `itemsize` its element's bytes, and other names
are options. *Exact* means the mean up to rounding in the gradients'
own dtype; *same on all ranks* means bit by bit. All hooks but `fp16` and `bf16` take `wire="fp16"` or `wire="bf16"` as
well, which casts their floating payloads for the way.
"""


def catalogue() -> str:
    """Return the whole page."""
    rows = [row for row in commhub.installed() if owner(row.name) == row.distribution]
    return "\n".join([HEAD, *_overview(rows), *(line for row in rows for line in _section(row)), *_reserved(rows)])


def _overview(rows: list[HookInfo]) -> Iterator[str]:
    yield "| name | what it does | exact | same on all ranks | package |"
    yield "|---|---|---|---|---|"
    for row in rows:
        exact, agrees = (_yes(getattr(row.spec, field, None)) for field in ("exact", "agrees"))
        yield f"| [`{row.name}`](#{row.name}) | {row.summary} | {exact} | {agrees} | `{row.distribution}` |"
    yield ""


def _section(row: HookInfo) -> Iterator[str]:
    spec = row.spec
    if spec is None:
        raise SystemExit(f"{row.name} of {row.distribution} is {row.status}: {row.error}")
    yield f"## {row.name}\n"
    yield f"{spec.summary}\n"
    aliases = [f"`{alias.upper()}`" for alias, name in ALIASES.items() if name == row.name]
    tolerance = getattr(spec, "tolerance", None)
    facts = {
        "Package": f"[`{row.distribution}`](../plugins/{row.distribution}/README.md)",
        "Sends": f"`{spec.sent_bytes}`" if spec.sent_bytes else "",
        "Relative error of one step": f"at most {tolerance:g}" if tolerance is not None else "",
        "Needs": ", ".join(f"`{need}=`" for need in spec.needs),
        "Devices": ", ".join(spec.devices),
        "Also called": ", ".join(aliases),
        "Reference": f"<{spec.reference}>" if spec.reference else "",
    }
    yield from (f"* {title}: {text}" for title, text in facts.items() if text)
    yield ""
    if spec.options:
        yield "| option | type | default | |"
        yield "|---|---|---|---|"
        for option in spec.options:
            yield f"| `{option.name}` | {option.type_name} | {_value(row, option)} | {_help(option)} |"
        yield ""


def _value(row: HookInfo, option: Option) -> str:
    assert row.spec is not None
    preset = row.spec.preset
    return f"`{preset[option.name]!r}`, fixed" if option.name in preset else f"`{option.default!r}`"


def _help(option: Option) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
    return f"{option.help}{choices}"


def _reserved(rows: list[HookInfo]) -> Iterator[str]:
    missing = sorted({*HOOKS, *AVERAGERS} - {row.name for row in rows})
    if missing:
        yield "## Reserved names\n"
        yield "These belong to packages that are not published yet; until then, no package is given them.\n"
        yield from (f"* `{name}`: `{owner(name)}`" for name in missing)
        yield ""


def _yes(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else ""


def main() -> None:
    """Write the page, or check it."""
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(f"usage: {sys.argv[0]} [--check]")
    text = catalogue()
    if not sys.argv[1:]:
        CATALOGUE.write_text(text, encoding="utf-8")
    elif not CATALOGUE.exists() or CATALOGUE.read_text(encoding="utf-8") != text:
        raise SystemExit("docs/hooks.md is stale: run python docs/generate_catalogue.py")


if __name__ == "__main__":
    main()
