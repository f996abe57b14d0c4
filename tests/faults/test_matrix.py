"""Every fault in every phase, on two ranks and on three, the first rank and the last: one cell each, or the reason
why there is none.

``make test`` runs the cells of QUICK; with COMMHUB_EVERY_CHECK all are run.
"""

import os
import time

import pytest

from ._faults import FAULTS
from ._phases import PHASES
from ._questions import ask, ended_cleanly
from ._story import live

TABLE = """
                handshake prepare encode between confirm average swap schedule save load exit
raise               E        E      E       E       E       E     E      E      E    E    o
BaseException       E        E      E       E       E       E     E      E      E    E    o
stuck               E        E      E       E       E       E     E      E      E    E    o
killed              E        E      E       E       E       E     E      E      E    E    o
stopped             E        E      E       E       E       E     E      E      E    E    o
late                E        E      E       E       E       E     E      E      E    E    o
wrong sizes         E        E      E       E       a       E     E      E      b    E    o
lost store          E        E      o       o       o       o     E      E      E    E    o
full disk           c        c      c       c       c       c     c      c      E    o    c
link: lost          d        d      E       E       E       E     d      d      d    d    o
link: corrupt       d        d      o       o       o       o     d      d      d    d    o
link: failed        d        d      E       E       E       E     d      d      d    d    o
link: late          d        d      E       E       E       E     d      d      d    d    o
"""
"""E: every rank ends in an error. o: nothing is amiss that anybody must be told of. A letter: see REASONS."""

REASONS = {
    "a": "commhub itself asks for the collective that confirms a step: nobody can ask for another size",
    "b": "what a rank saves is its own, of any size",
    "c": "nothing is written to a disk",
    "d": "ranks meet in the store: the communicator carries nothing",
}


def cells():
    """What each fault does in each phase."""
    header, *rows = TABLE.strip("\n").splitlines()
    for row in rows:
        name, marks = row[:16].strip(), row[16:].split()
        for phase, mark in zip(header.split(), marks, strict=True):
            yield name, phase, mark


EVERY = [
    (fault, phase, nproc, victim)
    for fault, phase, mark in cells()
    if mark not in REASONS
    for nproc in (2, 3)
    for victim in (0, nproc - 1)
]

QUICK = [
    ("raise", "prepare", 2, 1),
    ("BaseException", "swap", 2, 0),
    ("stuck", "between", 2, 1),
    ("killed", "average", 3, 0),
    ("stopped", "confirm", 2, 1),
    ("late", "handshake", 2, 0),
    ("wrong sizes", "load", 2, 1),
    ("lost store", "schedule", 2, 1),
    ("full disk", "save", 3, 2),
    ("link: lost", "exit", 2, 0),
    ("link: corrupt", "between", 2, 0),
    ("link: failed", "encode", 2, 1),
    ("link: late", "exit", 2, 1),
]
"""Each fault once, and each phase."""


@pytest.mark.parametrize(
    ("fault", "phase", "nproc", "victim"),
    EVERY if os.environ.get("COMMHUB_EVERY_CHECK") else QUICK,
    ids=lambda value: str(value).replace(" ", "_"),
)
def test_a_fault_is_told_and_training_goes_on(ranks, tmp_path, record_property, fault, phase, nproc, victim):
    mark = {(f, p): m for f, p, m in cells()}[fault, phase]
    results = ranks.fresh(live, nproc, fault, phase, victim, tmp_path, init=False, timeout=80, grace=60)
    errors = [result.value.error for result in results if result.value is not None]
    record_property("told", {phase: [error.seconds for error in errors if error is not None]})
    if phase == "exit":
        ended_cleanly(fault, victim, results, time.monotonic())
    else:
        ask(fault, victim, results, error=mark == "E")


def test_every_fault_has_a_cell_or_a_reason_in_every_phase():
    found = [(fault, phase) for fault, phase, _ in cells()]
    assert len(found) == len(set(found))
    assert set(found) == {(fault, phase) for fault in FAULTS for phase in PHASES}
    assert {fault for fault, *_ in QUICK} == set(FAULTS)
    assert {phase for _, phase, *_ in QUICK} == set(PHASES)
    assert set(QUICK) <= set(EVERY)
    assert {mark for _, _, mark in cells()} == {"E", "o", *REASONS}
