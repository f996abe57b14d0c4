"""What every hook has to keep. `commhub check sign` runs all of it; here what one process can tell, and two ranks."""

from commhub.testing import parametrize_with_checks


@parametrize_with_checks(["sign"], where=("static", "simulated", "ranks"))
def test_conformance(check):
    check()
