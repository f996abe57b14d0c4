"""A process on the lifeline ends when the line is cut, its holder dies, or it was never there."""

import subprocess
import sys
import textwrap

import pytest

from commhub.bench._lifeline import ENDED, Lifeline

RANK = """
    import sys, time
    from pathlib import Path
    from commhub.bench._lifeline import die_with
    die_with(Path(sys.argv[1]))
    print("up", flush=True)
    time.sleep(60)
"""
HOLDER = """
    import os, signal, subprocess, sys
    from pathlib import Path
    from commhub.bench._lifeline import Lifeline
    line = Lifeline(Path(sys.argv[1]))
    rank = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE)
    rank.stdout.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE)


@pytest.mark.parametrize("cuts", [1, 2])
def test_cutting_ends_every_process_on_the_line(tmp_path, cuts):
    with Lifeline(tmp_path) as line:
        ranks = [run(RANK, tmp_path) for _ in range(2)]
        assert [rank.stdout.readline() for rank in ranks] == [b"up\n"] * 2
        assert [rank.poll() for rank in ranks] == [None, None]
        for _ in range(cuts):
            line.cut()
        assert [rank.wait(5) for rank in ranks] == [ENDED, ENDED]


def test_a_line_that_was_cut_before_ends_who_comes_late(tmp_path):
    Lifeline(tmp_path).cut()
    assert run(RANK, tmp_path).wait(5) == ENDED


def test_a_line_that_is_not_there_ends_the_process(tmp_path):
    assert run(RANK, tmp_path / "gone").wait(5) == ENDED


def test_the_holders_death_ends_the_rank(tmp_path):
    holder = run(HOLDER, tmp_path, textwrap.dedent(RANK))
    # The rank inherited nothing but the pipe to read from: its end shows as the end of the holder's output.
    holder.communicate(timeout=10)
    assert holder.returncode == -9
