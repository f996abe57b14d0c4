"""What goes wrong with Accelerate, and what is said of it."""

import commhub_accelerate
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate_runs import Mean, accelerator, fresh, net, sgd, start, train

import commhub


def loaded_too_early(me):
    """`load_state` before `prepare`: what it says for a checkpoint with hook state, and for one without."""
    accel, _, model, optimizer = start("powersgd_rank2(start_step=0)")
    train(accel, model, optimizer, range(2))
    accel.save_state(str(me.folder / "early"))
    told = []
    for name in ("early", "bare"):
        fresh()
        accel = accelerator()
        commhub_accelerate.attach(accel, "powersgd_rank2(start_step=0)")
        me.said()
        accel.load_state(str(me.folder / name))
        told.append(me.said())
    model = net()
    model, optimizer = accel.prepare(model, sgd(model))
    accel.load_state(str(me.folder / "early"))
    return [*told, me.said()]


def clipped_overlap(me):
    """`clip_grad_norm_` changes gradients that `optimizer_overlap` has used by then."""
    accel, _, model, optimizer = start("optimizer_overlap")
    train(accel, model, optimizer, range(2))
    optimizer.zero_grad()
    accel.backward(model(torch.ones(6, 8)).square().mean())
    accel.clip_grad_norm_(model.parameters(), 0.01)
    try:
        optimizer.step()
    except commhub.CommhubError as error:
        return type(error).__name__, str(error)


def refusals(me):
    """Everything that attach() refuses: what was raised, by a name for the case."""
    found = {}

    def tried(case, call):
        try:
            call()
        except Exception as error:
            found[case] = (type(error).__name__, isinstance(error, commhub.CommhubError), str(error))

    accel = accelerator()
    tried("name", lambda: commhub_accelerate.attach(accel, "powersdg"))
    tried("option", lambda: commhub_accelerate.attach(accel, "powersgd", rnak=2))
    tried("value", lambda: commhub_accelerate.attach(accel, "powersgd(rank=0)"))
    tried("wire", lambda: commhub_accelerate.attach(accel, "allreduce", wire="int3"))
    tried("optimizer", lambda: commhub_accelerate.attach(accel, "fp16", optimizer=None))
    tried("no accelerator", lambda: commhub_accelerate.attach(net(), "fp16"))
    found["untouched"] = sorted(key for key in vars(accel) if "commhub" in key or key.startswith("prepare"))
    commhub_accelerate.attach(accel, "powersgd", wire="bf16", rank=2)
    tried("twice", lambda: commhub_accelerate.attach(accel, "fp16"))
    accel = accelerator()
    accel.prepare(net())
    tried("prepared", lambda: commhub_accelerate.attach(accel, "fp16"))
    for value in ("fp16", "bf16"):
        accel = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=value)])
        tried(f"kwargs {value}", lambda accel=accel: commhub_accelerate.attach(accel, "fp16"))
    accel = accelerator()
    commhub_accelerate.attach(accel, "fp16")
    model = accel.prepare_model(net(), evaluation_mode=True)
    tried("evaluated", lambda: accel.prepare(model))
    accel = accelerator()
    commhub_accelerate.attach(accel, Mean())
    first, second, third = net(1), net(2), net(3)
    kept = accel.prepare(first, sgd(first))
    waits = accel.prepare(third)  # held here, as the first is: Accelerate keeps no model alive
    tried("one object, later", lambda: accel.prepare(sgd(third)))
    tried("one object", lambda: accel.prepare(second, sgd(second)))
    del kept, waits
    fresh()
    accel = Accelerator()
    tried("ranks apart", lambda: commhub_accelerate.attach(accel, "fp16"))
    fresh()
    accel = accelerator()
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        before = accel.state.distributed_type
        accel.state._shared_state["distributed_type"] = type(before)(kind)
        tried(kind, lambda: commhub_accelerate.attach(accel, "fp16"))
        accel.state._shared_state["distributed_type"] = before
    return found


first = (loaded_too_early, clipped_overlap, refusals)
