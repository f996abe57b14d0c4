"""The text is found and cut alike on every rank, and ranks never see each other's windows."""

import os

import pytest
import torch

from commhub.bench._data import Text
from commhub.bench._text import read_text, required_bytes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_the_default_text_is_the_standard_library_without_tests_and_packages():
    text = read_text(None)
    assert len(text) > 5_000_000
    assert b"class JSONEncoder" in text
    assert b"import numpy" not in text
    assert read_text(None) == text


def test_a_folder_is_read_in_sorted_order_without_hidden_binary_and_special_files(folder):
    assert read_text(str(folder)) == b"first\nsecond\n"


def test_a_file_is_read_as_it_is_and_up_to_the_limit(tmp_path):
    file = tmp_path / "data.bin"
    file.write_bytes(b"\0\1\2" * 100)
    assert read_text(str(file)) == b"\0\1\2" * 100
    assert read_text(str(file), limit=7) == (b"\0\1\2" * 100)[:7]


def test_a_limit_holds_for_folders_too(folder):
    assert read_text(str(folder), limit=8) == b"first\nse"


def test_a_missing_file_and_an_empty_one_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        read_text(str(tmp_path / "nowhere"))
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="no text found in"):
        read_text(str(tmp_path / "empty"))


@pytest.fixture
def text():
    # Every window is told apart by its bytes.
    return Text.cut(bytes((i * i // 7 + i) % 256 for i in range(20_000)), context=16)


def batches(text, steps, world_size, **how):
    how = {"size": 4, "seed": 0} | how
    return [
        [text.batch(step, rank=rank, world_size=world_size, **how) for rank in range(world_size)]
        for step in range(steps)
    ]


def test_a_batch_is_windows_of_context_and_one_more(text):
    batch = text.batch(0, rank=0, world_size=2, size=4, seed=0)
    assert batch.shape == (4, 17)
    assert batch.dtype == torch.int64


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(text):
    first, again, other = (torch.stack(batches(text, 3, 1, seed=seed)[2]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_epoch_deals_every_window_to_one_rank_once():
    text = Text.cut(bytes(range(256)) * 4, context=1)  # windows (0, 1), (1, 2), ...: known by their place
    text = Text(train=torch.arange(64).view(32, 2), held_out=text.held_out, context=1)
    seen = torch.cat([batch for step in batches(text, 4, 2) for batch in step])[:, 0]
    assert sorted(seen.tolist()) == list(range(0, 64, 2))


def test_epochs_are_shuffled_differently(text):
    per_epoch = len(text.train) // 4
    first, second = (text.batch(step, rank=0, world_size=1, size=4, seed=0) for step in (0, per_epoch))
    assert not torch.equal(first, second)


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(text):
    two = torch.cat(batches(text, 1, 2, size=4)[0])
    one = torch.cat(batches(text, 1, 1, size=8)[0])
    assert torch.equal(two, one)


def test_held_out_windows_are_shared_out_among_the_ranks_and_not_trained_on(text):
    shares = [text.validation(rank=rank, world_size=3, windows=20) for rank in range(3)]
    whole = text.validation(rank=0, world_size=1, windows=20)
    assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())
    assert len(whole) == 20
    assert len(text.held_out) == (20_000 - int(20_000 * 0.95) - 1) // 16


def test_more_ranks_than_held_out_windows_leave_some_without(text):
    assert len(text.validation(rank=5, world_size=6, windows=2)) == 0


@pytest.mark.parametrize(("context", "batch", "world_size"), [(16, 4, 2), (128, 1, 1), (5, 33, 7)])
def test_the_least_text_is_enough_and_little_less_is_not(context, batch, world_size):
    needed = required_bytes(context=context, batch=batch, world_size=world_size)
    text = Text.cut(bytes(needed), context=context)
    text.batch(0, rank=world_size - 1, world_size=world_size, size=batch, seed=0)
    assert len(text.held_out) >= 1
    short = Text.cut(bytes(needed - context - 22), context=context)
    assert len(short.held_out) < 1 or len(short.train) < world_size * batch


def test_a_text_without_one_global_batch_says_how_much_it_takes(text):
    with pytest.raises(ValueError, match="too short: one step of 100 ranks needs"):
        text.batch(0, rank=0, world_size=100, size=100, seed=0)
