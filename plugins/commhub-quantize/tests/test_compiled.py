"""Compiled passes give the numbers of tensor operations, and are ready before the first step."""

import copy
import os
from itertools import chain, product, repeat

import pytest
import torch
from commhub_quantize._coding import Coding, marks_of
from commhub_quantize._compiled import Passes, compiled_passes
from commhub_quantize._work import Kernels, kernels, work_on
from torch.profiler import ProfilerActivity, profile

import commhub

CODINGS = [
    *(Coding(bits=bits, row=256, symmetric=symmetric) for bits, symmetric in product((8, 4, 2), (True, False))),
    Coding(bits=8, row=16),
    Coding(bits=4, row=16, symmetric=False),
    Coding(bits=2, row=16),
    Coding(bits=2, row=48),
    Coding(bits=4, row=240, symmetric=False),
    Coding(bits=8, row=1040),
    Coding(bits=8, row=256, whole=True),
    Coding(bits=4, row=256, symmetric=False, whole=True),
    Coding(bits=4, row=256, stochastic=True),
    Coding(bits=8, row=64, symmetric=False, whole=True, stochastic=True),
]
FUSED = [CODINGS[3], CODINGS[0], CODINGS[5], CODINGS[-4], CODINGS[-2]]
"""Of each kind one, for a compiler that takes ten seconds of CPU each; without COMMHUB_EVERY_CHECK the first alone."""


@pytest.fixture
def compiling(monkeypatch):
    """Registrations compile, whatever the size."""
    monkeypatch.setenv("COMMHUB_COMPILE", "1")


def values_of(coding, dtype):
    """Rows of ordinary numbers, and of every kind that a rule treats on its own."""
    values = torch.randn(100, coding.row, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    values[4] *= torch.finfo(dtype).max / 1e3
    values[5] = values[5].abs()
    values[6] = -values[6].abs()
    values[7] = torch.finfo(dtype).tiny
    values[8, 1:] = 0
    values[9] = -0.0
    kinds = near_floor, near_zero_points, near_codes
    return torch.cat([values, *(kind(coding, dtype) for kind in kinds)])


def near_floor(coding, dtype):
    """Extents and scales around the smallest that counts."""
    floor = torch.finfo(dtype).tiny * 256
    below = torch.nextafter(torch.tensor(floor, dtype=dtype), torch.tensor(0, dtype=dtype)).item()
    factors = 1, coding.top, coding.half - 0.5, 2 * coding.half - 1
    extents = [factor * extent for factor, extent in product(factors, (below, floor))]
    return torch.linspace(-1, 1, coding.row, dtype=dtype) * torch.tensor(extents, dtype=dtype)[:, None]


def near_zero_points(coding, dtype):
    """Ranges whose zero point lies half-way between two codes."""
    rows = torch.zeros(4, coding.row, dtype=dtype)
    for k, row in enumerate(rows):
        row[0], row[1] = -(k + 0.5), 2 * coding.half - 1 - (k + 0.5)
    return rows


def near_codes(coding, dtype):
    """Numbers half-way between two codes, and next to that."""
    top = coding.top if coding.symmetric else 2 * coding.half - 1
    rows = []
    for scale in (1.0, 3.0, 0.1, 7.7):
        ties = (torch.arange(coding.row, dtype=dtype) % top + 0.5) * scale
        for row in (ties, torch.nextafter(ties, 2 * ties), torch.nextafter(ties, 0 * ties)):
            row[0] = top * scale
            rows += [row, -row]
    return torch.stack(rows)


def outputs(work, coding, values, *, keeping):
    values, marks = values.clone(), values.new_zeros(len(values), coding.marks)
    codes = torch.zeros(len(values), coding.row_bytes, dtype=torch.int8)
    noise = None
    if coding.stochastic:
        noise = torch.rand(values.shape, dtype=values.dtype, generator=torch.Generator().manual_seed(1))
        noise[::2] = 0
    extents = torch.zeros_like(marks)
    work.extents(values, extents)
    if coding.whole:  # two rows share each
        marks.copy_(marks_of(torch.maximum(extents, extents.roll(1, 0)), coding))
    work.encode(values, marks, codes, noise, keeping=keeping)
    out, total = torch.zeros_like(values), torch.ones_like(values)
    work.decode(codes, marks, out, adding=False)
    work.decode(codes, marks, total, adding=True)
    return {"extents": extents, "marks": marks, "codes": codes, "left": values, "values": out, "sum": total}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_every_number_is_that_of_tensor_operations(coding, dtype, compiling):
    passes = compiled_passes(coding, dtype, 0)
    values = values_of(coding, dtype)
    for keeping in (False, True):
        plain = outputs(kernels(coding), coding, values, keeping=keeping)
        compiled = outputs(passes, coding, values, keeping=keeping)
        for name, reference in plain.items():
            assert torch.equal(compiled[name], reference), name


@pytest.mark.parametrize("coding", FUSED if os.environ.get("COMMHUB_EVERY_CHECK") else FUSED[:1], ids=str)
def test_pytorchs_compiler_gives_them_too_and_allocates_no_more_than_a_twentieth(coding, compiling):
    """Which compiles for devices; its compiler for the host stands in."""
    values = values_of(coding, torch.float32)
    plain = outputs(kernels(coding), coding, values, keeping=True)
    fused = Kernels(coding)
    fused.warm(torch.zeros(1024, coding.row), 0, keeping=True)
    with torch.no_grad():
        made = outputs(fused, coding, values, keeping=True)
        marks, codes = made["marks"].clone(), made["codes"].clone()
        noise = torch.rand_like(values) if coding.stochastic else None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            fused.encode(values, marks, codes, noise, keeping=True)
            fused.decode(codes, marks, values, adding=False)
            fused.decode(codes, marks, values, adding=True)
    assert [fused._encode_keeping.compilations, fused._decode.compilations, fused._accumulate.compilations] == [1, 1, 1]
    assert max((event.cpu_memory_usage for event in seen.events()), default=0) <= 0.05 * values.nbytes
    for name, reference in plain.items():
        assert torch.equal(made[name], reference), name


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_and_no_other(coding, bad, compiling):
    values = torch.randn(9, coding.row, generator=torch.Generator().manual_seed(0))
    values[4, coding.row // 2 + 1] = bad
    for work in (kernels(coding), compiled_passes(coding, torch.float32, 0)):
        for keeping in (False, True):
            made = outputs(work, coding, values, keeping=keeping)
            spoiled = ~torch.isfinite(made["marks"]).all(1)
            assert spoiled.tolist() == [row == 4 or (coding.whole and row == 5) for row in range(9)]
            assert torch.equal(torch.isfinite(made["values"]).any(1), ~spoiled)
            if keeping:
                assert torch.equal(torch.isfinite(made["left"]).any(1), ~spoiled)


def test_threads_share_rows(compiling):
    coding, values = CODINGS[0], torch.randn(1000, 256)
    passes = compiled_passes(coding, torch.float32, 0)
    alone = outputs(passes, coding, values, keeping=True)
    torch.set_num_threads(2)
    shared = outputs(passes, coding, values, keeping=True)
    assert all(torch.equal(shared[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("values", torch.randn(10, 128)),
        ("values", torch.randn(10, 256, dtype=torch.float64)),
        ("values", torch.randn(256, 10).t()),
        ("marks", torch.zeros(10, 2)[:, :1]),
        ("codes", torch.zeros(10, 128, dtype=torch.int8)),
        ("codes", torch.zeros(10, 256, dtype=torch.uint8)),
        ("noise", torch.rand(10, 256, dtype=torch.float64)),
        ("noise", None),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, wrong, compiling):
    coding = Coding(bits=8, row=256, stochastic=True)
    passes = compiled_passes(coding, torch.float32, 0)
    given = {
        "values": torch.randn(10, 256),
        "marks": torch.zeros(10, 1),
        "codes": torch.zeros(10, 256, dtype=torch.int8),
        "noise": torch.rand(10, 256),
    }
    passes.encode(**given, keeping=False)
    with pytest.raises(ValueError, match=rf"{name} (is|are) .*(they must be|missing)"):
        passes.encode(**{**given, name: wrong}, keeping=False)


def test_noise_where_nothing_is_rounded_by_chance_is_refused(compiling):
    values, marks, codes = torch.randn(9, 256), torch.zeros(9, 1), torch.zeros(9, 256, dtype=torch.int8)
    with pytest.raises(ValueError, match="noise is given for"):
        compiled_passes(CODINGS[0], torch.float32, 0).encode(values, marks, codes, values, keeping=False)


def test_half_precision_has_no_passes(compiling):
    assert compiled_passes(CODINGS[0], torch.bfloat16, 0) is None


@pytest.mark.parametrize(
    "options", [{"error_feedback": True}, {"bits": 4, "symmetric": False, "stochastic_rounding": True}], ids=str
)
@pytest.mark.parametrize("name", ["quantize_per_channel", "quantize_per_tensor"])
def test_training_steps_give_the_same_numbers(name, options, monkeypatch):
    gradients = [[torch.randn(40, 70), torch.randn(64, 64), torch.randn(9)] for _ in range(3)]
    runs = []
    for compiling in "01":
        monkeypatch.setenv("COMMHUB_COMPILE", compiling)
        runs.append(commhub.simulate(name, gradients, steps=3, buckets=2, **options))
        codecs = set(runs[-1].hooks[0]._two_step._codecs.values())
        works = [work for codec in codecs for work in codec.work.values()]
        assert works
        assert all(isinstance(work, Passes) == (compiling == "1") for work in works)
    plain, compiled = runs
    for rank in range(3):
        assert all(map(torch.equal, compiled.gradients[rank], plain.gradients[rank]))
        for name in "012":
            mine, reference = (run.states[rank].local(name) for run in runs)
            assert mine.keys() == reference.keys()
            assert all(torch.equal(mine[key], reference[key]) for key in mine)


def test_nothing_is_compiled_in_a_step(compiling, monkeypatch):
    asked = []
    monkeypatch.setattr("commhub_quantize._compiled.cpp_library", lambda *_, **given: asked.append(given["elements"]))
    commhub.simulate("quantize_per_channel", [[torch.ones(64, 64)]] * 2, steps=3)
    assert asked == [4096, 4096]  # once per rank


def test_gradients_of_another_dtype_than_at_registration_are_worked_on_uncompiled(compiling):
    dtypes = chain([torch.float32], repeat(torch.float64))  # the first is for prepare
    made = commhub.simulate("quantize_per_channel", lambda *_: [torch.ones(64, 64, dtype=next(dtypes))], ranks=2)
    assert torch.equal(made.gradients[0][0], torch.ones(64, 64, dtype=torch.float64))


@pytest.mark.parametrize("coding", [CODINGS[0], CODINGS[-1]], ids=str)
@pytest.mark.parametrize("keeping", [False, True])
def test_for_a_device_everything_a_step_uses_is_compiled_at_registration(coding, keeping, monkeypatch):
    compiled, run = set(), set()
    monkeypatch.setattr(commhub.toolkit.Kernel, "warm", lambda kernel, *_, elements: compiled.add((kernel, elements)))
    monkeypatch.setattr(commhub.toolkit.Kernel, "__call__", lambda kernel, *_: run.add((kernel, 77)))
    work = work_on(coding, torch.float32, torch.device("meta"), 77, keeping=keeping)
    values, marks, codes = torch.zeros(9, coding.row), torch.zeros(9, coding.marks), torch.zeros(9, coding.row_bytes)
    if coding.whole:
        work.extents(values, marks)
    work.encode(values, marks, codes, values if coding.stochastic else None, keeping=keeping)
    for adding in (False, True):
        work.decode(codes, marks, values, adding=adding)
    assert run == compiled


def test_a_library_that_exports_nothing_counts_as_none(compiling, monkeypatch):
    monkeypatch.setattr("commhub_quantize._compiled.cpp_library", lambda *_, **__: object())
    assert compiled_passes(CODINGS[0], torch.float32, 0) is None


def test_a_prepared_hook_is_copied(compiling):
    gradients = [[torch.randn(40, 70)] for _ in range(2)]
    first = commhub.simulate("quantize_per_channel(bits=4)", gradients, steps=2)
    again = commhub.simulate(copy.deepcopy(first.hooks[0]), gradients, steps=2)
    assert torch.equal(first.gradients[0][0], again.gradients[0][0])
