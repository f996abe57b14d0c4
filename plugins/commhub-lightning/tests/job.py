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
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commhub
from commhub.testing._recorded import Recorder

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

    def __init__(self, manual=False):
        super().__init__()
        self.lr = 0.05
        self.layers = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16))
        self.automatic_optimization = not manual

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
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


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
    options = {
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
    } | options
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


def fit(strategy, *callbacks, manual=False, kind=Net, path=None, weights_only=None, **options):
    """Fit from the same beginning each time; what came of it, and the trainer."""
    torch.manual_seed(0)
    module = kind(manual)
    trainer = trainer_of(strategy, *callbacks, **options)
    recorder = Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data(), ckpt_path=path, weights_only=weights_only)
    registration = commhub_of(trainer)
    told = [str(one.message) for one in caught if "CommHub" in str(one.message)]
    result = {"bits": bits(module), "global_step": trainer.global_step, "warnings": told}
    if registration is not None:
        result |= {"hook": str(registration), "step": registration.step, "sent": registration.stats.sent_bytes}
        result |= {"stats_steps": registration.stats.steps, "recorded": recorder.sent_bytes(RANKS)}
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


POWERSGD = {"start_step": 2}
QUANTIZE = "quantize_per_tensor(error_feedback=true)"


def powersgd_strategy(**options):
    return OURS.CommHubDDPStrategy("powersgd_rank2", POWERSGD, **CAP, **options)


# The first story.


@scene("first")
def plain():
    return fit(PL.strategies.DDPStrategy(**CAP), keep("plain", save_top_k=-1, filename="{epoch}"))[0]


@scene("first")
def allreduce():
    look = Look()
    result, _ = fit(OURS.CommHubDDPStrategy("allreduce", **CAP), look)
    return result | {"asked": len(look.asked), "buckets": look.buckets}


@scene("first")
def allreduce_callback():
    look = Look()
    callback = OURS.CommHubCallback(commhub.HookType.ALLREDUCE)
    result, _ = fit(PL.strategies.DDPStrategy(**CAP), callback, look)
    return result | {"asked": len(look.asked), "buckets": look.buckets}


@scene("first")
def accumulated():
    look = Look()
    result, _ = fit(OURS.CommHubDDPStrategy("allreduce", **CAP), look, accumulate_grad_batches=2)
    return result | {"asked": len(look.asked), "buckets": look.buckets}


@scene("first")
def accumulated_plain():
    return fit(PL.strategies.DDPStrategy(**CAP), accumulate_grad_batches=2)[0]


@scene("first")
def manual():
    return fit(OURS.CommHubDDPStrategy("allreduce", **CAP), manual=True)[0]


@scene("first")
def manual_plain():
    return fit(PL.strategies.DDPStrategy(**CAP), manual=True)[0]


@scene("first")
def overlapped():
    return fit(OURS.CommHubDDPStrategy("optimizer_overlap", **CAP))[0]


@scene("first")
def local_steps():
    """An averager needs the optimizers, and works on them: the ranks end alike though they stepped apart."""
    hook = "post_local_sgd(start_step=2, period=4, local_gradients=false)"
    result, trainer = fit(OURS.CommHubDDPStrategy(hook, **CAP), max_steps=7)
    trainer.save_checkpoint(FOLDER / "local.ckpt")
    return result


class Scaled(PL.Callback):
    """Whether the hook was given what the precision plugin scales the loss with, and the optimizers of the trainer."""

    seen = None

    def on_train_start(self, trainer, module):
        target = commhub_of(trainer)._session.target
        same = [a is b for a, b in zip(target.optimizers, trainer.optimizers, strict=True)]
        self.seen = {"scaler": target.scaler is trainer.precision_plugin.scaler, "optimizers": same}


@scene("first")
def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = PL.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    look = Scaled()
    result, _ = fit(powersgd_strategy(), look, plugins=[plugin])
    return result | look.seen


@scene("first")
def an_object():
    return fit(OURS.CommHubDDPStrategy(commhub.create("fp16"), **CAP), max_steps=2)[0]


@scene("first")
def named():
    return fit("ddp_commhub_fp16", max_steps=2)[0]


@scene("first")
def powersgd():
    """All of it, with a checkpoint halfway."""
    return fit(powersgd_strategy(), keep("powersgd", save_top_k=-1, filename="{epoch}"))[0]


@scene("first")
def powersgd_half():
    """Half of it, with a copy as the last checkpoint, and one that is written after the fit."""
    result, trainer = fit(powersgd_strategy(), keep("half", filename="{epoch}", save_last=True), epochs=1)
    trainer.save_checkpoint(FOLDER / "half" / "afterwards.ckpt")
    trainer.save_checkpoint(FOLDER / "half" / "weights.ckpt", weights_only=True)
    return result


@scene("first")
def quantize():
    return fit(PL.strategies.DDPStrategy(**CAP), OURS.CommHubCallback(QUANTIZE))[0]


@scene("first")
def quantize_half():
    """Half of it, with a link as the last checkpoint."""
    callback = OURS.CommHubCallback(QUANTIZE)
    return fit(
        PL.strategies.DDPStrategy(**CAP), callback, keep("link", filename="{epoch}", save_last="link"), epochs=1
    )[0]


@scene("first")
def pruned():
    """The best two of four checkpoints stay."""
    callback = keep("pruned", monitor="loss", save_top_k=2, filename="{epoch}")
    return fit(powersgd_strategy(), callback, epochs=4)[0]


@scene("first")
def twice():
    """A second fit of the same trainer begins anew, with a hook object too, which serves one model at a time."""
    strategy = OURS.CommHubDDPStrategy(commhub.create("powersgd_rank2", **POWERSGD), **CAP)
    _, trainer = fit(strategy, epochs=1)
    earlier = strategy.registration
    torch.manual_seed(0)
    trainer.fit(Net(), data())  # no epoch is left: it registers, and ends
    return {"another": strategy.registration is not earlier, "step": strategy.registration.step}


@scene("first")
def scheduled():
    """A run that is saved when another hook has followed goes on as one that was never interrupted."""

    def run(epochs, path=None):
        schedule = {2: "powersgd_rank2(start_step=0)", 6: "fp16"}
        strategy = OURS.CommHubDDPStrategy("allreduce", schedule=schedule, **CAP)
        return fit(strategy, epochs=epochs, path=path)

    whole, _ = run(2)
    half, trainer = run(1)
    trainer.save_checkpoint(FOLDER / "scheduled.ckpt")
    resumed, _ = run(2, FOLDER / "scheduled.ckpt")
    return resumed | {"whole": whole["bits"], "half": half["hook"]}


@scene("first")
def clipped():
    return refusal(lambda: fit(OURS.CommHubDDPStrategy("optimizer_overlap", **CAP), gradient_clip_val=1.0))


@scene("first")
def clipped_callback():
    callback = OURS.CommHubCallback("optimizer_overlap(inner=fp16)")
    return refusal(lambda: fit(PL.strategies.DDPStrategy(), callback, gradient_clip_val=1.0))


@scene("first")
def clipped_later():
    strategy = OURS.CommHubDDPStrategy("fp16", schedule={4: "optimizer_overlap"}, **CAP)
    return refusal(lambda: fit(strategy, gradient_clip_val=1.0))


@scene("first")
def searched():
    """A search for a learning rate trains, and puts everything back before the fit begins."""
    search = PL.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False, attr_name="lr")
    return fit(powersgd_strategy(), search, default_root_dir=FOLDER)[0]


@scene("first")
def gathered():
    """States that travel in pieces; and one that cannot be had."""
    gathering = import_module("commhub_lightning._gathering")
    before, gathering.PIECE = gathering.PIECE, 1000
    found = gathering.gather(lambda: {"own": torch.arange(1000) + RANK, "same": torch.ones(9)}, torch.device("cpu"))
    gathering.PIECE = before

    def state():
        if RANK == 1:
            raise OSError("the disk is gone")
        return {}

    failed = refusal(lambda: gathering.gather(state, torch.device("cpu")))
    sums = None if found is None else [int(one["own"].sum()) for one in found]
    return failed | {"sums": sums, "shared": found is not None and found[0]["same"] is found[1]["same"]}


class Clipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.01, "norm")


@scene("first")
def clipped_by_module():
    return refusal(lambda: fit(OURS.CommHubDDPStrategy("optimizer_overlap", **CAP), kind=Clipping))


@scene("first")
def clipped_compressed():
    return fit(OURS.CommHubDDPStrategy("fp16", **CAP), gradient_clip_val=0.01, max_steps=2)[0]


@scene("first")
def both():
    return refusal(lambda: fit(OURS.CommHubDDPStrategy("fp16"), OURS.CommHubCallback("fp16")))


@scene("first")
def two_callbacks():
    return refusal(lambda: fit("ddp", OURS.CommHubCallback("fp16"), OURS.CommHubCallback("bf16")))


@scene("first")
def foreign_hook():
    strategy = PL.strategies.DDPStrategy(ddp_comm_hook=print)
    return refusal(lambda: fit(strategy, OURS.CommHubCallback("fp16")))


class Fails(PL.Callback):
    """An exception in the sixth step, on some ranks."""

    def __init__(self, *ranks):
        self.ranks = ranks

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 5 and RANK in self.ranks:
            raise KeyError("a mistake of the user's")


def interrupted(*ranks):
    """Where Lightning saves on an exception, and what it then has."""
    saver = PL.callbacks.OnExceptionCheckpoint(FOLDER / "interrupted", filename=f"ranks{len(ranks)}")
    try:
        fit(powersgd_strategy(), Fails(*ranks), saver)
    except KeyError:
        return {"raised": True}
    return {"raised": False}


@scene("first")
def interrupted_everywhere():
    return interrupted(0, 1)


def interrupted_on_one():
    """After all scenes: Lightning's own barrier then waits for the other rank, and fails."""
    import_module("commhub_lightning._gathering").PATIENCE = 2.0
    interrupted(0)


class Asks(PL.Callback):
    """What the core finds on what a user has at hand in training."""

    found = None

    def on_train_start(self, trainer, module):
        self.found = [commhub.registration(one) is commhub_of(trainer) for one in (trainer, module)]


@scene("first")
@scene("smoke")
def found():
    asks = Asks()
    return refusal(lambda: fit("ddp_commhub_fp16", asks, max_steps=1)) | {"found": asks.found}


# The second, in new processes.


@scene("second")
def powersgd_moved():
    return fit(powersgd_strategy(), path=FOLDER / "elsewhere" / "moved.ckpt")[0]


@scene("second")
def powersgd_last():
    return fit(powersgd_strategy(), path=FOLDER / "half" / "last.ckpt")[0]


@scene("second")
def powersgd_afterwards():
    return fit(powersgd_strategy(), path=FOLDER / "half" / "afterwards.ckpt", weights_only=True)[0]


@scene("second")
def powersgd_callback():
    """What the strategy saved, the callback takes up."""
    callback = OURS.CommHubCallback("powersgd_rank2", POWERSGD)
    return fit(PL.strategies.DDPStrategy(**CAP), callback, path=FOLDER / "elsewhere" / "moved.ckpt")[0]


@scene("second")
def quantize_link():
    callback = OURS.CommHubCallback(QUANTIZE)
    return fit(PL.strategies.DDPStrategy(**CAP), callback, path=FOLDER / "link" / "last.ckpt")[0]


@scene("second")
def stateless():
    return fit(powersgd_strategy(), path=FOLDER / "plain" / "epoch=0.ckpt")[0]


@scene("second")
def anew():
    return fit(powersgd_strategy(load_state=False), path=FOLDER / "elsewhere" / "moved.ckpt")[0]


@scene("second")
def unsaved():
    callback = keep("unsaved", filename="{epoch}")
    return fit(powersgd_strategy(save_state=False), callback, epochs=1)[0]


@scene("second")
def other_hook():
    path = FOLDER / "elsewhere" / "moved.ckpt"
    return refusal(lambda: fit(OURS.CommHubDDPStrategy("quantize_per_tensor", **CAP), path=path))


@scene("second")
def other_trainer():
    """Without a hook, what a run with one has saved loads as ever."""
    return fit(PL.strategies.DDPStrategy(**CAP), path=FOLDER / "elsewhere" / "moved.ckpt")[0]


# One process alone.


@scene("alone")
def one_process():
    return fit(powersgd_strategy(), path=FOLDER / "half" / "last.ckpt")[0]


@scene("alone")
def single_device():
    return fit("auto", OURS.CommHubCallback("powersgd_rank2"), path=FOLDER / "half" / "last.ckpt")[0]


@scene("alone")
def sharded():
    """Lightning takes the strategy on a GPU only; the callback looks at its type."""
    callback = OURS.CommHubCallback("fp16")
    trainer = SimpleNamespace(strategy=PL.strategies.FSDPStrategy(), callbacks=[callback])
    return refusal(lambda: callback.setup(trainer, None, "fit"))


# A few of both, for the other package.


@scene("smoke")
def smoke():
    return fit(powersgd_strategy(), keep("smoke", save_top_k=-1, filename="{epoch}"))[0]


@scene("smoke")
def smoke_named():
    return fit("ddp_commhub_fp16", max_steps=2)[0]


@scene("smoke")
def smoke_resumed():
    callback = OURS.CommHubCallback("powersgd_rank2", POWERSGD)
    return fit(PL.strategies.DDPStrategy(**CAP), callback, path=FOLDER / "smoke" / "epoch=0.ckpt")[0]


def main():
    results = {}
    for name, play in SCENES[STORY].items():
        if sys.argv[4:] and name not in sys.argv[4:]:
            continue
        try:
            results[name] = play()
        except Exception:  # the other scenes have their own tests
            results[name] = {"failed": traceback.format_exc()}
    path = FOLDER / f"{STORY}-rank{RANK}.json"
    path.with_suffix(".new").write_text(json.dumps(results, indent=1))
    shutil.move(path.with_suffix(".new"), path)
    if STORY == "second":
        interrupted_on_one()


if __name__ == "__main__":
    main()
