"""Compiled kernels give the codes of uncompiled ones, and are ready before the first step."""

import pytest
import torch
from commhub_quantize._coding import Coding, coder, inverse_of, marks_of

import commhub

CODINGS = [
    Coding(bits=8, row=256),
    Coding(bits=8, row=64, symmetric=False),
    Coding(bits=4, row=256),
    Coding(bits=2, row=256, symmetric=False),
    Coding(bits=8, row=256, whole=True),
    Coding(bits=4, row=256, stochastic=True),
]


def outputs(coding, values, keeping):
    kernels, rows = coder(coding), len(values)
    values, marks = values.clone(), torch.zeros(rows, coding.marks)
    codes = torch.zeros(rows, coding.row_bytes, dtype=torch.int8)
    noise = (torch.rand(values.shape, generator=torch.Generator().manual_seed(1)),) if coding.stochastic else ()
    out, total = torch.zeros_like(values), torch.ones_like(values)
    inverses = torch.zeros(rows, 1)
    if coding.whole:
        kernels.extents(values, marks)
        marks.copy_(marks_of(marks, coding))
        inverses.copy_(inverse_of(marks))
    else:
        kernels.measure(values, marks, inverses)
    (kernels.encode_keeping if keeping else kernels.encode)(values, marks, inverses, codes, *noise)
    kernels.decode(codes, marks, out)
    kernels.accumulate(codes, marks, total)
    return values, marks, codes, out, total


@pytest.mark.parametrize(("coding", "keeping"), [*((coding, True) for coding in CODINGS), (CODINGS[0], False)], ids=str)
def test_codes_are_the_same_bit_by_bit(coding, keeping, monkeypatch):
    values = torch.randn(500, coding.row, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    values[4] *= 1e-37
    values[5] *= 1e30
    coder.cache_clear()
    monkeypatch.setenv("COMMHUB_COMPILE", "0")
    with torch.no_grad():
        plain = outputs(coding, values, keeping)
        monkeypatch.setenv("COMMHUB_COMPILE", "1")
        coder(coding).warm(torch.float32, values.device, 0, keeping=keeping)
        compiled = outputs(coding, values, keeping)
    made = [getattr(coder(coding), name).compilations for name in ("decode", "accumulate")]
    coder.cache_clear()
    assert made == [1, 1]
    for mine, reference in zip(compiled, plain, strict=True):
        assert torch.equal(mine, reference)


def test_a_step_compiles_nothing_more(monkeypatch, caplog):
    coder.cache_clear()
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    gradients = [[torch.randn(40, 70), torch.randn(64, 64), torch.randn(9)] for _ in range(3)]
    compiled = commhub.simulate("quantize_per_channel", gradients, steps=3, buckets=2, error_feedback=True)
    kernels = coder(Coding(bits=8, row=256))
    assert [kernels.encode_keeping.compilations, kernels.decode.compilations] == [1, 1]
    assert "training step" not in caplog.text
    coder.cache_clear()
    monkeypatch.setenv("COMMHUB_COMPILE", "0")
    plain = commhub.simulate("quantize_per_channel", gradients, steps=3, buckets=2, error_feedback=True)
    for mine, reference in zip(compiled.gradients[0], plain.gradients[0], strict=True):
        assert torch.equal(mine, reference)
