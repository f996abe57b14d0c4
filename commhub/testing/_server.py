"""The fork server: a process that has imported torch and the core, never used them, and forks itself into ranks.

pytest's own process cannot be forked once torch has started threads there, and a spawned process imports
torch for seconds. This one has a single thread, so its copies are sound, and a copy costs milliseconds. It
speaks over one socket with the parent, and tells at once how a rank's process ended; when the parent is gone,
it ends the ranks and itself.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait

from commhub.testing import _worker

# What registering and training load at their first use: each new rank would take 0.2 s of CPU for it.
_OF_THE_CORE = (
    "drivers._gloo",
    "drivers._inbox",
    "drivers._link",
    "drivers._pipeline",
    "drivers._signature",
    "drivers._thread",
    "testing._compare",
    "testing._models",
    "training._register",
)


def main(control_fd: int) -> None:
    """Serve; in a forked child, return from here to the interpreter's ordinary end."""
    control = Connection(control_fd)
    _preload()
    control.send(("ready",))
    server = os.getpid()
    order = serve(control)
    if order is None:
        os._exit(0)
    channel, output, fresh = order
    _worker.settle(output, server)
    _worker.live(Connection(channel), fresh=fresh)


def _preload() -> None:
    # Ranks meet on 127.0.0.1, yet each of torch's connections asks DNS for the peer's name (`getnameinfo`),
    # and a lost answer costs 5 s: one connection in 25, seen. Here glibc asks /etc/hosts only.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).__nss_configure_lookup(b"hosts", b"files")
    import torch._dynamo  # DDP and every optimizer import it at first use, for a second
    import torch.distributed
    import torch.nn.parallel

    for part in _OF_THE_CORE:
        importlib.import_module(f"commhub.{part}")

    torch.set_num_threads(1)
    # What is here now belongs to all ranks: the collector need not walk it again, nor copy its pages.
    gc.collect()
    gc.freeze()


def serve(control: Connection) -> tuple[int, int, bool] | None:
    """Fork, signal and reap as told.

    Returns:
        ``None`` when the parent is gone; in a child, its task.
    """
    children: dict[int, int] = {}  # process id -> the parent's number for it
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        while True:
            ready = wait([control, woken])
            if woken in ready:
                os.read(woken, 4096)
                _reap(children, control)
            if control in ready:
                match control.recv():
                    case ("fork", number, fresh):
                        channel, output = reduction.recv_handle(control), reduction.recv_handle(control)
                        child = os.fork()
                        if child == 0:
                            signal.set_wakeup_fd(-1)
                            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                            with contextlib.suppress(OSError):
                                os.setpgid(0, 0)
                            for fd in (woken, wake):
                                os.close(fd)
                            control.close()
                            return channel, output, fresh
                        with contextlib.suppress(OSError):  # on both sides: whoever comes first
                            os.setpgid(child, child)
                        os.close(channel)
                        os.close(output)
                        children[child] = number
                    case ("signal", number, signum):
                        for child in [c for c, n in children.items() if n == number]:
                            _signal(child, signum)
    except (EOFError, OSError):
        for child in children:
            _signal(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        return None


def _reap(children: dict[int, int], control: Connection) -> None:
    for child in list(children):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _signal(child, signal.SIGKILL)  # what it started itself, in its process group
            control.send(("ended", children.pop(child), os.waitstatus_to_exitcode(status)))


def _signal(child: int, signum: int) -> None:
    send = os.killpg if signum == signal.SIGKILL else os.kill
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(child, signum)


if __name__ == "__main__":
    main(int(sys.argv[1]))
