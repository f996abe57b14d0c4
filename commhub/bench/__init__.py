"""``commhub bench``: train a real model on real text under several hooks, and compare them.

A bench trains the same byte-level transformer once per hook, from the same initial weights and on the same
batches, in real processes, and reports loss, step time, bytes and where the time went. This package's face
imports no torch: settings are checked, and wrong ones refused, before any process starts.
"""

from ._options import BenchError, Settings
from ._run import run

__all__ = ["BenchError", "Settings", "run"]
