"""Check that long checks stand for what `make test` leaves out in `.ci/run`: each of its cases is one of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SWITCH = "COMMHUB_EVERY_CHECK"


def collected(paths: list[str], *, every: bool) -> set[str]:
    """The ids of the tests in these files and folders, with every check or without."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(  # noqa: S603 - this interpreter, on this repository's tests
        command, env=environment | ({SWITCH: "1"} if every else {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return {line for line in done.stdout.splitlines() if "::" in line}


def main(listed: Path) -> None:
    """End the process with a message where a case would not be run at all."""
    paths = listed.read_text(encoding="utf-8").split()
    some, every = collected(paths, every=False), collected(paths, every=True)
    if lost := sorted(some - every):
        raise SystemExit("make test runs these, and the long checks do not:\n" + "\n".join(lost))
    print(f"{len(some)} cases that make test left out are among {len(every)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
