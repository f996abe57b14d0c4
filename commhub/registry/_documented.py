"""The documented names: the only hooks and averagers that the core knows by name.

A documented name belongs to the distribution named here, so that no other package can take it over and a
missing one can be explained. ``_documented_names``, which editors and type checkers read, is generated from these
tables.
"""

from typing import Final

HOOKS: Final = {
    "allreduce": "commhub-allreduce",
    "batched_powersgd": "commhub-batched-powersgd",
    "batched_powersgd_rank2": "commhub-batched-powersgd",
    "bf16": "commhub-bf16",
    "fp16": "commhub-fp16",
    "noop": "commhub-noop",
    "optimizer_overlap": "commhub-optimizer-overlap",
    "post_local_sgd": "commhub-post-local-sgd",
    "powersgd": "commhub-powersgd",
    "powersgd_rank2": "commhub-powersgd",
    "quantize_per_channel": "commhub-quantize",
    "quantize_per_tensor": "commhub-quantize",
    "zero_overlap": "commhub-optimizer-overlap",
}

AVERAGERS: Final = {
    "hierarchical": "commhub-post-local-sgd",
    "periodic": "commhub-post-local-sgd",
}

ALIASES: Final = {
    "batched_power_sgd": "batched_powersgd",
    "batched_power_sgd_rank2": "batched_powersgd_rank2",
    "bf16_compress": "bf16",
    "fp16_compress": "fp16",
    "power_sgd": "powersgd",
    "power_sgd_rank2": "powersgd_rank2",
}
"""PyTorch's spellings, in canonical form; they belong to the distribution of the name they stand for."""


def owner(name: str) -> str | None:
    """The distribution that a canonical name or alias belongs to; ``None`` where it is anyone's."""
    name = ALIASES.get(name, name)
    return HOOKS.get(name) or AVERAGERS.get(name)
