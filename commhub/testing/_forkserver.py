"""The parent's end of the fork server: start it, have it fork and signal ranks, learn how they ended."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO

import attrs

_START = """import sys
sys.path[:] = sys.argv[2:]
from commhub.testing._server import main
main(int(sys.argv[1]))"""
_START_SECONDS = 180  # torch's import, on a busy machine


@attrs.define(kw_only=True, eq=False)
class RankProcess:
    """One forked process, as the parent sees it."""

    number: int
    channel: Connection
    output: IO[bytes]
    status: int | None = None
    """How it ended, as in ``subprocess``; ``None`` while it runs."""

    def written(self, start: int = 0) -> str:
        """What it wrote to stdout and stderr, from byte ``start`` on, without Gloo's chatter."""
        self.output.seek(start)
        text = self.output.read().decode(errors="replace")
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo] Rank "))

    def forget_output(self) -> None:
        """Empty the output file."""
        self.output.truncate(0)

    def close(self) -> None:
        """Let go of its files."""
        self.channel.close()
        self.output.close()


class ForkServer:
    """A running fork server. What it forks ends with it, and it ends with this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # One thread per library: a second one would make the server's copies unsound.
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        path = [os.path.abspath(entry) for entry in sys.path]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, on this package
                [sys.executable, "-c", _START, str(theirs.fileno()), *path],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is for pytest, which ends this
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=os.environ | single,
            )
        self.control = Connection(ours.detach())
        """Readable when ``read_notices`` has something to do."""
        self._processes: dict[int, RankProcess] = {}
        self._count = 0
        if not self.control.poll(_START_SECONDS):
            raise self._broken(f"did not start within {_START_SECONDS} s")
        self._receive()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def fork(self, *, fresh: bool) -> RankProcess:
        """A new rank process: for one order if ``fresh``, else for many, until its channel closes."""
        ours, theirs = Pipe()
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # Else a rank would go on at its old position after the file was emptied, behind a gap of zeros.
        fcntl.fcntl(output, fcntl.F_SETFL, fcntl.fcntl(output, fcntl.F_GETFL) | os.O_APPEND)
        self._count += 1
        with theirs:
            try:
                self.control.send(("fork", self._count, fresh))
                reduction.send_handle(self.control, theirs.fileno(), None)
                reduction.send_handle(self.control, output.fileno(), None)
            except OSError as err:
                raise self._broken("is gone") from err
        process = RankProcess(number=self._count, channel=ours, output=output)
        self._processes[process.number] = process
        return process

    def signal(self, process: RankProcess, signum: int) -> None:
        """Send it a signal, unless it ended."""
        if process.status is None:
            with contextlib.suppress(OSError):
                self.control.send(("signal", process.number, int(signum)))

    def read_notices(self) -> None:
        """Note the processes that ended since the last call; never waits."""
        while self.control.poll():
            match self._receive():
                case ("ended", int(number), int(status)):
                    self._processes.pop(number).status = status

    def reap(self, processes: list[RankProcess], seconds: float = 10) -> None:
        """Wait until all of them ended, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        if self.control.closed:
            return  # the server ended, and they with it
        while any(p.status is None for p in processes) and time.monotonic() < deadline:
            if wait([self.control], deadline - time.monotonic()):
                self.read_notices()

    def _receive(self) -> tuple[object, ...]:
        try:
            notice: tuple[object, ...] = self.control.recv()
        except (EOFError, OSError) as err:
            raise self._broken("ended") from err
        return notice

    def _broken(self, how: str) -> RuntimeError:
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self.close()
        return RuntimeError(f"the fork server {how}\n{text}".rstrip())

    def close(self) -> None:
        """End it and all that it forked, and wait until they are gone."""
        self.control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
