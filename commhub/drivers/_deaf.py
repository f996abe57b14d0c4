"""Connections that hear nothing more, so that nobody who waits for an answer there ever goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

_SO_ATTACH_FILTER = 26
_RETURN = 6
"""The instruction of a packet filter that ends it, with the number of bytes to let through: none."""


def deafen(places: Collection[tuple[str, int]]) -> None:
    """Let no connection of this process to these addresses and ports receive anything any more.

    Who waits for an answer then waits until the process has ended. Where the operating system cannot do that, the
    connections are shut, and who waits fails.
    """
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError, ValueError):  # it has been closed, or is no such connection
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    host, port = one.getpeername()[:2]
                    if (host.removeprefix("::ffff:"), port) in places:
                        _deafen(one)


def _deafen(one: socket.socket) -> None:
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, 0))
    try:
        one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(nothing)))
    except OSError:
        one.shutdown(socket.SHUT_RDWR)
