"""Several hosts on this machine: a network namespace for each, and one switch between them, with a shaped link apiece.

Nothing of it has a name in the system. A namespace is there as long as a process is in it, and each is held by one that
reads from a pipe of this process: whatever ends this process ends them, and the kernel takes away what was in them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commhub.drivers._network import Network

INTERFACE = "eth0"
"""What each host calls its link to the switch."""

_SECONDS = 10.0
_TOOLS = ("unshare", "nsenter", "ip", "tc")
_AS_ROOT = ["unshare", "--net"]
_AS_ANYBODY = ["unshare", "--user", "--map-root-user", "--net"]
_BURST_SECONDS = 1.5e-3
"""So much of a link's rate may go out at once, and at least two frames."""
_TWO_FRAMES = 4_000
_HEADERS = 1.1
"""What is sent at once, headers included, over the same without. The kernel hands several frames on as one, and where
a link's burst is too small for them it cuts them apart, for which a network does not need this machine's processors."""
_MOST_AT_ONCE = 65_536
_PACKETS = 100_000
"""What a delayed link holds; netem's own thousand would lose the rest."""


class NoHostsError(RuntimeError):
    """They cannot be made here; its text is the reason, in one line."""


class Hosts:
    """Hosts that are there until the context ends, or this process.

    Args:
        count: how many.
        network: what the link of each sends at, and how long a packet takes on it; ``None`` for as fast as it goes.

    Attributes:
        addresses: of each host.
        is_delayed: whether the kernel makes packets take the network's latency; if not, it is left to the caller.
    """

    def __init__(self, count: int, network: Network | None = None) -> None:
        self.addresses = [f"10.77.{host // 250}.{host % 250 + 1}" for host in range(count)]
        self.is_delayed = False
        self._network = network
        self._holders: list[subprocess.Popen[bytes]] = []

    def command(self, host: int, *words: str) -> list[str]:
        """The command line that runs a command on a host."""
        return [*self._entering(1 + host), *words]

    def __enter__(self) -> Self:
        """Make them.

        Raises:
            NoHostsError: if they cannot be made here. Nothing is left then.
        """
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            raise NoHostsError(f"there is no {' and no '.join(missing)} here (Linux with iproute2 and util-linux has)")
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for holder in self._holders:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.close()
            holder.stdout.close()
        for holder in self._holders:
            holder.wait()
        self._holders.clear()

    def _make(self) -> None:
        try:
            self._prefix, self._user = [], []
            self._hold(_AS_ROOT)
        except NoHostsError:  # whoever is not root may be, in a namespace of users
            self._user = ["--user", "--preserve-credentials"]
            self._hold(_AS_ANYBODY)
            self._prefix = self._entering(0, net=False)
        self._on(0, "ip", "link", "add", "switch", "type", "bridge")
        self._on(0, "ip", "link", "set", "switch", "up")
        for host, address in enumerate(self.addresses):
            self._hold([*self._prefix, *_AS_ROOT])
            port, pid = f"port{host}", str(self._holders[-1].pid)
            link = ["ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", pid]
            self._on(0, *link)
            self._on(0, "ip", "link", "set", port, "master", "switch", "up")
            self._on(1 + host, "ip", "addr", "add", f"{address}/16", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                self._on(1 + host, "ip", "link", "set", device, "up")
            self._shape(host)

    def _shape(self, host: int) -> None:
        network = self._network
        where = ["root"]
        if network is not None and network.latency:
            delay = ["netem", "delay", f"{network.latency * 1e6:.0f}us", "limit", str(_PACKETS)]
            with contextlib.suppress(NoHostsError):  # many kernels come without it
                self._on(1 + host, "tc", "qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", *delay)
                self.is_delayed, where = True, ["parent", "1:1"]
        if network is not None and network.bandwidth is not None:
            burst = max(_TWO_FRAMES, int(network.bandwidth / 8 * _BURST_SECONDS))
            at_once = str(min(_MOST_AT_ONCE, int(burst / _HEADERS)))
            self._on(1 + host, "ip", "link", "set", INTERFACE, "gso_max_size", at_once)
            rate = ["tbf", "rate", f"{network.bandwidth:.0f}bit", "burst", str(burst), "latency", "500ms"]
            self._on(1 + host, "tc", "qdisc", "add", "dev", INTERFACE, *where, *rate)

    def _hold(self, unshare: Sequence[str]) -> None:
        """Make a namespace that a process of its own is in."""
        holder = subprocess.Popen(  # noqa: S603 - fixed words
            [*unshare, "sh", "-c", "echo made; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which ends them
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        with holder.stderr as stderr:
            if holder.stdout.readline() == b"made\n":
                self._holders.append(holder)
                return
            why = stderr.read()
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()
        raise NoHostsError(_last_line(why))

    def _entering(self, place: int, *, net: bool = True) -> list[str]:
        into = [*self._user, *(["--net"] if net else [])]
        return ["nsenter", "--target", str(self._holders[place].pid), *into, "--"]

    def _on(self, place: int, *words: str) -> None:
        done = subprocess.run(  # noqa: S603 - fixed words
            [*self._entering(place), *words], capture_output=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            raise NoHostsError(f"{' '.join(words)}: {_last_line(done.stderr)}")


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines() or ["no reason was given"]
    return lines[-1]
