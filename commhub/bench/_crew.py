"""The torchruns that start the ranks: one where they are on this machine as it is, one on each of several hosts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from ._hosts import INTERFACE
from ._machine import threads_per_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ._hosts import Hosts
    from ._lifeline import Lifeline
    from ._options import Settings

_GRACE_SECONDS = 5.0
_PORT = 29_500
"""On a host that was just made, every port is free."""


@contextlib.contextmanager
def crew(settings: Settings, folder: Path, lifeline: Lifeline, hosts: Hosts | None) -> Iterator[Crew]:
    """Start the ranks of ``folder``'s job; they have ended when the context has."""
    threads = threads_per_rank(settings.threads, settings.ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        # Where all ranks are on this machine, Gloo needs no host name that resolves.
        environment |= {"GLOO_SOCKET_IFNAME": INTERFACE} if hosts else {}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    members = []
    try:
        for number, command in enumerate(_commands(settings, folder, hosts)):
            with (folder / f"log-{number}").open("wb") as log:
                # In a session of its own: a terminal's Ctrl-C reaches this process alone, which decides.
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            members.append(process)
        yield Crew(members)
    finally:
        lifeline.cut()
        for process in members:
            if process.poll() is None:
                process.terminate()
        for process in members:
            _end(process)


class Crew:
    """Launchers at work.

    Args:
        members: their processes.
    """

    def __init__(self, members: Sequence[subprocess.Popen[bytes]]) -> None:
        self._members = members

    def is_at_work(self) -> bool:
        """Whether any of them has work left, and none has failed: the others would wait for its ranks."""
        codes = [process.poll() for process in self._members]
        return None in codes and not any(codes)


def _commands(settings: Settings, folder: Path, hosts: Hosts | None) -> Iterator[list[str]]:
    words = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=0", f"--log-dir={folder}"]
    job = ["-m", "commhub.bench._rank", str(folder)]
    if hosts is None:
        words += [f"--nproc-per-node={settings.ranks}", "--nnodes=1", "--rdzv-backend=c10d"]
        yield [*words, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *job]
        return
    first = hosts.addresses[0]
    words += [f"--nproc-per-node={settings.ranks // settings.hosts}", f"--nnodes={settings.hosts}"]
    words += [f"--master-addr={first}", f"--master-port={_PORT}"]
    for host, address in enumerate(hosts.addresses):
        yield hosts.command(host, *words, f"--node-rank={host}", f"--local-addr={address}", *job)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that was asked to, and with it ranks that are not yet watching their lifeline."""
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
