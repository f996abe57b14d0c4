"""What every hook has to keep. `commhub check topk` runs all of it; here what its own tests leave."""

from commhub.testing import parametrize_with_checks


@parametrize_with_checks(["topk", "topk(momentum=0.9)"], where=("static", "simulated"))
def test_in_one_process(check):
    check()


@parametrize_with_checks(["topk(momentum=0.9)"], where=("ranks",))
def test_on_ranks(check):
    check()
