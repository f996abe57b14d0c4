"""Every test in this repository may use the rank pool and temporary plugins."""

import os

# Before torch is loaded: on small tensors a second thread of pytest's own process only waits, and spins meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["commhub.testing.pytest_plugin"]
