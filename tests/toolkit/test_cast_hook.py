"""A hook that casts for the way is a class that names its dtype."""

import inspect

import pytest
import torch

import commhub
from commhub.toolkit import CastHook


class Narrow(CastHook):
    """Averages in bfloat16."""

    wire = torch.bfloat16


GRADIENTS = [[torch.linspace(rank, 3, 40), torch.linspace(1, rank + 7, 24)] for rank in range(3)]


def reference(same):
    """One rank's share of the mean at a time, in rank order, each sum rounded to bfloat16."""
    first, *others = ((g * (1 / len(same))).bfloat16() for g in same)
    for other in others:
        first = first + other
    return first.float()


def test_it_averages_in_the_dtype_that_its_class_names_and_what_is_dense_in_its_own():
    run = commhub.simulate(Narrow(rules={"1": "dense"}), GRADIENTS, buckets=1)
    cast, exact = run.gradients[2]
    assert torch.equal(cast, reference([mine[0] for mine in GRADIENTS]))
    assert torch.allclose(exact, sum(mine[1] for mine in GRADIENTS) / 3, rtol=1e-6, atol=0)
    assert not torch.equal(exact, exact.bfloat16().float())
    assert run.sent_bytes[0] == 2 * 2 / 3 * (40 * 2 + 24 * 4)


def test_it_is_made_and_shown_under_the_name_of_its_class():
    assert str(inspect.signature(Narrow)) == "(*, rules: 'dict[str, object]' = {}) -> None"
    assert repr(Narrow(rules={"b*": "dense"})) == "Narrow(rules={'b*': 'dense'})"
    with pytest.raises(TypeError, match="'rules' must be <class 'dict'>"):
        Narrow(rules="dense")
    with pytest.raises(commhub.HookOptionError, match="can only be 'dense'"):
        Narrow(rules={"*": {"rank": 2}})
