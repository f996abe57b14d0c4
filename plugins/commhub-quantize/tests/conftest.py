"""One thread per test: on small tensors a second one only waits, and under load it waits long."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["0", "1"], ids=["plain", "compiled"])
def passes(request, monkeypatch):
    """Both ways of working on rows, whatever their number."""
    monkeypatch.setenv("COMMHUB_COMPILE", request.param)
