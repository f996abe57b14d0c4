"""What every hook has to keep, in one process; `commhub check fp8` runs the same on real ranks too."""

from commhub.testing import parametrize_with_checks


@parametrize_with_checks(["fp8"], where=("static", "simulated"))
def test_conformance(check):
    check()
