"""C++ of a plugin's own: compiled where that is wanted and possible, and otherwise said."""

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from commhub.toolkit import cpp_library
from commhub.toolkit._kernels import WORTH_COMPILING

SOURCE = 'extern "C" int twice(int x) { return 2 * x; }'


def test_its_functions_can_be_called(monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    assert cpp_library(SOURCE, name="twice", elements=1).twice(21) == 42


@pytest.mark.parametrize(
    ("wanted", "elements", "made"),
    [(None, WORTH_COMPILING, True), (None, WORTH_COMPILING - 1, False), ("0", 1 << 40, False), ("1", 1, True)],
)
def test_the_environment_and_the_size_decide(wanted, elements, made, monkeypatch):
    if wanted is None:
        monkeypatch.delenv("COMMHUB_COMPILE", raising=False)
    else:
        monkeypatch.setenv("COMMHUB_COMPILE", wanted)
    assert (cpp_library(SOURCE, name="twice", elements=elements) is not None) == made


@pytest.mark.parametrize("source", ["this is no C++", '#include "no/such/header.h"'])
def test_what_cannot_be_compiled_is_told_in_one_line(source, monkeypatch, caplog):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    with caplog.at_level(logging.WARNING, "commhub"):
        assert cpp_library(source, name="nonsense", elements=1) is None
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("nonsense runs uncompiled: ")
    assert "\n" not in caplog.messages[0]


def test_without_a_compiler_it_says_so(tmp_path):
    """In a process of its own: PyTorch remembers that it found no compiler."""
    script = f"""
        import torch._inductor.config
        from commhub.toolkit import cpp_library
        torch._inductor.config.cpp.cxx = ("no-such-compiler",)
        print(cpp_library({SOURCE!r}, name="twice", elements=1))
    """
    environment = os.environ | {"COMMHUB_COMPILE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert "twice runs uncompiled: " in done.stderr
