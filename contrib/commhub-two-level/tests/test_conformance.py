"""What every hook has to keep, whatever its method, on hosts of two ranks; real ranks are in tests/test_ranks.py."""

from commhub.testing import parametrize_with_checks

BYTES = {"bytes_as_declared": "the check takes all ranks to be on one host; tests/test_numbers.py counts them"}


@parametrize_with_checks(["two_level(ranks_per_host=2)"], where=("static", "simulated"), expected_failed_checks=BYTES)
def test_conformance(check):
    check()
