"""What the core tells users who hand it an object of these frameworks. Imports neither torch nor a framework."""

from __future__ import annotations

from typing import Any, Final

from commhub import ModelSpec

_UNWRAPPED: Final = (
    "This is the model inside DistributedDataParallel, which has no hook of its own. With the Trainer, call "
    "commhub_accelerate.transformers.attach(trainer, hook) before train(); in a script of your own, register on the "
    "DistributedDataParallel model around it."
)


def _of_accelerator(accelerator: Any) -> tuple[object, ...]:
    attached = vars(accelerator).get("_commhub_attached")
    return () if attached is None else tuple(attached.models)


def _of_trainer(trainer: Any) -> tuple[object, ...]:
    from ._served import ddp_in  # which loads torch

    model = ddp_in(trainer.model_wrapped)
    return () if model is None else (model,)


MODELS: Final = (
    ModelSpec(
        type="accelerate.accelerator.Accelerator",
        advice="Call commhub_accelerate.attach(accelerator, hook) before accelerator.prepare(): every model that it "
        "prepares gets the hook, and its checkpoints carry the hook's state.",
        models=_of_accelerator,
    ),
    ModelSpec(
        type="transformers.trainer.Trainer",
        advice="Call commhub_accelerate.transformers.attach(trainer, hook) before trainer.train(): the model that it "
        "wraps gets the hook, and its checkpoints carry the hook's state.",
        models=_of_trainer,
    ),
    ModelSpec(type="transformers.modeling_utils.PreTrainedModel", advice=_UNWRAPPED, models=None),
    ModelSpec(type="peft.peft_model.PeftModel", advice=_UNWRAPPED, models=None),
    ModelSpec(
        type="deepspeed.runtime.engine.DeepSpeedEngine",
        advice="DeepSpeed averages gradients itself and has no place for a hook; it offers compressed optimizers of "
        "its own. Train with DistributedDataParallel to use commhub.",
        models=None,
    ),
)
