"""One thread per test: on small tensors a second one only waits, and under load it waits long."""

import pytest
import torch
from commhub_powersgd._on_device import OnDevice


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["0", "1"], ids=["plain", "compiled"])
def passes(request, monkeypatch):
    """Both ways of going over the matrices, whatever their size."""
    monkeypatch.setenv("COMMHUB_COMPILE", request.param)


@pytest.fixture(params=["plain", "compiled", "device"])
def every_way(request, monkeypatch):
    """Every way of going over the matrices; a device's works on the host as well."""
    monkeypatch.setenv("COMMHUB_COMPILE", str(int(request.param == "compiled")))
    if request.param == "device":
        monkeypatch.setattr("commhub_powersgd._iteration.products", lambda m, rank, _: OnDevice(m, rank))
