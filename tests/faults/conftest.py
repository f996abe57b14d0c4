"""After a run: how long the ranks took to be told, by phase."""

import statistics


def pytest_terminal_summary(terminalreporter):
    """Print the median and the largest time to the error of each phase."""
    told = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for phase, seconds in dict(getattr(report, "user_properties", ())).get("told", {}).items():
                told.setdefault(phase, []).extend(seconds)
    told = {phase: seconds for phase, seconds in told.items() if seconds}
    if told:
        terminalreporter.section("seconds until ranks were told: median, largest")
    for phase, seconds in told.items():
        terminalreporter.write_line(f"{phase:10} {statistics.median(seconds):6.2f} {max(seconds):6.2f}")
