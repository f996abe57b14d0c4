"""The table of hooks is complete, and its options make these small models be compressed in many buckets."""

import commhub
from commhub.registry._documented import HOOKS as DOCUMENTED
from commhub.testing import mlp, train

from .matrix import (
    HOOKS,
    MANY,
    build,
    communicates,
    drawn,
    feeds_back,
    give,
    local_state,
    name_of,
    on_ranks,
    spec_of,
)


def test_every_documented_hook_that_is_installed_is_in_the_table():
    # A hook that needs the optimizer steps it in backward: what is left in the gradient is no result.
    installed = {
        name
        for name, info in commhub.hooks().items()
        if name in DOCUMENTED and info.kind == "hook" and "optimizer" not in info.spec.needs
    }
    assert installed <= {name_of(hook) for hook in HOOKS}


def at_work(hook):
    model, registration = build(hook, MANY, mlp([32] * 5))
    train(model, 3)
    given, second = build(hook, MANY)
    give(given, drawn(0, 0))
    buckets = model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")
    return len(buckets), registration.stats.compression, sorted(local_state(second))


@on_ranks()
def test_the_table_s_options_make_a_hook_compress_and_remember_from_the_first_step_on(ranks, hook, nproc):
    for buckets, compression, remembered in ranks(at_work, nproc, hook):
        assert buckets == 8
        assert compression == 1 if spec_of(hook).exact else compression > 1.2
        assert bool(remembered) == feeds_back(hook)
        assert not communicates(hook) or compression < float("inf")
