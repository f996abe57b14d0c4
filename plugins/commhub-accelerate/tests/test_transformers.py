"""The Trainer of Transformers with a hook, on two real ranks on the CPU."""

import pytest

HOOKS = ("powersgd", "quantize")


def test_allreduce_equals_the_trainer_without_a_hook_bit_for_bit(results, same):
    for bare, hooked in zip(results("trainer_plain"), results("trainer_allreduce"), strict=True):
        assert same(bare, hooked["weights"])


def test_the_hook_is_called_for_every_bucket_of_every_step(results):
    for found in results("trainer_allreduce"):
        assert found["before"] is None
        assert found["steps"] == 8
        assert found["buckets"] > 1
        by_step = [[index for at, index in found["calls"] if at == step] for step in range(found["steps"])]
        assert by_step == [[0], *[list(range(found["buckets"]))] * 7]  # DDP's first step has a single bucket


@pytest.mark.parametrize("hook", HOOKS)
def test_ranks_are_equal_bit_for_bit(results, same, hook):
    first, second = results("trainer_uninterrupted")
    assert same(first[hook]["weights"], second[hook]["weights"])


@pytest.mark.parametrize("hook", HOOKS)
def test_the_flight_recorder_has_seen_the_bytes_that_are_counted(results, hook):
    for found in results("trainer_uninterrupted"):
        counted, seen = found[hook]["sent"]
        assert seen == pytest.approx(counted, rel=1e-9)
        assert seen > 0


def test_accumulation_of_two_halves_the_steps_and_their_calls(results):
    for found in results("trainer_accumulation"):
        (micro, steps, calls, buckets), (same_micro, fewer, less, _) = found[1], found[2]
        assert (micro, same_micro) == (8, 8)
        assert (steps, fewer) == (8, 4)
        assert (calls, less) == (1 + 7 * buckets, 1 + 3 * buckets)


@pytest.mark.parametrize("place", ["there", "elsewhere"])
@pytest.mark.parametrize("hook", HOOKS)
def test_resuming_in_new_processes_goes_on_as_if_nothing_had_been(results, same, hook, place):
    for before, after in zip(results("trainer_uninterrupted"), results("trainer_resumed", "second"), strict=True):
        assert same(before[hook]["state"], after[hook, place]["state"])
        assert same(before[hook]["weights"], after[hook, place]["weights"])


def test_old_checkpoints_are_pruned_with_their_hook_state(results):
    for found in results("trainer_uninterrupted"):
        assert found["powersgd"]["folders"] == ["checkpoint-6", "checkpoint-8"]


def test_a_lora_model_of_peft_resumes_as_if_nothing_had_been(results, same):
    for before, after in zip(results("trainer_lora"), results("trainer_lora_resumed", "second"), strict=True):
        assert all("lora" in name or "classifier" in name for name in before["weights"])
        assert same(before, after)


def test_optimizer_overlap_ends_where_allreduce_does_once_nothing_is_clipped(results, same):
    for found in results("trainer_overlap"):
        assert same(found["allreduce"], found["optimizer_overlap"])


def test_a_compiled_model_trains_with_the_hook(results, same):
    first, second = results("trainer_compiled")
    assert same(first[0], second[0])
    assert first[1:] == second[1:] == ("OptimizedModule", 2)


def test_a_second_train_goes_on_and_a_new_model_gets_a_hook_of_its_own(results):
    assert results("trainer_twice") == [(True, 4, False, 2)] * 2


def test_an_optimizer_of_some_parameters_makes_no_difference_to_resuming(results):
    assert results("trainer_partial") == [[4, 4]] * 2


def test_a_new_accelerator_gets_the_hook_too(results):
    assert results("trainer_new_accelerator") == [2, 2]


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("name", "UnknownHookError", "Did you mean 'quantize_per_tensor'?"),
        ("early", "RegistrationError", "max_grad_norm=1.0"),
        ("early zero", "RegistrationError", "zero_overlap steps the optimizer in backward"),
        ("scaler", "HookOptionError", "scaler= is not given here"),
        ("no trainer", "RegistrationError", "BertForSequenceClassification is no transformers.Trainer"),
        ("twice", "RegistrationError", "has a hook already"),
        ("evaluated", "RegistrationError", "before evaluating"),
        ("evaluated first", "RegistrationError", "every rank would train alone"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(results, case, kind, text):
    for found in results("trainer_refusals"):
        assert found[case][:2] == (kind, True)
        assert text in found[case][2]


def test_a_refusal_leaves_no_trace(results):
    for found in results("trainer_refusals"):
        assert found["untouched"] == []


def test_one_process_trains_resumes_and_says_once_that_there_is_nothing_to_communicate(results):
    ((said, registration),) = results("trainer_alone", "single", ranks=1)
    assert said.count("nothing to communicate") == 1
    assert registration is None


def test_the_core_finds_the_registration_and_says_which_call_serves_a_trainer(results):
    for found in results("trainer_found_by_the_core"):
        same, told = found
        assert same
        assert all("commhub_accelerate.transformers.attach(trainer, hook)" in told[case] for case in told)
        assert sorted(told) == ["bert", "lora", "trainer"]
