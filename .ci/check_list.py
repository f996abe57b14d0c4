"""Check what `commhub list --json` printed: every name that the wheels of a folder announce is there and works."""

from __future__ import annotations

import json
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

GROUPS = {"commhub.hooks.v1": "hook", "commhub.averagers.v1": "averager"}


def announced(wheel: Path) -> set[tuple[str, str]]:
    """The (kind, name) pairs among a wheel's entry points."""
    with zipfile.ZipFile(wheel) as archive:
        points = ConfigParser(delimiters=("=",))
        for file in archive.namelist():
            if file.endswith(".dist-info/entry_points.txt"):
                points.read_string(archive.read(file).decode())
    return {(kind, name) for group, kind in GROUPS.items() if group in points for name in points[group]}


def main(listed: Path, wheels: Path) -> None:
    """End the process with a message where a name is missing, strange or unusable."""
    rows = json.loads(listed.read_text(encoding="utf-8"))
    wanted = set().union(*map(announced, wheels.glob("*.whl")))
    if wanted != {(row["kind"], row["name"]) for row in rows}:
        raise SystemExit(f"the wheels announce {sorted(wanted)}, the list shows {sorted(row['name'] for row in rows)}")
    unusable = [row for row in rows if row["status"] != "ok"]
    if unusable:
        raise SystemExit(f"not usable: {unusable}")
    print(f"all {len(rows)} names of {len(list(wheels.glob('*.whl')))} wheels are listed and ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
