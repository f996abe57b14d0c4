"""Running the checks against one subject, each guarded: whatever it does becomes a result."""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub._printable import described, message_of, shown
from commhub.testing._outcome import MOST, RankError

from ._check import Check, CheckResult, NotApplicableError
from ._list import all_checks
from ._shards import RANKS
from ._subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from commhub.testing._pool import RankPool

TIMEOUT = 60.0
"""Seconds after which a check has failed: what it drove hangs."""
WHERE = ("static", "simulated", "ranks", "processes")
"""The kinds of checks that everything is to pass."""
EVERYWHERE = (*WHERE, "sharded")

FIXED: Mapping[str, tuple[int, ...]] = {"static": (0,), "simulated": (0,), "sharded": (RANKS,)}
"""On how many ranks a kind of checks runs, 0 where it needs none; the others run on as many as are asked for."""


class Examination:
    """The checks of one subject in turn; what a failed one makes pointless is left out.

    Args:
        hook: a hook string.
        pool: runs functions on ranks.
        expected: by check, why it is expected to fail.
        timeout: seconds after which a check has failed.
    """

    def __init__(
        self, hook: str, pool: RankPool, expected: Mapping[str, str] | None = None, timeout: float = TIMEOUT
    ) -> None:
        self.subject = Subject(str(hook))
        self._timeout = timeout
        self.results: list[CheckResult] = []
        self._pool, self._expected = pool, dict(expected or {})
        refuse_unknown(self._expected)

    def run(self, check: Check, nproc: int) -> CheckResult:
        """Run one check; never raises for what the subject does."""
        began = time.monotonic()
        status, reason = "passed", ""
        missing = [name for name in check.after if self._failed(name)]
        try:
            if missing:
                raise NotApplicableError(f"{missing[0]} failed")
            with contextlib.redirect_stdout(io.StringIO()):  # what ranks print is shown where they fail
                self._call(check, nproc)
        except NotApplicableError as error:
            status, reason = "not applicable", message_of(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a subject may raise anything
            status, reason = "failed", _told(error)
        if status == "failed" and check.name in self._expected:
            status, reason = "expected failure", f"{self._expected[check.name]} ({reason.partition(chr(10))[0]})"
        elif status == "passed" and check.name in self._expected:
            status, reason = "failed", f"it was expected to fail ({self._expected[check.name]}) and passed"
        result = CheckResult(
            check=check.name,
            nproc=nproc,
            status=status,  # type: ignore[arg-type]
            reason=reason,
            seconds=time.monotonic() - began,
        )
        self.results.append(result)
        return result

    def _failed(self, name: str) -> bool:
        bad = ("failed", "expected failure")
        return any(r.check == name and r.status in bad for r in self.results)

    def _call(self, check: Check, nproc: int) -> None:
        if check.where == "static":
            check.run(self.subject)
        elif check.where == "processes":
            check.run(self.subject, self._pool, nproc)
        else:
            on_ranks = check.where in ("ranks", "sharded")
            told = self._pool.run(
                _guarded, max(nproc, 1), (check.name, self.subject), timeout=self._timeout, init=on_ranks
            )
            if reason := next(filter(None, told), None):
                raise NotApplicableError(reason)


def _guarded(name: str, subject: Subject) -> str | None:
    """In a rank's process: run a check; what it does not apply to is an answer and no failure."""
    check = next(check for check in all_checks() if check.name == name)
    try:
        check.run(subject)
    except NotApplicableError as error:
        return str(error)
    return None


def _told(error: BaseException) -> str:
    """What broke the rule; where it was no assertion of the check's, with the traceback."""
    if isinstance(error, RankError):
        rank, failure = min(error.errors.items())
        if failure.type_name == "AssertionError" and failure.message:
            return failure.message
        return f"rank {rank}: {failure.type_name}: {failure.message}\n{failure.traceback}".rstrip()
    message = message_of(error)
    return message if isinstance(error, AssertionError) and message else described(error)


def refuse_unknown(expected: Mapping[str, str]) -> None:
    """Raise HookOptionError for an expected failure of a check that does not exist."""
    known = {check.name for check in all_checks()}
    if unknown := sorted(expected.keys() - known, key=shown):
        raise HookOptionError(
            f"expected_failed_checks names {shown(unknown[0])}; the checks are {', '.join(sorted(known))}."
        )


def _refuse(
    hooks: object, nproc: object, where: object, expected: object, *, minimum: object = 0, timeout: object = 1.0
) -> None:
    """Raise HookOptionError for settings that will not do, before anything runs."""
    if not isinstance(hooks, list | tuple) or not all(isinstance(hook, str) for hook in hooks):
        raise HookOptionTypeError(f"{shown(hooks)} is no hook string where one belongs.")
    if not isinstance(nproc, list | tuple | range) or not all(
        type(number) is int and 0 < number <= MOST for number in nproc
    ):
        raise HookOptionTypeError(f"nproc is {shown(nproc)}; give numbers of ranks from 1 to {MOST}, in a list.")
    if not isinstance(where, list | tuple) or not all(place in EVERYWHERE for place in where):
        raise HookOptionTypeError(f"where is {shown(where)}; give some of {', '.join(EVERYWHERE)}, in a list.")
    if expected is not None and not isinstance(expected, Mapping):
        raise HookOptionTypeError(f"expected_failed_checks is {shown(expected)}; give a dict of reasons by check.")
    if type(minimum) is not int:
        raise HookOptionTypeError(f"minimum is {shown(minimum)}; give a number of checks.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise HookOptionTypeError(f"timeout is {shown(timeout)}; give seconds above 0.")
    refuse_unknown(expected or {})


def plan(kind: str, nproc: Sequence[int], where: Sequence[str] = WHERE) -> Iterator[tuple[Check, int]]:
    """The checks for a kind of subject, each with a number of ranks: 0 for those that need none."""
    for check in all_checks():
        if kind in check.kinds and check.where in where:
            for number in FIXED.get(check.where, nproc):
                yield check, number


def check_hook(
    hook: str,
    *,
    nproc: Sequence[int] = (2, 4),
    expected_failed_checks: Mapping[str, str] | None = None,
    minimum: int = 1,
    where: Sequence[str] = WHERE,
    timeout: float = TIMEOUT,
    pool: RankPool | None = None,
    report: Callable[[CheckResult], object] | None = None,
) -> list[CheckResult]:
    """Run the conformance checks against a hook or averager.

    Args:
        hook: a name or hook string.
        nproc: numbers of ranks for the checks on real ranks.
        expected_failed_checks: by check, the reason why it may fail; one that passes then is a failure.
        minimum: how many checks have to apply; fewer is an error, because nothing would have been shown.
        where: kinds of checks to run: ``"static"``, ``"simulated"``, ``"ranks"``, ``"processes"``, and where a hook is
            to work between replicas of sharded models ``"sharded"``, which is left out otherwise.
        timeout: seconds after which a check has failed: what it drove hangs.
        pool: ranks to run on, where there are some already.
        report: called with each result as its check ends.

    Raises:
        UnknownHookError, HookConflictError: if no plugin has that name.
        HookOptionError: for settings that will not do, such as an unknown check in ``expected_failed_checks``; if fewer
            checks applied than ``minimum``.

    >>> [r.check for r in check_hook("allreduce", nproc=(2,)) if r.status == "failed"]  # doctest: +SKIP
    []
    """
    from commhub.testing._pool import RankPool

    _refuse([hook], nproc, where, expected_failed_checks, minimum=minimum, timeout=timeout)
    if report is not None and not callable(report):
        raise HookOptionTypeError(f"report is {shown(report)}; give a function.")
    with contextlib.ExitStack() as stack:
        ranks = pool or stack.enter_context(RankPool())
        examination = Examination(hook, ranks, expected_failed_checks, timeout)
        kind = examination.subject.info.kind
        for check, number in plan(kind, nproc, where):
            result = examination.run(check, number)
            if report is not None:
                report(result)
    applied = sum(result.status != "not applicable" for result in examination.results)
    if applied < minimum:
        raise HookOptionError(f"{hook}: {applied} checks applied, and at least {minimum} were asked for.")
    return examination.results


def summary(results: Sequence[CheckResult]) -> str:
    """One line that counts the results: ``"31 passed, 2 not applicable"``."""
    counts = Counter(str(result.status) for result in results)
    order = ("passed", "failed", "expected failure", "not applicable")
    return ", ".join(f"{counts[status]} {status}" for status in order if counts[status]) or "nothing was checked"


def parametrize_with_checks(
    hooks: Sequence[str],
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    nproc: Sequence[int] = (2,),
    where: Sequence[str] = WHERE,
) -> Any:
    """A pytest decorator: the test runs once for each hook and check, which it calls: ``check()``.

    The test needs the ``ranks`` fixture of ``commhub.testing.pytest_plugin`` to be available.

    Args:
        hooks: hook strings.
        expected_failed_checks: by check, why it is expected to fail for these hooks; shown as xfail.
        nproc, where: as for ``check_hook``.

    Raises:
        UnknownHookError, HookConflictError: if no plugin has one of the names.
        HookOptionError: for settings that will not do, such as an unknown check in ``expected_failed_checks``.
    """
    import pytest

    _refuse(hooks, nproc, where, expected_failed_checks)
    cases = []
    for hook in hooks:
        shared: dict[str, Examination] = {}
        for check, number in plan(Subject(hook).info.kind, nproc, where):
            case = Case(hook, check, number, shared, expected_failed_checks or {})
            cases.append(pytest.param(case, id=f"{hook}-{check.name}" + (f"-{number} ranks" if number else "")))
    return pytest.mark.parametrize("check", cases, indirect=True)


class Case:
    """One check of one hook, as a test calls it."""

    def __init__(
        self, hook: str, check: Check, nproc: int, shared: dict[str, Examination], expected: Mapping[str, str]
    ) -> None:
        self._hook, self._check, self._nproc, self._shared, self._expected = hook, check, nproc, shared, expected
        self.pool: RankPool | None = None

    def __call__(self) -> None:
        """Run the check.

        Raises:
            AssertionError: if it fails. Pytest's own for skip and xfail come where it does not apply, or may fail.
        """
        import pytest

        assert self.pool is not None
        if self._hook not in self._shared:
            self._shared[self._hook] = Examination(self._hook, self.pool, self._expected)
        examination = self._shared[self._hook]
        result = examination.run(self._check, self._nproc)
        if result.status == "not applicable":
            pytest.skip(f"not applicable: {result.reason}")
        if result.status == "expected failure":
            pytest.xfail(result.reason)
        assert result.status == "passed", f"{self._hook}, {self._check.name} ({self._check.summary})\n{result.reason}"
