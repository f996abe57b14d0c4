"""Accelerate with a hook, on two real ranks on the CPU."""

import pytest

HOOKS = ("powersgd", "quantize")


def test_allreduce_equals_accelerate_without_a_hook_bit_for_bit(results, same):
    for bare, hooked in zip(results("plain"), results("allreduce"), strict=True):
        assert same(bare, hooked["weights"])


def test_the_hook_is_called_for_every_bucket_of_every_step(results):
    for found in results("allreduce"):
        assert found["steps"] == 8
        assert found["buckets"] > 1
        by_step = [[index for at, index in found["calls"] if at == step] for step in range(found["steps"])]
        assert by_step == [[0], *[list(range(found["buckets"]))] * 7]  # DDP's first step has a single bucket


@pytest.mark.parametrize("hook", HOOKS)
def test_ranks_are_equal_bit_for_bit(results, same, hook):
    first, second = results("uninterrupted")
    assert same(first[hook]["weights"], second[hook]["weights"])


@pytest.mark.parametrize("hook", HOOKS)
def test_the_flight_recorder_has_seen_the_bytes_that_are_counted(results, hook):
    for found in results("uninterrupted"):
        counted, seen = found[hook]["sent"]
        assert seen == pytest.approx(counted, rel=1e-9)
        assert seen > 0


def test_accumulation_of_two_halves_the_steps_and_their_calls(results):
    for found in results("accumulation"):
        (steps, calls, buckets), (fewer, less, _) = found[1], found[2]
        assert (steps, fewer) == (8, 4)
        assert (calls, less) == (1 + 7 * buckets, 1 + 3 * buckets)


@pytest.mark.parametrize("hook", HOOKS)
def test_load_state_in_new_processes_goes_on_as_if_nothing_had_been(results, same, hook):
    """With automatic names: the last checkpoint is taken, and the oldest was pruned."""
    for before, after in zip(results("uninterrupted"), results("resumed", "second"), strict=True):
        assert after[hook]["from"] == 4
        assert same(before[hook]["state"], after[hook]["state"])
        assert same(before[hook]["weights"], after[hook]["weights"])
    kept = sorted(path.name for path in (results.folder / hook / "checkpoints").iterdir())
    assert kept == ["checkpoint_1", "checkpoint_2"]


def test_what_is_resumed_is_more_than_nothing(results, same):
    """The residuals that a checkpoint carries differ between ranks and are not zero."""
    first, second = (found["powersgd"]["state"] for found in results("uninterrupted"))
    assert first.keys() == second.keys() or first["step"] == second["step"] == 8
    assert not same(first, second)


def test_a_checkpoint_without_hook_state_loads_with_a_warning_on_one_rank(results):
    (said, _), (silent, _) = results("without_state")
    assert "the checkpoint has no state of a hook" in said
    assert silent == ""


def test_a_checkpoint_of_another_hook_is_an_error_that_says_how_to_go_on(results):
    for _, error in results("without_state"):
        assert "was saved by powersgd" in error
        assert error.endswith("checkpoint_2/commhub.")


def test_load_state_before_prepare_says_that_the_hook_s_state_is_not_restored(results):
    (said, bare, afterwards), silent = results("loaded_too_early")
    assert "Call load_state() after prepare()" in said
    assert "early/commhub" in said
    assert bare == ""
    assert afterwards == ""
    assert silent == ["", "", ""]


def test_clipping_after_overlapped_steps_is_an_error_and_not_a_wrong_number(results):
    for kind, text in results("clipped_overlap"):
        assert kind == "RegistrationError"
        assert "gradient" in text


def test_each_model_has_a_hook_with_its_own_optimizers_and_its_own_state(results, same):
    first, second = results("two_models")
    for number in (0, 1):
        assert same(first["averaged"][number], second["averaged"][number])
        assert not same(first["apart"][number], second["apart"][number])
    assert first["steps"] == first["again"] == [6, 4]
    assert first["folders"] == ["commhub", "commhub_1"]


def test_models_and_optimizers_may_be_prepared_apart(results, same):
    first, second = results("one_after_the_other")
    for found in (first, second):
        assert (found["model alone"], found["half"], found["all"]) == (0, 0, 1)
    assert same(first["averaged"], second["averaged"])


def test_a_model_whose_optimizer_is_not_prepared_gets_its_hook_in_the_first_training_forward(results):
    for found in results("one_after_the_other"):
        assert (found["evaluated"], found["trained"]) == (0, [2])


def test_preparing_twice_changes_nothing_and_a_new_optimizer_is_passed_on(results):
    found, silent = results("again")
    assert found["twice"]
    same, said = found["new optimizer"]
    assert not same
    assert "the hook starts afresh" in said
    assert silent["new optimizer"] == (False, "")


def test_freed_memory_is_free_and_what_is_prepared_afterwards_gets_a_hook(results):
    for found in results("again"):
        assert found["gone"] == [True, True]
        assert found["none left"] == ()
        assert found["other"] == [2]


def test_detaching_leaves_the_accelerator_as_it_was(results):
    for found in results("again"):
        assert found["detached"] == []


@pytest.mark.parametrize(("how", "kind"), [("whole", "OptimizedModule"), ("regional", "DistributedDataParallel")])
def test_a_compiled_model_trains_as_without_a_hook(results, same, how, kind):
    for found in results("compiled"):
        bare, hooked, made, steps = found[how]
        assert same(bare, hooked)
        assert (made, steps) == (kind, [4])


def test_a_compiled_model_whose_optimizer_is_not_prepared_gets_its_hook(results):
    assert results("compiled_and_late") == [[3], [3]]


def test_optimizer_overlap_ends_where_allreduce_does(results, same):
    for bare, overlapped in zip(results("plain"), results("overlap"), strict=True):
        assert same(bare, overlapped)


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("name", "UnknownHookError", "Did you mean 'powersgd'?"),
        ("option", "HookOptionError", "Did you mean 'rank'?"),
        ("value", "HookOptionError", "rank is 0; it must be at least 1"),
        ("wire", "HookOptionError", "wire is 'int3'"),
        ("optimizer", "HookOptionError", "optimizer= is not given here"),
        ("no accelerator", "RegistrationError", "Net is no accelerate.Accelerator"),
        ("twice", "RegistrationError", "has a hook already"),
        ("prepared", "RegistrationError", "Call attach() before prepare()"),
        ("kwargs fp16", "RegistrationError", "comm_hook='fp16'"),
        ("kwargs bf16", "RegistrationError", "comm_hook='bf16'"),
        ("evaluated", "RegistrationError", "every rank would train alone"),
        ("one object", "RegistrationError", "Mean"),
        ("one object, later", "RegistrationError", "Mean"),
        ("ranks apart", "RegistrationError", "Accelerator(cpu=True)"),
        ("FSDP", "RegistrationError", "shards the model with FSDP"),
        ("DEEPSPEED", "RegistrationError", "hands the model to DeepSpeed"),
        ("MEGATRON_LM", "RegistrationError", "hands the model to Megatron-LM"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(results, case, kind, text):
    for found in results("refusals"):
        assert found[case][:2] == (kind, True)
        assert text in found[case][2]


def test_a_refusal_leaves_no_trace(results):
    for found in results("refusals"):
        assert found["untouched"] == []


def test_one_process_trains_and_says_once_that_there_is_nothing_to_communicate(results):
    ((said, registrations),) = results("alone", "single", ranks=1)
    assert said.count("nothing to communicate") == 1
    assert registrations == ()


def test_the_core_finds_the_registration_and_says_which_call_serves_an_accelerator(results):
    for found in results("found_by_the_core"):
        same, told = found
        assert same
        assert "commhub_accelerate.attach(accelerator, hook)" in told
