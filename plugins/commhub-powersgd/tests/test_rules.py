"""Settings for single parameters by rules on their names."""

import pytest
import torch
from commhub_powersgd import PowerSGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub


def ones(*shapes):
    return [[torch.ones(shape) for shape in shapes]] * 2


def sent(gradients, **options):
    """Elements that one rank of two sends in a step: an all-reduce among two sends its payload once."""
    result = commhub.simulate("powersgd", gradients, start_step=0, **options)
    return result.sent_bytes[0] / 4


def test_a_dense_rule_sends_a_parameter_as_it_is():
    gradients = ones((40, 30), (50, 20), (9,))
    assert sent(gradients) == 70 + 70 + 9
    assert sent(gradients, rules={"1": "dense"}) == 70 + 1000 + 9
    result = commhub.simulate("powersgd", gradients, start_step=0, rules={"1": "dense"})
    assert [i for i in "012" if "residual" in result.states[0].local(i)] == ["0"]


def test_a_rule_sets_the_rank_and_the_minimum_compression_rate():
    gradients = ones((40, 30), (50, 20), (9,))
    assert sent(gradients, rank=2, rules={"1": {"rank": 4}}) == 2 * 70 + 4 * 70 + 9
    assert sent(gradients, rules={"0": {"min_compression_rate": 20}}) == 1200 + 70 + 9
    assert sent(gradients, min_compression_rate=20, rules={"0": {"min_compression_rate": 2.0}}) == 70 + 1000 + 9


def test_a_matrix_of_another_rank_is_reproduced_at_that_rank():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    result = commhub.simulate("powersgd", [[mean, mean]] * 2, start_step=0, rules={"1": {"rank": 3}})
    torch.testing.assert_close(result.gradients[0][1], mean, rtol=1e-3, atol=1e-3)
    assert (result.gradients[0][0] - mean).norm() > 0.1 * mean.norm()


def test_matrices_of_one_shape_and_other_ranks_are_no_batch():
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(40, 30, generator=generator) for _ in range(4)] for _ in range(2)]
    options = {"start_step": 0, "steps": 3, "rules": {"2": {"rank": 3}}}
    alone, together = (commhub.simulate("powersgd", gradients, batch_same_shapes=b, **options) for b in (False, True))
    assert alone.sent_bytes == together.sent_bytes
    for mine, theirs in zip(alone.gradients[0], together.gradients[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rank", 0), ("rank", -3), ("min_compression_rate", 0.0), ("min_compression_rate", -1.5)],
)
def test_a_wrong_setting_in_a_rule_says_what_the_option_says(setting, value):
    with pytest.raises(commhub.HookOptionError) as of_option:
        commhub.simulate("powersgd", ones((4, 4)), **{setting: value})
    with pytest.raises(commhub.HookOptionError, match=r"rules: '\*'") as of_rule:
        commhub.simulate("powersgd", ones((4, 4)), rules={"*": {setting: value}})
    said = str(of_option.value).partition(f"{setting} is ")[2]
    assert said
    assert str(of_rule.value).endswith(f"{setting} is {said}")


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"*": "sparse"}, "'dense' or a dict"),
        ({"*": {"seed": 3}}, "may set min_compression_rate, rank"),
        ({"*": {"rank": 2.5}}, "no int"),
        ({"nobody": "dense"}, "matches no parameter"),
        ("dense", "rules"),
    ],
)
def test_a_malformed_rule_is_refused(rules, match):
    with pytest.raises(commhub.HookOptionError, match=match):
        commhub.simulate("powersgd", ones((4, 4)), rules=rules)


def test_malformed_rules_fail_when_the_hook_is_made():
    with pytest.raises(ValueError, match="at least 1"):
        PowerSGD(rules={"*": {"rank": 0}})


class Net(nn.Module):
    """Two matrices, of which a rule may know one by name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(30, 40)
        self.lm_head = nn.Linear(40, 50)

    def forward(self, x):
        return self.lm_head(self.body(x))


def send_by_rules(hook, rules):
    model = DistributedDataParallel(Net())
    registration = commhub.register(model, hook) if rules is None else commhub.register(model, hook, rules=rules)
    model(torch.ones(2, 30)).sum().backward()
    return registration.stats.last.sent_bytes, str(registration)


@pytest.mark.parametrize(
    ("hook", "rules"),
    [
        ("powersgd(rank=2, start_step=0, rules={'*.bias': 'dense', 'lm_head.*': {'rank': 4}})", None),
        ("powersgd(rank=2, start_step=0)", {"*.bias": "dense", "lm_head.*": {"rank": 4}}),
    ],
    ids=["string", "argument"],
)
def test_a_hook_string_carries_rules_and_the_bytes_follow_them(ranks, hook, rules):
    for nbytes, text in ranks(send_by_rules, 2, hook, rules):
        assert nbytes == 4 * (2 * (30 + 40) + 4 * (40 + 50) + 40 + 50)
        assert text == "powersgd(rank=2, rules={'*.bias': 'dense', 'lm_head.*': {'rank': 4}}, start_step=0)"


def differ():
    rules = {"lm_head.*": "dense" if torch.distributed.get_rank() else {"rank": 2}}
    with pytest.raises(commhub.HookMismatchError, match="rules") as told:
        send_by_rules("powersgd", rules)
    return str(told.value)


def test_ranks_that_differ_in_rules_are_told(ranks):
    for text in ranks(differ, 2):
        assert "dense" in text
        assert "'rank': 2" in text
