"""In whatever order the ranks' questions reach the store, and whoever loses patience when, verdicts are common."""

import os
import random
import threading
from collections import defaultdict

import pytest

from commhub.training.rendezvous import _rendezvous
from commhub.training.rendezvous._rendezvous import Rendezvous

SCHEDULES = 5000 if os.environ.get("COMMHUB_EVERY_CHECK") else 150


class Turns:
    """Threads that run one at a time, each until its next question to the store; chance picks whose turn it is."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.impatient = True
        self._asking = {}
        self._idle = threading.Condition()
        self._running = 0

    def run(self, functions):
        """All functions to their ends."""
        self._running = len(functions)
        threads = [threading.Thread(target=self._serve, args=(one,), daemon=True) for one in functions]
        for thread in threads:
            thread.start()
        while True:
            with self._idle:
                while self._running > len(self._asking):
                    assert self._idle.wait(20)
                if not self._running:
                    return
                ready = [name for name, (_, can) in self._asking.items() if can()]
                others = [name for name in self._asking if name not in ready]
                pressed = self.impatient and others and (not ready or self.dice.random() < 0.1)
                assert ready or pressed, "every rank waits for ever"
                name = self.dice.choice(others if pressed else ready)
                gate, _ = self._asking.pop(name)
            gate.set()

    def _serve(self, function):
        function()
        with self._idle:
            self._running -= 1
            self._idle.notify_all()

    def turn(self, can=lambda: True):
        """Wait for this thread's turn, or until it has waited too long for what it wants."""
        gate = threading.Event()
        with self._idle:
            self._asking[threading.get_ident()] = gate, can
            self._idle.notify_all()
        gate.wait()


class Fake:
    """The part of a store that rendezvous use."""

    def __init__(self, turns):
        self.turns, self.kept = turns, {}

    def add(self, key, n):
        self.turns.turn()
        self.kept[key] = str(int(self.kept.get(key, b"0")) + n).encode()
        return int(self.kept[key])

    def set(self, key, value):
        self.turns.turn()
        self.kept[key] = value.encode()

    def check(self, keys):
        self.turns.turn()
        return all(key in self.kept for key in keys)

    def compare_set(self, key, expected, desired):
        self.turns.turn()
        found = self.kept.get(key)
        if (found or b"") == expected.encode():
            self.kept[key] = desired.encode()
        return self.kept.get(key, expected.encode())

    def wait(self, keys, _):
        self.turns.turn(lambda: all(key in self.kept for key in keys))
        if not all(key in self.kept for key in keys):
            raise RuntimeError("Wait timeout")


class Below:
    def __init__(self, prefix, store):
        self._prefix, self._store = prefix, store

    def __getattr__(self, name):
        ask = getattr(self._store, name)

        def named(key, *more):
            return ask(
                [f"{self._prefix}/{k}" for k in key] if isinstance(key, list) else f"{self._prefix}/{key}", *more
            )

        return named


@pytest.mark.parametrize("p", [2, 3])
def test_no_rank_succeeds_where_another_fails_and_afterwards_all_meet(monkeypatch, p):
    monkeypatch.setattr(_rendezvous, "PrefixStore", Below)
    monkeypatch.setattr(_rendezvous, "_STRAGGLING", 0.0)
    monkeypatch.setattr(Rendezvous, "_holds_the_store", lambda _: False)
    outcomes = set()
    for seed in range(SCHEDULES):
        turns = Turns(seed)
        store = Fake(turns)
        heard = defaultdict(dict)

        def call(rank, patience, store=store, heard=heard):
            rendezvous = Rendezvous("all", rank, p, 0.0, store)
            for number in range(2):
                verdict = rendezvous._hold(f"{rank}", patience, lambda _: True)
                assert rank not in heard[rendezvous._number, number]
                heard[rendezvous._number, number][rank] = verdict
                if len(verdict.brought) < p:
                    return

        calls = [turns.dice.choice([0, 1, 1, 2]) for _ in range(p)]  # rendezvous that each rank comes to
        turns.run([lambda r=rank, n=n: [call(r, 0.0) for _ in range(n)] for rank, n in enumerate(calls)])
        for verdicts in heard.values():
            assert len({repr(verdict) for verdict in verdicts.values()}) == 1, seed
            for verdict in verdicts.values():
                complete = len(verdict.brought) == p
                assert not complete or len(verdicts) == p, seed
                outcomes.add(complete)
        heard.clear()
        turns.impatient = False
        turns.run([lambda r=rank: call(r, 1000.0) for rank in range(p)])
        assert len(heard) == 2, seed
        assert all(len(v.brought) == p for verdicts in heard.values() for v in verdicts.values()), seed
    assert outcomes == {True, False}
