"""Hosts of network namespaces: they reach each other at their links' speed, and end with whatever made them."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from commhub.bench._hosts import INTERFACE, Hosts, NoHostsError
from commhub.drivers._network import Network

SENDER = """
    import socket, sys, time
    address, size, host = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if host == "1":
        with socket.create_server((address, 5000)) as server:
            print("listens", flush=True)
            connection, _ = server.accept()
            with connection:
                while size > 0:
                    size -= len(connection.recv(1 << 20))
                connection.sendall(b"x")
    else:
        with socket.create_connection((address, 5000), timeout=30) as connection:
            began = time.perf_counter()
            connection.sendall(bytes(size))
            connection.recv(1)
            print(time.perf_counter() - began)
"""
HOLDER = """
    import os, signal, sys
    from commhub.bench._hosts import Hosts
    with Hosts(3) as hosts:
        print(*(holder.pid for holder in hosts._holders), flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""


def own_namespaces():
    """The network namespaces that children of this process are in."""
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        found |= {os.readlink(f"/proc/{pid}/ns/net") for pid in children.read_text().split()}
    return found


def seconds(hosts, size):
    """How long so many bytes take from the first host to the second."""
    code = textwrap.dedent(SENDER)
    words = [hosts.addresses[1], str(size)]
    listens = subprocess.Popen(hosts.command(1, sys.executable, "-c", code, *words, "1"), stdout=subprocess.PIPE)
    with listens:
        assert listens.stdout.readline() == b"listens\n"
        sends = hosts.command(0, sys.executable, "-c", code, *words, "0")
        return float(subprocess.run(sends, capture_output=True, check=True, timeout=60).stdout)


def test_a_shaped_link_takes_its_time(hosts_can_be_made):
    with Hosts(3, Network(bandwidth=80e6)) as hosts:
        assert seconds(hosts, 4_000_000) > 0.4
    with Hosts(2) as hosts:
        assert seconds(hosts, 4_000_000) < 0.4  # that one was the link's, not the machine's


def test_a_host_has_its_own_link_and_loopback_alone(hosts_can_be_made):
    with Hosts(2) as hosts:
        for host, address in enumerate(hosts.addresses):
            shown = subprocess.run(hosts.command(host, "ip", "-br", "addr"), capture_output=True, check=True, text=True)
            assert [line.split()[0].partition("@")[0] for line in shown.stdout.splitlines()] == ["lo", INTERFACE]
            assert f"{address}/16" in shown.stdout


@pytest.mark.parametrize("how", ["SIGKILL", *(["SIGTERM", "SIGINT"] if os.environ.get("COMMHUB_EVERY_CHECK") else [])])
def test_whatever_ends_the_process_ends_the_hosts(hosts_can_be_made, how):
    holder = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOLDER), how], capture_output=True, text=True, timeout=60
    )
    pids = holder.stdout.split()
    assert len(pids) == 4
    for pid in pids:
        waited = subprocess.run(["timeout", "10", "tail", f"--pid={pid}", "-f", "/dev/null"])
        assert waited.returncode == 0  # and a namespace is there for as long as its holder is


def test_the_hosts_end_with_their_context_and_others_stay(hosts_can_be_made):
    with Hosts(1) as others:
        before = own_namespaces()
        with Hosts(2):
            assert len(own_namespaces()) == len(before) + 3
        assert own_namespaces() == before
        subprocess.run(others.command(0, "ip", "link", "show", INTERFACE), check=True, capture_output=True)


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(NoHostsError, match="there is no tc here"):
        Hosts(2).__enter__()


def test_what_the_kernel_refuses_is_the_reason_and_nothing_is_left(hosts_can_be_made):
    before = own_namespaces()
    with pytest.raises(NoHostsError, match=r"tc qdisc add .* tbf rate 0bit"):
        Hosts(2, Network(bandwidth=0.1)).__enter__()
    assert own_namespaces() == before


@pytest.mark.skipif(os.getuid() != 0, reason="to become somebody else takes root")
def test_who_is_not_root_makes_them_in_a_namespace_of_users(hosts_can_be_made):
    code = "from commhub.bench._hosts import Hosts\nwith Hosts(2) as hosts: print(hosts._user)"
    path = os.pathsep.join(filter(None, sys.path))
    somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*somebody, "unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("this kernel keeps namespaces of users to root")
    done = subprocess.run(
        [*somebody, sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "['--user', '--preserve-credentials']\n", done.stderr


class Kernel:
    """Stands in for one that can delay packets: takes down what it is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, _place, *words):
        self.asked.append(" ".join(words))


@pytest.mark.parametrize("bandwidth", [None, 1e8])
def test_a_kernel_that_can_delay_packets_does(monkeypatch, bandwidth):
    hosts, kernel = Hosts(1, Network(bandwidth, 0.002)), Kernel()
    monkeypatch.setattr(hosts, "_on", kernel)
    hosts._shape(0)
    first, *rest = [line for line in kernel.asked if line.startswith("tc ")]
    assert first == "tc qdisc add dev eth0 root handle 1: netem delay 2000us limit 100000"
    assert [line.partition(" tbf ")[0] for line in rest] == ["tc qdisc add dev eth0 parent 1:1"] * (
        bandwidth is not None
    )
    assert hosts.is_delayed
