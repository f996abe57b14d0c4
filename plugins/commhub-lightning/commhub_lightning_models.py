"""What of Lightning's a user may hand to ``commhub.register``, and what serves it: read by the core's table of models.

It stands beside the package, which imports Lightning when it is imported, and imports neither that nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commhub import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def _of_trainer(trainer: Any) -> Iterable[Any]:
    """The DDP model of a trainer that fits."""
    model = getattr(getattr(trainer, "strategy", None), "model", None)
    return [model] if any(kind.__name__ == "DistributedDataParallel" for kind in type(model).__mro__) else []


def _of_module(module: Any) -> Iterable[Any]:
    """The DDP model that a module's trainer has wrapped it in."""
    trainer = getattr(module, "_trainer", None)
    return [] if trainer is None else _of_trainer(trainer)


def _specs(pytorch: str, fabric: str, adapter: str) -> Iterator[ModelSpec]:
    use = f"Give Trainer(strategy={adapter}.CommHubDDPStrategy('powersgd_rank2')), or callbacks=[CommHubCallback(...)]"
    yield ModelSpec(
        type=f"{pytorch}.trainer.trainer.Trainer",
        advice=f"{use}, from commhub-lightning: it registers the hook in fit(), once the model is wrapped.",
        models=_of_trainer,
    )
    yield ModelSpec(
        type=f"{pytorch}.core.module.LightningModule",
        advice=f"Its trainer wraps it, in fit(). {use}, from commhub-lightning.",
        models=_of_module,
    )
    yield ModelSpec(
        type=f"{fabric}.fabric.Fabric",
        advice="Give the module that fabric.setup(module, optimizer) returned; Fabric itself holds none.",
        models=None,
    )


MODELS: tuple[ModelSpec, ...] = (
    *_specs("lightning.pytorch", "lightning.fabric", "commhub_lightning"),
    *_specs("pytorch_lightning", "lightning_fabric", "commhub_lightning.pytorch_lightning"),
)
