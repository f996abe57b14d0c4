"""``attach(..., schedule={...})`` for an accelerator and for a Trainer, on two real ranks on the CPU."""

import pytest


@pytest.mark.parametrize("prefix", ["", "trainer_"])
@pytest.mark.parametrize("saved", [1, 4, 7])
def test_a_run_is_resumed_with_the_hook_that_its_schedule_had_reached(results, same, prefix, saved):
    befores, afters = results(f"{prefix}scheduled"), results(f"{prefix}scheduled_resumed", "second")
    for before, after in zip(befores, afters, strict=True):
        assert before["hook"] == after[saved]["hook"] == "quantize_per_tensor"
        assert same(before["weights"], after[saved]["weights"])
        assert same(before["state"], after[saved]["state"])
        assert before["state"]["step"] == 8


@pytest.mark.parametrize("kind", ["a", "t"])
@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("text", "HookOptionError", "schedule is 'fp16'; give a dict of hooks by step"),
        ("value", "HookOptionError", "at least 1"),
        ("name", "UnknownHookError", "fp61"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_attach(results, kind, case, error, text):
    for found in results("schedule_refusals"):
        assert found[f"{kind} {case}"][:2] == (error, True)
        assert text in found[f"{kind} {case}"][2]
        assert found["untouched"] == []


def test_a_hook_that_steps_the_optimizer_is_refused_where_it_follows_too(results):
    for found in results("schedule_refusals"):
        error, _, text = found["t early"]
        assert error == "RegistrationError"
        assert "optimizer_overlap steps the optimizer in backward" in text
        assert "max_grad_norm=1.0" in text
