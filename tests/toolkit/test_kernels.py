"""Kernels: the same numbers compiled and not, and no compiling where nobody expects it."""

import logging

import pytest
import torch

from commhub.toolkit import Kernel
from commhub.toolkit._kernels import WORTH_COMPILING, wants_compiling


def halve(values, marks):
    marks.copy_(values.abs().amax(1, keepdim=True))
    values.mul_(0.5)


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")


def warmed(rows=64, width=48):
    kernel = Kernel(halve)
    kernel.warm(torch.zeros(rows, width), torch.zeros(rows, 1), elements=0)
    return kernel


def run(kernel, values):
    values = values.clone()
    marks = torch.zeros(len(values), 1)
    kernel(values, marks)
    return values, marks


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 300, 9000])
def test_blocks_change_nothing(rows):
    """9000 rows are several blocks."""
    values = torch.randn(rows, 48)
    halved, marks = run(Kernel(halve), values)
    assert torch.equal(halved, values / 2)
    assert torch.equal(marks, values.abs().amax(1, keepdim=True) if rows else marks)


def test_compiled_and_not_give_the_same_bits_and_any_number_of_rows_compiles_once(compiling, caplog):
    kernel, plain = warmed(), Kernel(halve)
    assert kernel.compilations == 1
    with caplog.at_level(logging.WARNING, "commhub"), torch.no_grad():
        memory = torch.randn(100_000)
        for rows, start in ((64, 0), (2, 0), (1, 3), (700, 5), (0, 0)):
            values = memory[start : start + rows * 48].view(rows, 48)  # views at odd addresses, as in a bucket
            for mine, reference in zip(run(kernel, values), run(plain, values), strict=True):
                assert torch.equal(mine, reference)
    assert kernel.compilations == 1
    assert "training step" not in caplog.text


def test_what_was_not_warmed_up_is_not_compiled(compiling):
    kernel = warmed()
    run(kernel, torch.randn(64, 32))
    values = torch.randn(64, 48, dtype=torch.float64)
    kernel(values, torch.zeros(64, 1, dtype=torch.float64))
    assert kernel.compilations == 1


def test_kernels_made_of_one_function_do_not_use_up_the_compilers_patience(compiling):
    """The compiler gives up on a code object after eight variants."""
    for width in range(16, 16 + 10):
        kernel = Kernel(halve)
        kernel.warm(torch.zeros(64, width), torch.zeros(64, 1), elements=0)
        assert kernel.compilations == 1


def test_the_environment_and_the_size_decide(monkeypatch):
    monkeypatch.delenv("COMMHUB_COMPILE", raising=False)
    assert wants_compiling(WORTH_COMPILING)
    assert not wants_compiling(WORTH_COMPILING - 1)
    monkeypatch.setenv("COMMHUB_COMPILE", "0")
    assert not wants_compiling(10 * WORTH_COMPILING)
    assert warmed().compilations == 0
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    assert wants_compiling(1)


def test_without_a_compiler_it_says_so_and_goes_on(compiling, caplog, monkeypatch):
    def broken(*_args):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(Kernel, "_compile", broken)
    with caplog.at_level(logging.WARNING, "commhub"):
        kernel = warmed()
    assert "halve runs uncompiled" in caplog.text
    assert "no compiler here" in caplog.text
    values = torch.randn(64, 48)
    assert torch.equal(run(kernel, values)[0], values / 2)


def test_compiling_in_a_step_would_be_told(compiling, caplog):
    kernel = warmed()
    kernel._traits.add(((torch.float64, "cpu", (48,)), (torch.float64, "cpu", (1,))))  # as if it had been warmed up
    with caplog.at_level(logging.WARNING, "commhub"), torch.no_grad():
        kernel(torch.randn(64, 48, dtype=torch.float64), torch.zeros(64, 1, dtype=torch.float64))
    assert "halve is compiled in a training step" in caplog.text
