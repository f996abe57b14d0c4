"""``commhub check``: the conformance kit against one hook or averager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from commhub._printable import message_of

from ._output import Answering, complete_names, print_json, print_row, say

if TYPE_CHECKING:
    from commhub.testing import CheckResult

_COLUMNS = {"check": 25, "on": 8, "result": 16, "took": 7}
"""With their widths, which are fixed: a row is printed as its check ends."""


def _ranks(_context: object, _option: object, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if not all(1 <= number <= 64 for number in numbers):
        raise click.BadParameter(f"{text!r}: give numbers of ranks, such as 2,4.")
    return numbers


class _Table:
    """Prints results as they come; nothing where none comes, because the command was wrong."""

    def __init__(self) -> None:
        self._begun = False

    def show(self, result: CheckResult) -> None:
        if not self._begun:
            print_row((*_COLUMNS, "why"), tuple(_COLUMNS.values()))
            self._begun = True
        on = f"{result.nproc} ranks" if result.nproc else ""
        why = result.reason.partition("\n")[0]
        print_row((result.check, on, result.status, f"{result.seconds:.1f} s", why), tuple(_COLUMNS.values()))


@click.command(cls=Answering)
@click.argument("name", shell_complete=complete_names)
@click.option("--nproc", default="2,4", callback=_ranks, show_default=True, help="Numbers of ranks to train on.")
@click.option("--quick", is_flag=True, help="Leave out the checks on real ranks.")
@click.option("--sharded", is_flag=True, help="Run the checks between two replicas of two shards (FSDP2), on 4 ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@click.option("--expect-failure", "expected", multiple=True, metavar="CHECK=REASON", help="A check that may fail.")
@click.option("--minimum", default=1, show_default=True, help="How many checks have to apply.")
def check(
    name: str,
    nproc: tuple[int, ...],
    quick: bool,
    sharded: bool,
    as_json: bool,
    expected: tuple[str, ...],
    minimum: int,
) -> None:
    """Run the conformance checks against NAME, a hook string or averager. Exits with 1 if one fails.

    The checks follow from what the plugin declares. They look at the distribution, drive the hook in a simulator on
    up to 64 virtual ranks, and train with it on real ranks of this machine.
    """
    try:
        from commhub.testing import check_hook
        from commhub.testing.conformance._run import WHERE, summary
    except ImportError as error:
        raise click.ClickException(f"the conformance kit cannot be loaded: {message_of(error)}") from error
    reasons = {}
    for text in expected:
        key, found, reason = text.partition("=")
        if not found or not reason.strip():
            raise click.BadParameter(f"{text!r}: write CHECK=REASON.", param_hint="--expect-failure")
        reasons[key] = reason
    if quick and sharded:
        raise click.UsageError("--quick leaves out the checks on real ranks, and --sharded runs no others.")
    try:
        where = ("sharded",) if sharded else WHERE[:2] if quick else WHERE
        results = check_hook(
            name,
            nproc=nproc,
            expected_failed_checks=reasons,
            minimum=minimum,
            where=where,
            report=None if as_json else _Table().show,
        )
    except ValueError as error:
        raise click.ClickException(message_of(error)) from error
    if as_json:
        import attrs

        print_json([attrs.asdict(result) for result in results])
    else:
        for result in results:
            if result.status == "failed" and "\n" in result.reason:
                say(f"\n{result.check}: {result.reason}")
        say(f"\n{name}: {summary(results)}")
    if any(result.status == "failed" for result in results):
        raise SystemExit(1)
