"""The process that keeps the ranks' key-value store for a session.

One of its own: pytest's process gets no threads from torch, and as under torchrun no rank's end takes the store
along. The system chooses the port, once, so that no two calls can race for one.
"""

import attrs

from commhub.testing import _context, _transport

from ._forkserver import ForkServer, RankProcess
from ._isolation import Surroundings
from ._worker import Answer, Order

_SECONDS = 60


@attrs.frozen
class Keeper:
    """A running keeper and the port of its store."""

    process: RankProcess
    port: int

    @classmethod
    def start(cls, server: ForkServer) -> "Keeper":
        """Fork one.

        Raises:
            RuntimeError: if it gives no port.
        """
        process = server.fork(fresh=False)
        call = _transport.Call.of(_context.host_store, (), {})
        process.channel.send(Order(call=call, surroundings=Surroundings.here()))
        answer = Answer()
        if process.channel.poll(_SECONDS):
            answer = process.channel.recv()
        if answer.value is None:
            raise RuntimeError(f"there is no store for the ranks: {answer.failure}\n{process.written()}")
        return cls(process, _transport.loads(answer.value))
