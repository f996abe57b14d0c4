"""A pool of rank processes, started once per test session: a test on real ranks costs milliseconds.

    pool = RankPool()
    pool.run(average, nproc=2, args=(torch.ones(3),))   # -> the ranks' return values, in rank order

The ranks form a Gloo process group for the call. Whatever goes wrong on one of them becomes one RankError
with every rank's story, its processes are ended, and the next call gets new ones.
"""

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import attrs

from commhub._errors import HookOptionTypeError
from commhub._printable import shown
from commhub.testing import _transport

from ._forkserver import ForkServer, RankProcess
from ._gather import Gathered, gather, kill
from ._isolation import Surroundings
from ._keeper import Keeper
from ._outcome import MOST, RankError, RankResult
from ._worker import Order


class RankPool:
    """Processes that play the ranks of a process group, forked when first needed and used again."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None
        self._idle: list[RankProcess] = []
        self._keeper: Keeper | None = None
        self._calls = 0
        self._lock = threading.Lock()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def run(
        self,
        fn: Callable[..., Any],
        nproc: int = 2,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        timeout: float = 60,
        grace: float | None = None,
        init: bool = True,
        fresh: bool = False,
    ) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on ``nproc`` ranks and return their results in rank order.

        Args:
            fn: a function of a module, so that other processes find it.
            nproc: the number of ranks.
            args, kwargs: what it is called with, on every rank.
            timeout: seconds within which every rank has to answer.
            grace: seconds that the others have after a failure to tell their side; by default 2 after an exception,
                0.5 after a death.
            init: whether to make a process group.
            fresh: whether to run in new processes that end afterwards.

        Raises:
            RankError: if a rank raises, dies, or gives no answer in time.
        """
        call = _transport.Call.of(fn, args, kwargs or {})
        with self._lock:
            server, ranks = self._ranks(nproc, fresh=fresh)
            found = self._carry_out(server, ranks, call, fresh, timeout, grace, init=init, destroy=True)
            outputs = self._put_back(server, ranks, found, fresh=fresh)
        if found.errors:
            raise RankError(str(call), found.errors, found.stacks, outputs, nproc)
        for rank, text in outputs.items():
            if text.strip():
                sys.stdout.write(f"[rank {rank}] {text.rstrip()}\n")
        return [_value(found, rank) for rank in range(nproc)]

    def run_fresh(
        self,
        fn: Callable[..., Any],
        nproc: int = 2,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        timeout: float = 60,
        grace: float | None = None,
        init: bool = True,
        destroy: bool = False,
    ) -> list[RankResult]:
        """Call ``fn`` in ``nproc`` brand-new processes, let the interpreters end, and tell how each one did.

        What happens on a rank is in its result, and no error here. As in a user's script, the process group is left
        to the interpreter's exit, unless ``destroy``. The other arguments are those of ``run``.
        """
        call = _transport.Call.of(fn, args, kwargs or {})
        with self._lock:
            server, ranks = self._ranks(nproc, fresh=True)
            found = self._carry_out(server, ranks, call, True, timeout, grace, init=init, destroy=destroy)
            outputs = self._put_back(server, ranks, found, fresh=True)
        return [
            RankResult(
                value=_value(found, rank),
                error=found.errors.get(rank),
                exitcode=process.status if process.status is not None else -9,
                stderr=outputs[rank],
            )
            for rank, process in enumerate(ranks)
        ]

    def _ranks(self, nproc: int, *, fresh: bool) -> tuple[ForkServer, list[RankProcess]]:
        if type(nproc) is not int or not 0 < nproc <= MOST:
            raise HookOptionTypeError(f"nproc is {shown(nproc)}; give a number of ranks from 1 to {MOST}.")
        server = self._up()
        if fresh:
            return server, [server.fork(fresh=True) for _ in range(nproc)]
        server.read_notices()
        for process in [p for p in self._idle if p.status is not None]:
            self._idle.remove(process)
            last_words = process.written()
            process.close()
            warnings.warn(
                f"a rank's process ended between calls, with status {process.status}:\n{last_words}",
                RuntimeWarning,
                stacklevel=3,
            )
        ranks = self._idle[:nproc]
        ranks += [server.fork(fresh=False) for _ in range(nproc - len(ranks))]
        self._idle = self._idle[nproc:]
        return server, ranks

    def _up(self) -> ForkServer:
        """The server, and with it the store's keeper, started where they are not running."""
        if self._server is not None and self._server.control.closed:  # it ended, which that call reported
            self._close()
        if self._server is None:
            self._server = ForkServer()
            self._finalizer = weakref.finalize(self, self._server.close)
            self._keeper = Keeper.start(self._server)
        return self._server

    def _carry_out(
        self,
        server: ForkServer,
        ranks: list[RankProcess],
        call: _transport.Call,
        fresh: bool,
        timeout: float,
        grace: float | None,
        *,
        init: bool,
        destroy: bool,
    ) -> Gathered:
        self._calls += 1
        assert self._keeper is not None
        try:
            order = Order(
                call=call,
                surroundings=Surroundings.here(),
                world_size=len(ranks),
                port=self._keeper.port,
                prefix=f"call-{self._calls}",
                init=init,
                destroy=destroy,
            )
            for rank, process in enumerate(ranks):
                with contextlib.suppress(OSError):  # it died, and gather learns how
                    process.channel.send(attrs.evolve(order, rank=rank))
            return gather(server, ranks, fresh=fresh, timeout=timeout, grace=grace)
        except BaseException:  # Ctrl-C above all
            kill(server, ranks)
            for process in ranks:
                process.close()
            raise

    def _put_back(
        self, server: ForkServer, ranks: list[RankProcess], found: Gathered, *, fresh: bool
    ) -> dict[int, str]:
        """Keep the processes for the next call, or end them after a failure. Returns what they wrote."""
        over = fresh or bool(found.errors)
        if over:
            kill(server, ranks)
        outputs = {rank: process.written() for rank, process in enumerate(ranks)} | found.outputs
        for process in ranks:
            process.close() if over else process.forget_output()
        if not over:
            self._idle[:0] = ranks
        return outputs

    def close(self) -> None:
        """End all processes; a later call starts new ones."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        for process in [*self._idle, *([self._keeper.process] if self._keeper else [])]:
            process.close()
        self._idle, self._server, self._keeper, self._finalizer = [], None, None, None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _value(found: Gathered, rank: int) -> Any:
    answer = found.answers.get(rank)
    return None if answer is None or answer.value is None else _transport.loads(answer.value)
