"""The conformance kit: what every hook and averager has to keep, as checks that anyone can run on their own.

    commhub check my_hook                       # from a shell
    check_hook("my_hook")                       # a list of CheckResult
    @parametrize_with_checks(["my_hook"])       # as pytest tests, one per check
    def test_conformance(check): check()

Checks are chosen by what a spec declares, never by name. The static ones look at the distribution, the simulated ones
drive the hook in one process, and those on ranks train on real process groups.
"""
