"""Training under a hook is what a plain loop with the same optimizer, rates and batches does."""

import pytest
import torch

from commhub.bench import _train
from commhub.bench._data import Text
from commhub.bench._model import Transformer, loss_of
from commhub.bench._options import Settings
from commhub.bench._sizes import SIZES

TEXT = bytes(range(256)) * 300
STEPS = 12


def benched(flags):
    records = []
    settings = Settings(hooks=("allreduce",), steps=STEPS, warmup=1, batch=1, model="tiny", seed=3, **flags)
    text = Text.cut(TEXT, context=SIZES["tiny"].context)
    _train.train(settings, "allreduce", text, torch.device("cpu"), records.append)
    return [record.loss for record in records]


def plain(rule, rate, **options):
    text = Text.cut(TEXT, context=SIZES["tiny"].context)
    torch.manual_seed(3)
    model = Transformer(SIZES["tiny"])
    optimizer = rule(model.parameters(), lr=rate, **options)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 10, 1 - step / STEPS)
        optimizer.zero_grad()
        loss = loss_of(model, text.batch(step, rank=0, world_size=1, size=1, seed=3))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("flags", "reference"),
    [
        ({}, (torch.optim.AdamW, 2e-3, {"betas": (0.9, 0.95), "weight_decay": 0.1})),
        ({"optimizer": "sgd"}, (torch.optim.SGD, 0.1, {"momentum": 0.9, "nesterov": True})),
        ({"optimizer": "sgd", "learning_rate": 0.02}, (torch.optim.SGD, 0.02, {"momentum": 0.9, "nesterov": True})),
    ],
    ids=["default", "sgd", "learning rate"],
)
def test_the_optimizer_and_its_rate_are_those_asked_for(ranks, flags, reference):
    rule, rate, options = reference
    assert ranks(benched, 1, flags)[0] == pytest.approx(ranks(plain, 1, rule, rate, **options)[0], rel=1e-5)
