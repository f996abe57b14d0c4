"""What every hook has to keep, in one process; `commhub check sign` runs the same on real ranks too."""

from commhub.testing import parametrize_with_checks


@parametrize_with_checks(["sign"], where=("static", "simulated"))
def test_conformance(check):
    check()
