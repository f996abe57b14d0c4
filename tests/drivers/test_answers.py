"""A rank that is there answers who calls, whatever else it waits for and however slow the store is."""

import json
import time

import torch.distributed as dist

from commhub.drivers._board import FailureBoard
from commhub.drivers._store import Errand, own_connection, peek, wait_for


def test_who_waits_leaves_the_connection_to_others():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine = own_connection(store, 20.0)
    waiting = Errand(lambda: wait_for(mine, ["something"], 60.0))
    for number in range(1, 6):
        asked = Errand(lambda: mine.add("questions", 1))
        assert asked.wait(20.0)
        assert asked.result() == number
    assert not waiting.wait(0.0)
    store.set("something", "")
    assert waiting.wait(20.0)
    assert waiting.result()


class Slow:
    """A store whose answers take longer than a look at the board does."""

    def __init__(self, store):
        self._store = store

    def add(self, key, value):
        time.sleep(0.1)
        return self._store.add(key, value)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_each_look_answers_where_the_store_is_slow():
    store = dist.HashStore()
    board = FailureBoard(Slow(store), 0, 2)
    for news in (1, 2, 3):
        store.add("news", 1)
        assert board.read() is None
        assert board._look is not None, "no look was begun"
        assert board._look.wait(20.0)
        assert json.loads(peek(store, "answer/0"))[0] == news
