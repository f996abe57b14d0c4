"""The documented hooks keep what they declare between the replicas of a sharded model."""

import os

import pytest
from click.testing import CliRunner

import commhub
from commhub.cli import main
from commhub.registry._documented import AVERAGERS as DOCUMENTED
from commhub.registry._documented import HOOKS
from commhub.testing import check_hook, parametrize_with_checks, temporary_plugin
from commhub.testing.conformance._list import all_checks

from .zoo import EXACT, ROUGH, SOURCE

GIVEN = {"periodic": "periodic(period=3)", "hierarchical": "hierarchical(periods={1: 1, 2: 2})"}
LOCAL = "post_local_sgd(start_step=0, period=2, local_gradients=false)"
EVERY = [GIVEN.get(name, name) for name in commhub.hooks() if name in {*HOOKS, *DOCUMENTED}] + [LOCAL]
SOME = ["powersgd_rank2", "quantize_per_channel", "periodic(period=3)"]


@parametrize_with_checks(EVERY if "COMMHUB_EVERY_CHECK" in os.environ else SOME, where=("sharded",))
def test_between_replicas(check):
    check()


ALTERNATES = """
@attrs.define
class Alternates:
    \"\"\"Is right in every other call that this process makes of any of its kind.\"\"\"

    calls: ClassVar[list] = []

    def reduce(self, bucket):
        self.calls.append(bucket.index)
        bucket.flat.copy_((yield AllReduce(bucket.flat)) * (1 + 1e-3 * (len(self.calls) % 2)))
"""

SCATTERERS = """
@attrs.define(slots=False)
class Scatters:
    \"\"\"Is right between replicas, and so it is here.\"\"\"

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))

    def reduce_scatter(self, bucket):
        bucket.shard.copy_((yield ReduceScatter(bucket.flat)))


@attrs.define(slots=False)
class SumsParts(Scatters):
    def reduce_scatter(self, bucket):
        bucket.shard.copy_((yield ReduceScatter(bucket.flat, op="sum")))


@attrs.define(slots=False)
class ScattersByMemory(Scatters):
    \"\"\"Adds a little of the last mean, which no checkpoint finds.\"\"\"

    last: dict = attrs.field(init=False, factory=dict)

    def reduce_scatter(self, bucket):
        mean = yield ReduceScatter(bucket.flat)
        bucket.shard.copy_(mean)
        if bucket.names in self.last:
            bucket.shard.add_(self.last[bucket.names], alpha=1e-3)
        self.last[bucket.names] = mean.clone()


@attrs.define(slots=False)
class ScattersOnce(Scatters):
    busy: ClassVar[set] = set()

    def reduce_scatter(self, bucket):
        if bucket.rank in self.busy:
            raise RuntimeError("a bucket is on its way already")
        self.busy.add(bucket.rank)
        bucket.shard.copy_((yield ReduceScatter(bucket.flat)))
        self.busy.remove(bucket.rank)
"""

# Name: (class, spec's fields, the check that fails)
WRONG = {
    "forgets_to_divide": ("ForgetsToDivide", EXACT, "sharded_mean"),
    "differs_by_rank": ("DiffersByRank", ROUGH, "sharded_replicas_agree"),
    "alternates": ("Alternates", ROUGH, "sharded_accumulation"),
    "outside_state": ("OutsideState", ROUGH, "sharded_resumes"),
    "stays_busy": ("StaysBusy", EXACT, "sharded_failing_rank"),
    "scatters": ("Scatters", EXACT, None),
    "sums_parts": ("SumsParts", EXACT, "scattered_mean"),
    "scatters_by_memory": ("ScattersByMemory", EXACT, "scattered_resumes"),
    "scatters_once": ("ScattersOnce", EXACT, "scattered_failing_rank"),
}
AVERAGERS = {"replaces_memory_of_shards": ("ReplacesMemory", ROUGH, "sharded_averages")}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    hooks = {name: {"factory": kind, **fields} for name, (kind, fields, _) in WRONG.items()}
    averagers = {name: {"factory": kind, **fields} for name, (kind, fields, _) in AVERAGERS.items()}
    source = f"from commhub import ReduceScatter\n{SOURCE}\n\n{ALTERNATES}\n\n{SCATTERERS}"
    with temporary_plugin(
        tmp_path_factory.mktemp("wrong"), "commhub-wrong-on-shards", hooks=hooks, averagers=averagers, source=source
    ):
        yield


@pytest.mark.parametrize("name", [*WRONG, *AVERAGERS])
def test_what_is_wrong_there_fails_exactly_its_check(wrong, ranks, name):
    results = check_hook(name, where=("sharded",), pool=ranks.pool)
    expected = {**WRONG, **AVERAGERS}[name][2]
    assert [r.check for r in results if r.status == "failed"] == ([] if expected is None else [expected]), results


def test_every_check_has_a_hook_that_fails_it():
    fails = {check for *_, check in [*WRONG.values(), *AVERAGERS.values()]} - {None}
    assert fails == {c.name for c in all_checks() if c.where == "sharded"}


def test_the_command_runs_those_checks_alone():
    done = CliRunner().invoke(main, ["check", "allreduce", "--sharded", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert '"sharded_mean"' in done.stdout
    assert '"many_buckets"' not in done.stdout
