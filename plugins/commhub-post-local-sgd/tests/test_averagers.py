"""When `periodic` and `hierarchical` average, and among whom: against plain lists, and PyTorch's where it is right."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging import averagers as theirs
from torch.distributed.algorithms.model_averaging import hierarchical_model_averager as their_hierarchy
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp


def met(averager, p, steps):
    """[(step, ranks)] of rank 0, prepared on virtual ranks; the last of them is carried out there too."""
    own = [[torch.tensor([float(2**rank)])] for rank in range(p)]  # their sum tells who took part
    hook = commhub.simulate(averager, own).hooks[0]
    due = [(step, hook.due(step)) for step in range(steps)]
    seen = [(step, list(group.ranks)) for step, group in due if group is not None]
    last, ranks = seen[-1]
    mean = commhub.simulate(averager, own, steps=last + 1).gradients[0][0]
    assert float(mean) == sum(2**rank for rank in ranks) / len(ranks)
    return seen


def test_periodic_averages_all_ranks_every_period_from_the_warm_up_on():
    everyone = list(range(4))
    assert met("periodic(period=4, warmup_steps=13)", 4, 30) == [(s, everyone) for s in (13, 17, 21, 25, 29)]
    assert met("periodic(period=3)", 4, 8) == [(s, everyone) for s in (0, 3, 6)]
    assert met("periodic(period=1, warmup_steps=2)", 4, 5) == [(s, everyone) for s in (2, 3, 4)]


def test_hierarchical_lets_the_longest_period_that_divides_decide():
    pair, quad, everyone = [0, 1], [0, 1, 2, 3], list(range(8))
    found = met("hierarchical(periods={8: 8, 2: 2, 4: 4})", 8, 13)
    assert found == [(0, everyone), (2, pair), (4, quad), (6, pair), (8, everyone), (10, pair), (12, quad)]
    found = met("hierarchical(periods={2: 2, 8: 4}, warmup_steps=5)", 4, 16)
    assert found == [(5, quad), (7, pair), (9, pair), (11, pair), (13, quad), (15, pair)]


def test_hierarchical_counts_from_the_end_of_the_warm_up():
    assert [step for step, _ in met("hierarchical(periods={4: 2}, warmup_steps=10)", 2, 20)] == [10, 14, 18]


def test_the_groups_of_each_period_are_public():
    def groups_of(rank):
        averager = commhub.simulate("hierarchical(periods={2: 2, 4: 4})", [[torch.zeros(1)]] * 4).hooks[rank]
        return {period: group.ranks for period, group in averager.groups.items()}

    assert groups_of(0) == {2: (0, 1), 4: (0, 1, 2, 3)}
    assert groups_of(3) == {2: (2, 3), 4: (0, 1, 2, 3)}


def test_groups_are_consecutive_ranks():
    run = commhub.simulate(
        "hierarchical(periods={1: 2, 2: 4})", [[torch.tensor([float(r)])] for r in range(4)], steps=2
    )
    assert [float(mine[0]) for mine in run.gradients] == [0.5, 0.5, 2.5, 2.5]


@pytest.mark.parametrize("warmup", [0, 1, 13])
def test_one_level_of_all_ranks_is_periodic(warmup):
    options = f"warmup_steps={warmup}"
    hierarchy = met(f"hierarchical(periods={{4: 2}}, {options})", 2, 30)
    assert hierarchy == met(f"periodic(period=4, {options})", 2, 30)
    if warmup == 13:
        assert [step for step, _ in hierarchy] == [13, 17, 21, 25, 29]


def counted(averager, steps):
    """In which steps PyTorch's averager changes a parameter, which is set to the rank before each."""
    p, changed = nn.Parameter(torch.zeros(1)), []
    p.grad = torch.zeros(1)
    for step in range(steps):
        with torch.no_grad():
            p.fill_(float(dist.get_rank()))
        averager.average_parameters([p])
        if float(p) != dist.get_rank():
            changed.append((step, float(p)))
    return changed


def ours_counted(hook, steps):
    module = nn.ParameterList([torch.zeros(1)])
    registration, changed = commhub.manual(module, hook, timeout=30), []
    for step in range(steps):
        with torch.no_grad():
            module[0].fill_(float(dist.get_rank()))
        registration.average()
        if float(module[0]) != dist.get_rank():
            changed.append((step, float(module[0])))
    registration.close()
    return changed


def like_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for period, warmup in ((4, 13), (3, 0)):
            reference = counted(theirs.PeriodicModelAverager(period=period, warmup_steps=warmup), 24)
            assert ours_counted(f"periodic(period={period}, warmup_steps={warmup})", 24) == reference != []
        # Theirs ignores the warm-up in its phase: they agree where that makes no difference.
        sizes = OrderedDict([(2, 2), (4, 4)])
        reference = counted(their_hierarchy.HierarchicalModelAverager(sizes, warmup_steps=4), 13)
        assert ours_counted("hierarchical(periods={2: 2, 4: 4}, warmup_steps=4)", 13) == reference != []


def test_both_average_when_pytorch_s_do(ranks):
    ranks(like_torch, 4)


WRONG = {
    "periodic(period=0)": "at least 1",
    "periodic(period=2.5)": "not an int",
    "periodic(period=2, warmup_steps=-1)": "0 or more",
    "hierarchical": "periods is None",
    "hierarchical(periods={})": "such as",
    "hierarchical(periods={'2': 2})": "whole numbers",
    "hierarchical(periods={0: 2})": "at least 1",
    "hierarchical(periods={2: 2, 3: 4})": "no multiple of 2",
    "hierarchical(periods={2: 4, 4: 2})": "groups of 2 are not made of groups of 4",
    "hierarchical(periods={2: 2, 4: 2})": "the larger the groups",
    "hierarchical(periods={2: 2, 4: 3})": "groups of 3 are not made of groups of 2",
}


@pytest.mark.parametrize(("averager", "told"), WRONG.items())
def test_an_option_that_makes_no_sense_is_refused(averager, told):
    with pytest.raises(commhub.HookOptionError, match=told):
        commhub.create(averager)


def other_sizes():
    model = DistributedDataParallel(mlp())
    for periods in ({2: 2, 4: 8}, {2: 2}, {4: 3}):
        with pytest.raises(commhub.HookOptionError, match="there are 4"):
            commhub.register(model, "hierarchical", periods=periods)
    assert commhub.registration(model) is None


def test_a_hierarchy_that_leaves_ranks_apart_is_refused_at_registration(ranks):
    ranks(other_sizes, 4)


def test_the_canonical_string_of_a_hierarchy_reads_back():
    from commhub.registry._recipe import choose

    text = str(choose("Hierarchical(periods={2:2,8:4})", {}))
    assert text == "hierarchical(periods={2: 2, 8: 4})"
    nested = str(choose("post_local_sgd", {"averager": text}))
    assert choose(nested, {}).make().averager == text


def by_string_and_object():
    model, told = DistributedDataParallel(mlp()), []
    for hook in ("hierarchical(periods={2: 2, 8: 4})", commhub.create("hierarchical", periods={8: 4, 2: 2})):
        registration = commhub.register(model, hook)
        told.append((str(registration), registration.name, registration.hook.periods))
    other = commhub.create("periodic", period=2 + dist.get_rank() % 2)
    with pytest.raises(commhub.HookMismatchError, match="period"):
        commhub.register(model, other)
    return told


def test_what_create_made_has_its_name_and_its_options_are_compared(ranks):
    [(text, name, _), (short, other, periods)] = ranks(by_string_and_object, 4)[0]
    assert (text, name) == ("hierarchical(periods={2: 2, 8: 4})", "hierarchical")
    assert (short, other, periods) == ("hierarchical", "hierarchical", {2: 2, 8: 4})


def test_averagers_made_by_name_are_copied_and_pickled():
    made = commhub.create("periodic", period=4, warmup_steps=2)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert (again.period, again.warmup_steps, repr(again)) == (4, 2, repr(made))
    commhub.simulate(made, [[torch.zeros(2)]] * 2, steps=3)  # each virtual rank gets a copy


def whole():
    """Under a 16-bit wire, gradients are rounded and parameters are not."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    registration = commhub.register(
        model, "post_local_sgd(start_step=1, period=1, local_gradients=false)", optimizer=optimizer, wire="bf16"
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    size = sum(p.nbytes for p in model.parameters())
    for step in range(2):
        model(*batches(8)(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()
        assert registration.stats.last.sent_bytes == (size / 2, size)[step]
        assert_equal_across_ranks(dict(model.named_parameters()))
    for name, p in model.named_parameters():
        assert bitwise_equal(p.detach(), before[name])


def test_a_16_bit_wire_leaves_parameters_whole(ranks):
    ranks(whole, 2)
