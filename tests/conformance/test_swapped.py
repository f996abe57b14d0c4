"""The check `swapped` compares bits, and lets a hook do in each step something else."""

import pytest

from commhub.testing import temporary_plugin
from commhub.testing.conformance._list import all_checks
from commhub.testing.conformance._run import Examination

SOURCE = """
import attrs
from commhub import AllReduce


@attrs.define(slots=False)
class KeepsForTheClass:
    "Adds a millionth of what any object of this class saw last."

    last = {}

    def reduce(self, bucket):
        mean = (yield AllReduce(bucket.flat)).clone()
        bucket.flat.copy_(mean)
        if bucket.names in self.last:
            bucket.flat.add_(self.last[bucket.names], alpha=1e-6)
        self.last[bucket.names] = mean


@attrs.define
class ScalesByStep:
    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat))).mul_(1 + bucket.step)
"""


@pytest.mark.parametrize(
    ("kind", "status"), [("KeepsForTheClass", "failed"), ("ScalesByStep", "passed")], ids=["memory", "step"]
)
def test_what_differs_by_a_millionth_after_a_swap_is_found_unless_it_depends_on_the_step(ranks, tmp_path, kind, status):
    (check,) = (check for check in all_checks() if check.name == "swapped")
    with temporary_plugin(tmp_path, "commhub-odd", hooks={"odd": kind}, source=SOURCE):
        result = Examination("odd", ranks.pool).run(check, 2)
    assert result.status == status, result.reason
    assert ("differs from that of a model registered with it" in result.reason) == (status == "failed")
