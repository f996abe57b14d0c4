"""A loss scaler in Accelerate: one of torch's for the CPU, put where Accelerate keeps the one that it makes on GPUs."""

import commhub_accelerate
import torch
import torch.distributed as dist
from accelerate_runs import HOOKS, STEPS, accelerator, fresh, net, sgd, weights

import commhub

BAD = (3, 6)
"""The steps in which one rank, another one each time, has gradients that are not finite."""
SAVED = 5
OVERLAP = {"none": None, "allreduce": "allreduce", "overlap": "optimizer_overlap"}


def start(hook, seed=0):
    """An accelerator whose scaler doubles its scale after every two good steps, and what it has prepared."""
    fresh()
    accel = accelerator()
    accel.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    attached = None if hook is None else commhub_accelerate.attach(accel, hook)
    model = net(seed)
    model, optimizer = accel.prepare(model, sgd(model))
    return accel, attached, model, optimizer


def train(accel, model, optimizer, steps, told):
    for step in steps:
        torch.manual_seed(1000 * dist.get_rank() + step)
        x, y = torch.randn(6, 8), torch.randn(6, 4)
        before = weights(model)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if step in BAD and dist.get_rank() == BAD.index(step):
            loss = loss * float("inf")
        accel.backward(loss)
        accel.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        stands = all(torch.equal(value, before[name]) for name, value in weights(model).items())
        told.append({"skipped": accel.optimizer_step_was_skipped, "stands": stands, "scale": accel.scaler.get_scale()})


def tensors(state):
    """All tensors in a nest of dicts and lists."""
    if isinstance(state, torch.Tensor):
        return [state]
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [found for value in inside for found in tensors(value)]


def ending(accel, attached, model, optimizer):
    """What a run has come to."""
    found = {"weights": weights(accel.unwrap_model(model)), "optimizer": optimizer.optimizer.state_dict()}
    found["scaler"] = accel.scaler.state_dict()
    if attached is not None:
        found["hook"] = attached.registrations[0].state_dict()
        found["finite"] = all(bool(t.isfinite().all()) for t in tensors(found["hook"]) if t.is_floating_point())
        found["given"] = commhub.registration(model)._session.target.scaler is accel.scaler
    return found


def scaled(me):
    """All steps in one run, with a checkpoint between the two bad ones."""
    found = {}
    for name, hook in HOOKS.items():
        run, told = start(hook), []
        train(run[0], *run[2:], range(SAVED), told)
        run[0].save_state(str(me.folder / f"scaled-{name}"))
        train(run[0], *run[2:], range(SAVED, STEPS), told)
        found[name] = ending(*run) | {"told": told}
    return found


def scaled_resumed(me):
    found = {}
    for name, hook in HOOKS.items():
        run, told = start(hook, seed=7), []
        run[0].load_state(str(me.folder / f"scaled-{name}"))
        train(run[0], *run[2:], range(SAVED, STEPS), told)
        found[name] = ending(*run) | {"told": told}
    return found


def scaled_overlap(me):
    """With a scaler `optimizer_overlap` waits for `step()`, and ends where the plain average and no hook do."""
    found = {}
    for name, hook in OVERLAP.items():
        run, told = start(hook), []
        train(run[0], *run[2:], range(STEPS), told)
        found[name] = {"weights": ending(*run)["weights"], "told": told}
    return found


first = (scaled, scaled_overlap)
second = (scaled_resumed,)
