"""What one rank does: ``job.py PACKAGE STORY FOLDER`` fits with the real package and writes what came of it.

A story is a list of scenes that share the processes and their imports; each result lies under its scene's name in
``FOLDER/STORY-rank0.json``. A second story in new processes goes on from the first one's checkpoints.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commhub

PACKAGE, STORY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK = int(os.environ["LOCAL_RANK"])
RANKS = int(os.environ["RANKS"])
PL = import_module("lightning.pytorch" if PACKAGE == "lightning" else PACKAGE)
OURS = import_module("commhub_lightning" if PACKAGE == "lightning" else "commhub_lightning.pytorch_lightning")
BATCHES, EPOCHS = 4, 2
STEPS = BATCHES * EPOCHS
CAP = {"bucket_cap_mb": 0.002}  # several buckets

for name in (PACKAGE, "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Net(PL.LightningModule):
    """Learns noise; what each of its steps found is kept."""

    def __init__(self, momentum=0.9, manual=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16))
        self.momentum, self.automatic_optimization = momentum, not manual

    def training_step(self, batch, index):
        loss = self.layers(batch[0]).sub(batch[1]).square().mean()
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=self.momentum)


class Look(PL.Callback):
    """Counts the hook's collectives, and asks DDP how many buckets it has had."""

    def __init__(self):
        self.asked, self.steps, self.buckets = set(), 0, []

    def on_train_start(self, trainer, module):
        registration = commhub_of(trainer)
        if registration is not None:
            registration.observe(before=lambda bucket, _: self.asked.add((bucket.step, bucket.index)))

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step > self.steps:  # not a batch whose gradients were only accumulated
            self.steps = trainer.global_step
            self.buckets.append(len(trainer.strategy.model.reducer._get_zeros_like_grad_buckets()))


def commhub_of(trainer):
    holders = [trainer.strategy, *trainer.callbacks]
    found = [one.registration for one in holders if getattr(one, "registration", None) is not None]
    return found[0] if found else None


def bits(module):
    """The parameters, bit by bit."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def trainer_of(strategy, *callbacks, epochs=EPOCHS, **options):
    options = {"logger": False, "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks)} | options
    return PL.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        callbacks=list(callbacks),
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data():
    made = torch.Generator().manual_seed(7)
    count = 4 * BATCHES * RANKS
    whole = TensorDataset(torch.randn(count, 16, generator=made), torch.randn(count, 16, generator=made))
    return DataLoader(whole, batch_size=4, shuffle=False)


def fit(strategy, *callbacks, module=None, path=None, **options):
    """Fit from the same beginning each time; what came of it, and the trainer."""
    torch.manual_seed(0)
    module = Net() if module is None else module
    trainer = trainer_of(strategy, *callbacks, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data(), ckpt_path=path)
    registration = commhub_of(trainer)
    told = [str(one.message) for one in caught if "CommHub" in str(one.message)]
    result = {"bits": bits(module), "global_step": trainer.global_step, "warnings": told}
    if registration is not None:
        result |= {"hook": str(registration), "step": registration.step, "sent": registration.stats.sent_bytes}
        result["stats_steps"] = registration.stats.steps
    return result, trainer


def refusal(call):
    """The name and text of commhub's error that a call ends in."""
    try:
        call()
    except commhub.CommhubError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None}


def keep(folder, **options):
    return PL.callbacks.ModelCheckpoint(dirpath=FOLDER / folder, save_on_train_epoch_end=True, **options)


SCENES = {"first": {}, "second": {}, "alone": {}, "smoke": {}}


def scene(story):
    def added(function):
        SCENES[story][function.__name__] = function
        return function

    return added


COMPRESSED = {"powersgd": "powersgd_rank2(start_step=2)", "quantize": "quantize_per_tensor(error_feedback=true)"}


@scene("first")
def plain():
    return fit(PL.strategies.DDPStrategy(**CAP))[0]


@scene("first")
def allreduce():
    look = Look()
    result, trainer = fit(OURS.CommHubDDPStrategy("allreduce", **CAP), look)
    return result | {"asked": len(look.asked), "buckets": look.buckets}


@scene("first")
def accumulated():
    look = Look()
    result, _ = fit(OURS.CommHubDDPStrategy("allreduce", **CAP), look, accumulate_grad_batches=2)
    return result | {"asked": len(look.asked), "buckets": look.buckets}


@scene("first")
def powersgd():
    """The whole way, with a checkpoint halfway, and a copy of the last one."""
    strategy = OURS.CommHubDDPStrategy("powersgd_rank2", {"start_step": 2}, **CAP)
    result, _ = fit(strategy, keep("powersgd", save_top_k=-1, filename="{epoch}", save_last=True))
    return result


@scene("first")
def quantize():
    """With the callback, and a link to the last checkpoint."""
    callback = OURS.CommHubCallback(COMPRESSED["quantize"])
    strategy = PL.strategies.DDPStrategy(**CAP)
    result, _ = fit(strategy, callback, keep("quantize", save_top_k=-1, filename="{epoch}", save_last="link"))
    return result


@scene("first")
def named():
    return fit("ddp_commhub_fp16", max_steps=2)[0]


def main():
    results = {}
    for name, play in SCENES[STORY].items():
        results[name] = play()
    path = FOLDER / f"{STORY}-rank{RANK}.json"
    path.with_suffix(".new").write_text(json.dumps(results, indent=1))
    shutil.move(path.with_suffix(".new"), path)


if __name__ == "__main__":
    main()
