"""Fits of the real packages, on two real ranks: what a user relies on, judged by the files that the ranks wrote."""

from importlib import util

import pytest
import torch

LIGHTNING = "lightning"
pytestmark = pytest.mark.skipif(util.find_spec(LIGHTNING) is None, reason="lightning is not installed here")


@pytest.fixture
def first(stories):
    return stories.scenes(LIGHTNING, "first")[0]


@pytest.fixture
def second(stories):
    return stories.scenes(LIGHTNING, "second")[0]


@pytest.fixture
def alone(stories):
    return stories.scenes(LIGHTNING, "alone", ranks=1)[0]


@pytest.fixture
def folder(stories, first):
    return stories.folder / LIGHTNING


@pytest.mark.parametrize("story", ["first", "second"])
def test_ranks_end_with_the_same_parameters_bit_by_bit(stories, story):
    one, other = stories.scenes(LIGHTNING, story)
    assert len(one) > 8
    assert [scene["failed"] for scene in one.values() if "failed" in scene] == []
    assert {name: scene.get("bits") for name, scene in one.items()} == {n: s.get("bits") for n, s in other.items()}


@pytest.mark.parametrize("way", ["allreduce", "allreduce_callback", "manual", "overlapped"])
def test_allreduce_and_overlapped_steps_equal_lightning_without_a_hook_bit_by_bit(first, way):
    assert first[way]["bits"] == first["plain"]["bits"]
    assert first[way]["hook"] == ("optimizer_overlap" if way == "overlapped" else "allreduce")


@pytest.mark.parametrize("way", ["allreduce", "allreduce_callback"])
def test_the_hook_is_called_for_each_bucket_of_each_step(first, way):
    scene = first[way]
    assert (scene["stats_steps"], len(scene["buckets"]), max(scene["buckets"])) == (8, 8, 3)
    assert scene["asked"] == sum(scene["buckets"])


@pytest.mark.parametrize("way", ["allreduce", "allreduce_callback", "accumulated", "an_object", "named"])
def test_the_flight_recorder_has_seen_the_bytes_that_are_counted(first, way):
    assert first[way]["recorded"] == pytest.approx(first[way]["sent"], rel=1e-9)
    assert first[way]["recorded"] > 0


def test_accumulating_two_batches_halves_the_calls_and_changes_no_number(first):
    scene = first["accumulated"]
    assert (scene["stats_steps"], len(scene["buckets"])) == (4, 4)
    assert scene["asked"] == sum(scene["buckets"])
    assert scene["sent"] == first["allreduce"]["sent"] / 2
    assert scene["bits"] == first["accumulated_plain"]["bits"]


def test_an_averager_is_given_the_optimizers_and_lets_ranks_meet(stories):
    one, other = (rank["local_steps"] for rank in stories.scenes(LIGHTNING, "first"))
    assert one["bits"] == other["bits"] != stories.scenes(LIGHTNING, "first")[0]["plain"]["bits"]
    assert one["sent"] < 7 * stories.scenes(LIGHTNING, "first")[0]["allreduce"]["sent"] / 8


def test_an_averager_s_state_is_saved_after_the_fit(folder):
    found = torch.load(folder / "local.ckpt", weights_only=True)["commhub"]["ranks"]
    assert [one["step"] for one in found] == [7, 7]


def test_the_hook_is_given_the_loss_scaler_and_the_optimizers_themselves(first):
    assert (first["scaled"]["scaler"], first["scaled"]["optimizers"]) == (True, [True])
    assert first["scaled"]["step"] == first["scaled"]["global_step"] == 8


def test_a_name_and_an_object_register_the_same_hook(first):
    assert first["named"]["hook"] == first["an_object"]["hook"] == "fp16"
    assert first["named"]["bits"] == first["an_object"]["bits"]


@pytest.mark.parametrize("way", ["moved", "last", "afterwards", "callback"])
def test_powersgd_resumes_bit_by_bit_in_new_processes(first, second, way):
    resumed = second[f"powersgd_{way}"]
    assert resumed["bits"] == first["powersgd"]["bits"]
    assert (resumed["step"], resumed["stats_steps"], resumed["warnings"]) == (8, 4, [])


def test_quantize_with_error_feedback_resumes_bit_by_bit_from_a_link(first, second, folder):
    assert (folder / "link" / "last.ckpt").is_symlink()
    resumed = second["quantize_link"]
    assert resumed["bits"] == first["quantize"]["bits"]
    assert (resumed["step"], resumed["stats_steps"]) == (8, 4)


def test_without_the_state_a_run_goes_on_differently_and_says_so(first, second):
    assert second["anew"]["bits"] != first["powersgd"]["bits"]
    assert (second["anew"]["step"], second["anew"]["warnings"]) == (4, [])
    [warning] = second["stateless"]["warnings"]
    assert "holds no hook state" in warning
    assert second["stateless"]["step"] == 4


def test_only_rank_0_warns(stories):
    assert stories.scenes(LIGHTNING, "second")[1]["stateless"]["warnings"] == []


def test_the_state_of_another_hook_is_refused_with_the_way_on(second):
    assert second["other_hook"]["error"] == "CheckpointError"
    assert "saved by powersgd_rank2" in second["other_hook"]["text"]
    assert "CommHubDDPStrategy(load_state=False)" in second["other_hook"]["text"]


def test_without_commhub_the_checkpoint_loads_as_ever(second):
    assert second["other_trainer"]["global_step"] == 8


def test_a_checkpoint_is_plain_data_and_holds_every_rank(folder):
    found = torch.load(folder / "half" / "afterwards.ckpt", weights_only=True)["commhub"]["ranks"]
    assert [list(one["local"]) for one in found] == [["rank0"], ["rank1"]]
    assert [one["step"] for one in found] == [4, 4]
    residuals = [table for one in found for table in next(iter(one["local"].values())).values()]
    assert len(residuals) == 6
    assert all(tensor.abs().sum() > 0 for table in residuals for tensor in table.values())


def test_what_ranks_have_alike_is_held_once(folder):
    one, other = torch.load(folder / "half" / "last.ckpt", weights_only=True)["commhub"]["ranks"]
    for name, table in one["shared"].items():
        for key, tensor in table.items():
            assert tensor.data_ptr() == other["shared"][name][key].data_ptr()
    assert one["shared"]


@pytest.mark.parametrize("file", ["half/weights.ckpt", "unsaved/epoch=0.ckpt", "plain/epoch=0.ckpt"])
def test_a_checkpoint_of_weights_or_without_a_wish_for_it_has_no_state(folder, second, file):
    assert "commhub" not in torch.load(folder / file, weights_only=True)


def test_pruning_leaves_nothing_behind(folder):
    left = sorted((folder / "pruned").iterdir())
    assert len(left) == 2
    assert all("commhub" in torch.load(path, weights_only=True) for path in left)
    assert sorted(path.name for path in (folder / "half").iterdir()) == [
        "afterwards.ckpt",
        "epoch=0.ckpt",
        "last.ckpt",
        "weights.ckpt",
    ]


def test_a_search_for_a_learning_rate_leaves_no_trace_in_the_hook(first):
    assert first["searched"]["step"] == first["searched"]["global_step"] == 8
    assert first["searched"]["bits"] == first["powersgd"]["bits"]


def test_states_travel_whole_and_one_that_fails_fails_everywhere(stories):
    one, other = (rank["gathered"] for rank in stories.scenes(LIGHTNING, "first"))
    assert (one["sums"], one["shared"], other["sums"]) == ([499500, 500500], True, None)
    assert (one["error"], other["error"]) == ("CheckpointError", "CheckpointError")
    assert one["text"] == "the hook's state on rank 1 cannot be saved."
    assert other["text"] == "the hook's state on rank 1 cannot be saved: the disk is gone"


def test_another_fit_of_the_same_trainer_registers_anew(first):
    assert first["twice"] == {"another": True, "step": 0}


def test_a_run_is_resumed_with_the_hook_that_its_schedule_had_reached(first):
    scene = first["scheduled"]
    assert (scene["half"], scene["hook"], scene["step"]) == ("powersgd_rank2(start_step=0)", "fp16", 8)
    assert scene["bits"] == scene["whole"]


@pytest.mark.parametrize(
    ("scene", "told"),
    [
        ("clipped", r"optimizer_overlap steps the optimizer within backward, before Trainer(gradient_clip_val=1.0)"),
        ("clipped_callback", r"optimizer_overlap steps the optimizer within backward"),
        ("clipped_later", r"optimizer_overlap steps the optimizer within backward"),
        ("both", "CommHubCallback and a commhub strategy"),
        ("two_callbacks", "several CommHubCallbacks"),
        ("foreign_hook", "DDPStrategy has ddp_comm_hook="),
    ],
)
def test_what_cannot_work_is_refused_before_training(first, scene, told):
    assert first[scene]["error"] == "RegistrationError"
    assert told in first[scene]["text"]


def test_clipping_that_a_module_does_itself_is_told_in_training(first):
    assert first["clipped_by_module"]["error"] is not None
    assert "gradient" in first["clipped_by_module"]["text"]


def test_a_hook_that_averages_gradients_goes_with_clipping(first):
    assert first["clipped_compressed"]["hook"] == "fp16"
    assert first["clipped_compressed"]["bits"] != first["named"]["bits"]


def test_on_an_exception_of_all_ranks_the_checkpoint_has_their_state(folder, first):
    assert first["interrupted_everywhere"]["raised"]
    found = torch.load(folder / "interrupted" / "ranks2.ckpt", weights_only=True)
    assert [one["step"] for one in found["commhub"]["ranks"]] == [5, 5]


def test_on_an_exception_of_one_rank_the_checkpoint_is_written_without_state(folder, second):
    assert second
    found = torch.load(folder / "interrupted" / "ranks1.ckpt", weights_only=True)
    assert found["global_step"] == 5
    assert "commhub" not in found


def test_one_process_trains_and_says_that_there_is_nothing_to_communicate(alone):
    [warning] = alone["one_process"]["warnings"]
    assert "one process" in warning
    assert "nothing to communicate" in warning
    assert (alone["one_process"]["global_step"], alone["one_process"]["sent"]) == (8, 0.0)


def test_two_ranks_state_loads_on_one(alone):
    assert (alone["one_process"]["step"], alone["one_process"]["stats_steps"]) == (8, 4)


def test_a_single_device_is_left_alone_with_a_warning(alone):
    [warning] = alone["single_device"]["warnings"]
    assert "nothing to communicate" in warning
    assert alone["single_device"]["global_step"] == 8


def test_a_sharded_strategy_is_refused_with_the_reason(alone):
    assert alone["sharded"]["error"] == "RegistrationError"
    assert "FSDP shards the model" in alone["sharded"]["text"]


@pytest.mark.skipif(util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed here")
def test_the_other_package_trains_and_resumes_bit_by_bit(stories):
    one, other = stories.scenes("pytorch_lightning", "smoke")
    assert one == other
    assert one["smoke_resumed"]["bits"] == one["smoke"]["bits"]
    assert (one["smoke_resumed"]["step"], one["smoke_resumed"]["stats_steps"]) == (8, 4)
    assert one["smoke_named"]["hook"] == "fp16"


@pytest.mark.parametrize(("package", "story"), [("lightning", "first"), ("pytorch_lightning", "smoke")])
def test_in_training_the_core_finds_the_registration_on_trainer_and_module(stories, package, story):
    if util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")
    for rank in stories.scenes(package, story):
        assert rank["found"] == {"error": None, "found": [True, True]}
