"""Checkpoints of what hooks remember, on all ranks or on none. See README.md in the folder above."""
