"""However a session ends, no process of the pool outlives it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

pytestmark = pytest.mark.filterwarnings("error")
ENDS = [("busy", signal.SIGKILL)]
if os.environ.get("COMMHUB_EVERY_CHECK"):  # each is a session that imports torch twice
    ENDS += [("busy", signal.SIGINT), ("busy", signal.SIGTERM), ("idle", signal.SIGINT)]

SCRIPT = """
import os, sys, time
from commhub.testing import RankPool

def helper_and_self():
    import subprocess
    return os.getpid(), subprocess.Popen(["sleep", "100"]).pid

def busy():
    print("busy", file=open(f"busy-{os.getpid()}", "w"))
    time.sleep(100)

if __name__ == "__main__":
    pool = RankPool()
    pids = [pid for pair in pool.run(helper_and_self, 2) for pid in pair]
    print(*pids, pool._server.pid, flush=True)
    pool.run(busy, 2) if sys.argv[1] == "busy" else time.sleep(100)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def wait_for_files(folder, pattern, count, seconds=60):
    deadline = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"there are not {count} {pattern}"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("state", "signum"), ENDS)
def test_a_session_that_is_ended_from_outside_leaves_no_process(tmp_path, state, signum):
    script = tmp_path / "session.py"
    script.write_text(SCRIPT)
    session = subprocess.Popen(
        [sys.executable, script, state],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with session:
        pids = [int(word) for word in session.stdout.readline().split()]
        assert len(pids) == 5  # two ranks, what each started, and the server
        assert all(map(alive, pids))
        if state == "busy":
            wait_for_files(tmp_path, "busy-*", 2)
        session.send_signal(signum)
    assert wait_until_gone(pids) == []


def sleep():
    time.sleep(100)


@pytest.fixture
def pool(ranks):
    """The session's, which starts a server again where one ended: importing torch in another takes seconds."""
    return ranks.pool


def test_an_interrupted_call_ends_its_ranks(pool):
    pids = pool.run(os.getpid, 2)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(sleep, 2)
    assert not any(map(alive, pids))
    assert len(pool.run(os.getpid, 2)) == 2


def test_the_servers_own_death_ends_the_ranks_and_the_next_call_starts_another(pool):
    pids = pool.run(os.getpid, 2)
    threading.Timer(0.5, os.kill, (pool._server.pid, signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match="the fork server ended"):
        pool.run(sleep, 2)
    assert wait_until_gone(pids) == []
    assert len(pool.run(os.getpid, 2)) == 2


def test_closing_the_pool_ends_its_processes_and_a_later_call_starts_new_ones(pool):
    pids = pool.run(os.getpid, 2)
    server = pool._server.pid
    assert all(map(alive, [*pids, server]))
    pool.close()
    assert not any(map(alive, [*pids, server]))
    assert pool.run(os.getpid, 1) != pids[:1]
