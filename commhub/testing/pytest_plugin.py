"""The harness as pytest fixtures, for a root conftest: ``pytest_plugins = ["commhub.testing.pytest_plugin"]``.

Not an entry point of pytest's own: whoever has commhub installed should not get fixtures unasked.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commhub.testing import _outcome, _pool, plugins


class Ranks:
    """The session's pool as a test calls it: ``ranks(fn, 2, *args, **kwargs)``."""

    def __init__(self, pool: _pool.RankPool) -> None:
        self.pool = pool

    def __call__(
        self,
        fn: Callable[..., Any],
        nproc: int = 2,
        *args: Any,
        timeout: float = 60,
        grace: float | None = None,
        init: bool = True,
        fresh: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``fn`` on ``nproc`` ranks; their results in rank order. See ``RankPool.run``."""
        return self.pool.run(fn, nproc, args, kwargs, timeout=timeout, grace=grace, init=init, fresh=fresh)

    def fresh(
        self,
        fn: Callable[..., Any],
        nproc: int = 2,
        *args: Any,
        timeout: float = 60,
        grace: float | None = None,
        init: bool = True,
        destroy: bool = False,
        **kwargs: Any,
    ) -> list[_outcome.RankResult]:
        """Call ``fn`` in brand-new processes and tell how each ended. See ``RankPool.run_fresh``."""
        return self.pool.run_fresh(fn, nproc, args, kwargs, timeout=timeout, grace=grace, init=init, destroy=destroy)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real ranks, started once per session: ``ranks(fn, 2, *args)`` returns the ranks' results."""
    with _pool.RankPool() as pool:
        yield Ranks(pool)


@pytest.fixture
def check(request: pytest.FixtureRequest, ranks: Ranks) -> Any:
    """A conformance check, to be called: see ``commhub.testing.parametrize_with_checks``."""
    case = request.param
    case.pool = ranks.pool
    return case


@pytest.fixture
def temporary_plugin(tmp_path: Path) -> Iterator[Callable[..., plugins.TemporaryPlugin]]:
    """Plugins for one test: ``temporary_plugin("commhub-foo", hooks={...}, source=...)`` installs one."""
    with contextlib.ExitStack() as stack:
        count = 0

        def install(name: str = "commhub-foo", **options: Any) -> plugins.TemporaryPlugin:
            nonlocal count
            count += 1  # each in a folder of its own, so that one name can be there twice
            folder = tmp_path / f"plugin{count}"
            return stack.enter_context(plugins.temporary_plugin(folder, name, **options))

        yield install
