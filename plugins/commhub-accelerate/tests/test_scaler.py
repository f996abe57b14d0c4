"""A loss scaler in Accelerate, on two real ranks on the CPU: steps that it skips, and runs that are resumed."""

import pytest

HOOKS = ("powersgd", "quantize")
SKIPPED = [False, False, False, True, False, False, True, False]
SCALES = [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0, 1024.0, 1024.0]


@pytest.mark.parametrize("hook", HOOKS)
def test_the_hook_is_given_accelerate_s_scaler(results, hook):
    assert [found[hook]["given"] for found in results("scaled")] == [True, True]


@pytest.mark.parametrize("hook", HOOKS)
def test_all_ranks_skip_a_step_in_which_one_has_gradients_that_are_not_finite(results, hook):
    for found in results("scaled"):
        told = found[hook]["told"]
        assert [step["skipped"] for step in told] == SKIPPED
        assert [step["stands"] for step in told] == SKIPPED
        assert [step["scale"] for step in told] == SCALES


@pytest.mark.parametrize("hook", HOOKS)
def test_what_the_hook_remembers_stays_finite_and_ranks_stay_equal(results, same, hook):
    first, second = results("scaled")
    assert first[hook]["finite"]
    assert second[hook]["finite"]
    for part in ("weights", "optimizer", "scaler"):
        assert same(first[hook][part], second[hook][part])
    assert first[hook]["hook"]["step"] == second[hook]["hook"]["step"] == len(SKIPPED)


@pytest.mark.parametrize("hook", HOOKS)
def test_load_state_in_new_processes_goes_on_as_if_nothing_had_been(results, same, hook):
    for before, after in zip(results("scaled"), results("scaled_resumed", "second"), strict=True):
        assert after[hook]["told"] == before[hook]["told"][-3:]
        for part in ("weights", "optimizer", "scaler", "hook"):
            assert same(before[hook][part], after[hook][part]), part


def test_optimizer_overlap_and_allreduce_end_where_accelerate_without_a_hook_does(results, same):
    for found in results("scaled_overlap"):
        for name in ("allreduce", "overlap"):
            assert found[name]["told"] == found["none"]["told"]
            assert same(found[name]["weights"], found["none"]["weights"])
        assert [step["skipped"] for step in found["none"]["told"]] == SKIPPED
