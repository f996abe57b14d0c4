"""A store that answers no more (its machine lost power, its cable was pulled) delays no error: timeouts hold."""

import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import current, mlp

TIMEOUT = 2.0


class Proxy:
    """Passes bytes on between clients and a server, until it is silenced: then it keeps connections and loses bytes."""

    def __init__(self, port):
        self.silent = False
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source, target):
        while data := source.recv(65536):
            if not self.silent:
                target.sendall(data)


def lose_the_store(what):
    """Rank 1 reaches the store through a proxy that falls silent; says how long it took to raise what."""
    rank = dist.get_rank() if dist.is_initialized() else current().rank
    here = current().store
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        here.set("port", str(store.port))
    else:
        proxy = Proxy(int(here.get("port")))
        store = dist.TCPStore("127.0.0.1", proxy.port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce", timeout=TIMEOUT)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
    here.add("trained", 1)
    while int(here.add("trained", 0)) < 2:
        time.sleep(0.01)
    told = None
    if rank == 1:
        proxy.silent = True
        began = time.monotonic()
        try:
            if what == "step":
                model(torch.ones(2, 8)).sum().backward()
            else:
                registration.swap("fp16")
        except commhub.CommhubError as error:
            told = type(error).__name__, str(error), time.monotonic() - began
        here.set("over", "")
    else:
        here.wait(["over"])  # this rank takes no part in what the other one waits for
    registration.close()
    return told


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [("step", "HookTimeoutError", "did not end within 2 s"), ("swap", "RegistrationError", "store")],
)
def test_a_store_that_falls_silent_delays_no_timeout(ranks, what, kind, words):
    _, told = ranks(lose_the_store, 2, what, init=False, fresh=True, timeout=50)
    raised, text, seconds = told
    assert raised == kind
    assert words in text
    assert seconds < 20
