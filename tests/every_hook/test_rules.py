"""One notation chooses by name what a hook leaves uncompressed, whatever the hook."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Largest, Watched, assert_equal_across_ranks, mlp, train

COMPRESSING = [
    "fp16",
    "bf16",
    "quantize_per_tensor",
    "quantize_per_channel",
    "powersgd(start_step=0)",
    "powersgd_rank2(start_step=0)",
    "batched_powersgd(start_step=0)",
    "batched_powersgd_rank2(start_step=0)",
]


def with_rules(hook, rules):
    return hook[:-1] + f", rules={rules})" if hook.endswith(")") else f"{hook}(rules={rules})"


def drawn(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in ((40, 64), (40, 64), (64, 40), (9,))]


@pytest.mark.parametrize("hook", COMPRESSING)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("buckets", [1, 3])
def test_what_a_rule_calls_dense_is_the_mean_and_the_rest_is_compressed(hook, ranks, buckets):
    gradients = [drawn(rank) for rank in range(ranks)]
    run = commhub.simulate(with_rules(hook, "{'[02]': 'dense'}"), gradients, buckets=buckets)
    means = [sum(same) / ranks for same in zip(*gradients, strict=True)]
    missed = [float((got - mean).norm() / mean.norm()) for got, mean in zip(run.gradients[0], means, strict=True)]
    assert max(missed[0], missed[2]) < 1e-6
    assert missed[1] > 1e-5
    assert all(map(torch.equal, run.gradients[0], run.gradients[-1]))


@pytest.mark.parametrize("hook", COMPRESSING)
def test_with_everything_dense_as_many_bytes_travel_as_without_a_hook(hook):
    run = commhub.simulate(with_rules(hook, "{'*': 'dense'}"), [drawn(rank) for rank in range(2)])
    assert run.compression == 1.0


@pytest.mark.parametrize("hook", COMPRESSING)
def test_a_rule_that_means_nothing_is_refused(hook):
    for rules, message in (("{'no.*': 'dense'}", "matches no parameter"), ("{'0': 'sparse'}", "'dense'")):
        with pytest.raises(commhub.HookOptionError, match=message):
            commhub.simulate(with_rules(hook, rules), [drawn(0)])


@pytest.mark.parametrize("hook", COMPRESSING)
def test_a_later_step_allocates_nothing_near_the_size_of_a_bucket(hook):
    gradients = [[torch.ones(700, 700) for _ in range(4)]] * 2
    chosen = commhub.create(with_rules(hook, "{'[02]': 'dense'}"))
    seen = commhub.simulate(Watched(chosen, Largest, since=1), gradients, steps=3, buckets=1).hooks[0].seen
    assert seen.nbytes <= 0.1 * 4 * 4 * 700 * 700


def trained(hook, cap):
    model = DistributedDataParallel(mlp([16] * 13), bucket_cap_mb=cap)
    registration = commhub.register(model, hook)
    run = train(model, 4)
    assert_equal_across_ranks(run.parameters)
    return registration.stats.compression


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("cap", [25, 1 / 1024], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("hook", ["fp16", "bf16"])
def test_casts_on_real_ranks_send_what_is_dense_as_it_is(ranks, hook, nproc, cap):
    """Weights are 16 times as many as biases."""
    for compression in ranks(trained, nproc, with_rules(hook, "{'*.weight': 'dense'}"), cap):
        assert compression == pytest.approx(17 / 16.5)
