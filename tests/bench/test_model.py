"""The transformer is causal, has the size it says, and learns real text."""

import inspect
import json.decoder

import pytest
import torch

from commhub.bench._data import Text
from commhub.bench._model import Transformer, loss_of
from commhub.bench._sizes import SIZES, ModelSize

SMALL = ModelSize(width=32, layers=2, heads=4, context=32, adamw=3e-3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(SMALL)


def test_it_gives_a_logit_for_every_byte_at_every_place(model):
    assert model(torch.zeros(3, 20, dtype=torch.int64)).shape == (3, 20, 256)


def test_changing_a_later_byte_does_not_change_earlier_logits(model):
    tokens = torch.randint(256, (2, 32))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(dim=2).min() > 0


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.87), ("small", 4.9), ("medium", 25.6), ("large", 85.8)])
def test_sizes_have_about_the_parameters_they_promise(name, millions):
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(SIZES[name]).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_same_seed_gives_the_same_weights(model):
    torch.manual_seed(0)
    again = Transformer(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_it_begins_without_an_opinion(model):
    assert loss_of(model, torch.randint(256, (4, 33))).item() == pytest.approx(5.545, abs=0.15)


def test_its_loss_falls_on_real_text_within_a_few_steps(model):
    text = Text.cut(inspect.getsource(json.decoder).encode() * 2, context=SMALL.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL.adamw)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, text.batch(step, rank=0, world_size=1, size=8, seed=0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 4.2 < 5.3 < losses[0]


def test_every_parameter_gets_a_gradient(model):
    loss_of(model, torch.randint(256, (2, 33))).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
