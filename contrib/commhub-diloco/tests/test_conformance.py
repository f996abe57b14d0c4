"""What every averager has to keep, whatever its method."""

from commhub.testing import parametrize_with_checks


@parametrize_with_checks(["diloco(period=3)", "diloco(period=4, fragments=2, exchange=quantize_per_channel)"])
def test_conformance(check):
    check()
