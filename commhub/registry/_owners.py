"""Other packages' models that own their gradients' reduction: commhub's own part of the table of models.

They are names, as text; no package is imported. An adapter that knows the same type goes first.
"""

from __future__ import annotations

from typing import Final

from ._models import ModelSpec

__all__ = ["MODELS"]

_INSTEAD: Final = "Train the module inside it with torch.nn.parallel.DistributedDataParallel to use a hook."
_TORCHFT: Final = (
    "torchft's Manager averages every gradient, among the replicas that take part in that step, and the process group "
    f"of the model is a dummy: a hook of commhub's would reach no other rank. {_INSTEAD}"
)

MODELS: Final = (
    ModelSpec(
        type="deepspeed.runtime.engine.DeepSpeedEngine",
        advice="A DeepSpeed engine reduces and partitions the gradients itself, in backward() and step(), and has no "
        f"place for a hook; it offers compressed optimizers of its own. {_INSTEAD}",
        owns_gradients=True,
    ),
    ModelSpec(type="torchft.ddp.DistributedDataParallel", advice=_TORCHFT, owns_gradients=True),
    ModelSpec(type="torchft.ddp.PureDistributedDataParallel", advice=_TORCHFT, owns_gradients=True),
)
