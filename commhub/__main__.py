"""``python -m commhub`` is the command line, for launchers and environments without scripts on the path."""

from commhub.cli import main

main(prog_name="commhub")
