"""Every test in this repository may use the rank pool and temporary plugins."""

pytest_plugins = ["commhub.testing.pytest_plugin"]
