"""Hooks that follow one another by ``schedule=``, and checkpoints that were written under each of them."""

import commhub_accelerate.transformers
from accelerate_runs import STEPS, accelerator, fresh, net, sgd, train, weights
from transformers_runs import trainer
from transformers_runs import weights as trained

import commhub

SCHEDULE = {2: "powersgd(rank=1, start_step=0, min_compression_rate=1.0)", 6: "quantize_per_tensor"}
SAVED = (1, 4, 7)
"""The steps after which there is a checkpoint: one under each of the hooks."""


def scheduled(me):
    """All steps in one run of Accelerate."""
    accel, registration, model, optimizer = _start()
    for step in range(STEPS):
        train(accel, model, optimizer, [step])
        if step + 1 in SAVED:
            accel.save_state(str(me.folder / f"scheduled-{step + 1}"))
    return {"weights": weights(model), "state": registration.state_dict(), "hook": str(registration)}


def scheduled_resumed(me):
    found = {}
    for saved in SAVED:
        accel, registration, model, optimizer = _start(seed=7)
        accel.load_state(str(me.folder / f"scheduled-{saved}"))
        begun = registration.step
        train(accel, model, optimizer, range(begun, STEPS))
        found[saved] = {"weights": weights(model), "state": registration.state_dict(), "hook": str(registration)}
        found[saved]["from"] = begun
    return found


def _start(seed=0):
    fresh()
    accel = accelerator()
    attached = commhub_accelerate.attach(accel, "allreduce", schedule=SCHEDULE)
    model = net(seed)
    model, optimizer = accel.prepare(model, sgd(model))
    return accel, attached.registrations[0], model, optimizer


def trainer_scheduled(me):
    """All steps in one run of the Trainer."""
    made = trainer(me.folder / "t-scheduled", save_strategy="steps", save_steps=1)
    attached = commhub_accelerate.transformers.attach(made, "allreduce", schedule=SCHEDULE)
    made.train()
    registration = attached.registration
    return {"weights": trained(made), "state": registration.state_dict(), "hook": str(registration)}


def trainer_scheduled_resumed(me):
    found = {}
    for saved in SAVED:
        made = trainer(me.folder / f"t-scheduled-{saved}")
        attached = commhub_accelerate.transformers.attach(made, "allreduce", schedule=SCHEDULE)
        made.train(resume_from_checkpoint=str(me.folder / f"t-scheduled/checkpoint-{saved}"))
        registration = attached.registration
        found[saved] = {"weights": trained(made), "state": registration.state_dict(), "hook": str(registration)}
    return found


def schedule_refusals(me):
    """What ``attach`` says of a schedule, by a name for the case."""
    found = {}
    made = trainer(me.folder / "t-unscheduled", max_steps=1)

    def tried(case, call):
        try:
            call()
        except Exception as error:
            found[case] = (type(error).__name__, isinstance(error, commhub.CommhubError), str(error))

    accel, trainers = accelerator(), commhub_accelerate.transformers
    for kind, attach, owner in (("a", commhub_accelerate.attach, accel), ("t", trainers.attach, made)):
        for case, value in {"text": "fp16", "value": {4: "powersgd(rank=0)"}, "name": {4: "fp61"}}.items():
            tried(f"{kind} {case}", lambda a=attach, o=owner, v=value: a(o, "allreduce", schedule=v))
    tried("t early", lambda: trainers.attach(made, "allreduce", schedule={4: "optimizer_overlap"}))
    found["untouched"] = sorted(key for key in (*vars(accel), *vars(made.accelerator)) if "commhub" in key)
    return found


first = (scheduled, trainer_scheduled, schedule_refusals)
second = (scheduled_resumed, trainer_scheduled_resumed)
