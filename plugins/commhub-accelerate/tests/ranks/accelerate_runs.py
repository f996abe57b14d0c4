"""What is done with Accelerate on each rank."""

import gc
import weakref

import commhub_accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin
from main import fresh
from torch import nn

import commhub
from commhub.testing._recorded import Recorder

STEPS = 8
HOOKS = {
    "powersgd": "powersgd(rank=1, start_step=1, min_compression_rate=1.0)",
    "quantize": "quantize_per_tensor",
}


class Mean:
    """A hook object."""

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


class Net(nn.Module):
    """A few layers, some of them alike, and a dropout so that random numbers matter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.last = nn.Linear(24, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(nn.functional.dropout(x, 0.1, self.training))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def accelerator(**more):
    """One whose DDP models have several buckets; the compiler, which splits graphs by them, takes no small ones."""
    cap = 25 if "dynamo_plugin" in more else 0.002
    return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=cap)], **more)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def start(hook=None, *, seed=0, **more):
    """An accelerator with a hook, and a prepared model and optimizer."""
    fresh()
    accel = accelerator(**more)
    attached = None if hook is None else commhub_accelerate.attach(accel, hook)
    model = net(seed)
    model, optimizer = accel.prepare(model, sgd(model))
    return accel, attached, model, optimizer


def train(accel, model, optimizer, steps):
    for step in steps:
        torch.manual_seed(1000 * dist.get_rank() + step)
        x, y = torch.randn(6, 8), torch.randn(6, 4)
        with accel.accumulate(model):
            optimizer.zero_grad()
            accel.backward((model(x) - y).square().mean())
            optimizer.step()


def weights(model):
    return {name.replace("_orig_mod.", ""): p.detach().clone() for name, p in model.state_dict().items()}


def counted(registration):
    """How often the hook asked for a collective, as a list that grows."""
    calls = []
    registration.observe(lambda bucket, requests: calls.append((bucket.step, bucket.index)))
    return calls


def plain(me):
    accel, _, model, optimizer = start()
    train(accel, model, optimizer, range(STEPS))
    return weights(accel.unwrap_model(model))


def allreduce(me):
    accel, attached, model, optimizer = start("allreduce")
    (registration,) = attached.registrations
    assert commhub.registration(model) is registration
    calls = counted(registration)
    train(accel, model, optimizer, range(STEPS))
    found = {"weights": weights(accel.unwrap_model(model)), "calls": calls, "buckets": buckets(model)}
    return {**found, "steps": registration.step}


def buckets(model):
    """How many buckets DDP has, as it says itself."""
    return len(model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))


def accumulation(me):
    found = {}
    for every in (1, 2):
        accel, attached, model, optimizer = start("fp16", gradient_accumulation_steps=every)
        calls = counted(attached.registrations[0])
        train(accel, model, optimizer, range(2, 2 + STEPS))
        found[every] = (attached.registrations[0].step, len(calls), buckets(model))
    return found


def uninterrupted(me):
    found = {}
    for name, hook in HOOKS.items():
        config = ProjectConfiguration(
            project_dir=str(me.folder / name), automatic_checkpoint_naming=True, total_limit=2
        )
        accel, attached, model, optimizer = start(hook, project_config=config)
        recorder = Recorder()
        for step in range(STEPS):
            train(accel, model, optimizer, [step])
            if step in (1, 2, 3):  # the first one is pruned
                accel.save_state()
        state = attached.registrations[0].state_dict()
        found[name] = {"weights": weights(accel.unwrap_model(model)), "state": state}
        found[name]["sent"] = attached.registrations[0].stats.sent_bytes, recorder.sent_bytes(dist.get_world_size())
    return found


def resumed(me):
    found = {}
    for name, hook in HOOKS.items():
        config = ProjectConfiguration(project_dir=str(me.folder / name), automatic_checkpoint_naming=True)
        accel, attached, model, optimizer = start(hook, seed=7, project_config=config)
        accel.load_state()
        step = attached.registrations[0].step
        train(accel, model, optimizer, range(step, STEPS))
        state = attached.registrations[0].state_dict()
        found[name] = {"weights": weights(accel.unwrap_model(model)), "state": state, "from": step}
    return found


def without_state(me):
    """Resume from a checkpoint that was written without a hook, and from one of another hook."""
    accel, _, model, optimizer = start()
    train(accel, model, optimizer, range(2))
    accel.save_state(str(me.folder / "bare"))
    accel, _, model, optimizer = start("fp16")
    me.said()
    accel.load_state(str(me.folder / "bare"))
    said = me.said()
    train(accel, model, optimizer, range(2, 4))
    try:
        accel.load_state(str(me.folder / "powersgd/checkpoints/checkpoint_2"))
    except commhub.CheckpointError as error:
        return said, str(error)


def two_models(me):
    """Two models with an optimizer each; parameters are averaged after the steps of the right one."""
    accel = accelerator()
    hook = "post_local_sgd(start_step=0, period=2, local_gradients=false)"
    attached = commhub_accelerate.attach(accel, hook)
    ours, theirs = net(1), net(2)
    ours, second, theirs, first = accel.prepare(ours, sgd(theirs), theirs, sgd(ours))
    train(accel, ours, first, range(5))
    train(accel, theirs, second, range(3))
    averaged = [weights(ours), weights(theirs)]
    train(accel, ours, first, range(5, 6))
    train(accel, theirs, second, range(3, 4))
    apart = [weights(ours), weights(theirs)]
    steps = [registration.step for registration in attached.registrations]
    accel.save_state(str(me.folder / "two"))
    for registration in attached.registrations:
        registration.load_state_dict({**registration.state_dict(), "step": 0})
    accel.load_state(str(me.folder / "two"))
    again = [registration.step for registration in attached.registrations]
    folders = sorted(path.name for path in (me.folder / "two").iterdir() if path.is_dir())
    return {"averaged": averaged, "apart": apart, "steps": steps, "again": again, "folders": folders}


def one_after_the_other(me):
    """Models and optimizers that are prepared apart, or not at all."""
    found = {}
    accel = accelerator()
    attached = commhub_accelerate.attach(accel, "post_local_sgd(start_step=0, period=2)")
    model = accel.prepare(net())
    found["model alone"] = len(attached.registrations)
    halves = [
        list(part.parameters()) for part in (model.module.first, nn.Sequential(model.module.blocks, model.module.last))
    ]
    first = accel.prepare(torch.optim.SGD(halves[0], lr=0.1))
    found["half"] = len(attached.registrations)
    second = accel.prepare(torch.optim.SGD(halves[1], lr=0.1))
    found["all"] = len(attached.registrations)
    for _ in range(2):
        first.zero_grad(), second.zero_grad()
        accel.backward(model(torch.full((2, 8), float(me.rank))).square().mean())
        first.step(), second.step()
    found["averaged"] = weights(model)

    accel = accelerator()
    attached = commhub_accelerate.attach(accel, "fp16")
    model = accel.prepare_model(net())
    optimizer = sgd(model)
    with torch.no_grad():
        model(torch.zeros(1, 8))
    model.eval()
    if me.rank == 0:
        model.module(torch.zeros(1, 8))
    found["evaluated"] = len(attached.registrations)
    model.train()
    train(accel, model, optimizer, range(2))
    found["trained"] = [registration.step for registration in attached.registrations]
    return found


def again(me):
    """Prepared twice; a new optimizer for the same model; memory freed and something else prepared."""
    found = {}
    accel, attached, model, optimizer = start("powersgd_rank2(start_step=0)")
    (registration,) = attached.registrations
    same = accel.prepare(model, optimizer)
    found["twice"] = same[0] is model and attached.registrations == (registration,)
    train(accel, model, optimizer, range(2))
    accel.free_memory()
    me.said()
    model, optimizer = accel.prepare(model, sgd(model))
    found["new optimizer"] = (attached.registrations[0] is registration, me.said())
    train(accel, model, optimizer, range(2))
    gone = weakref.ref(model), weakref.ref(registration)
    model, optimizer, registration, same = *accel.free_memory(model, optimizer), None, None
    gc.collect()
    found["gone"] = [one() is None for one in gone]
    found["none left"] = attached.registrations
    other = net(3)
    other, optimizer = accel.prepare(other, sgd(other))
    train(accel, other, optimizer, range(2))
    found["other"] = [one.step for one in attached.registrations]
    attached.detach()
    accel.free_memory()
    found["detached"] = sorted(vars(accel).keys() & {"prepare", "prepare_model", "prepare_optimizer"})
    return found


def compiled(me):
    found = {}
    plugins = {
        "whole": {"backend": "eager"},
        "regional": {"backend": "eager", "use_regional_compilation": True},
    }
    for name, plugin in plugins.items():
        results = []
        for hook in (None, "allreduce"):
            accel, attached, model, optimizer = start(hook, dynamo_plugin=TorchDynamoPlugin(**plugin))
            train(accel, model, optimizer, range(4))
            results.append(weights(accel.unwrap_model(model, keep_torch_compile=False)))
        found[name] = (*results, type(model).__name__, [one.step for one in attached.registrations])
        torch.compiler.reset()
    return found


def compiled_and_late(me):
    """A compiled model whose optimizer is never prepared: registered at the first forward."""
    accel = accelerator(dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    attached = commhub_accelerate.attach(accel, "fp16")
    model = accel.prepare(net())
    train(accel, model, sgd(model), range(3))
    torch.compiler.reset()
    return [one.step for one in attached.registrations]


def overlap(me):
    accel, _, model, optimizer = start("optimizer_overlap")
    train(accel, model, optimizer, range(STEPS))
    return weights(accel.unwrap_model(model))


def found_by_the_core(me):
    accel, attached, *_ = start("fp16")
    bare = accelerator()
    try:
        commhub.register(bare, "fp16")
    except commhub.CommhubError as error:
        told = str(error)
    return commhub.registration(accel) is attached.registrations[0], told


def alone(me):
    """In one process."""
    accel, attached, model, optimizer = start("powersgd_rank2")
    said = me.said()
    for _ in range(2):
        optimizer.zero_grad()
        accel.backward(model(torch.zeros(2, 8)).square().mean())
        optimizer.step()
    accel.save_state(str(me.folder / "alone"))
    accel.load_state(str(me.folder / "alone"))
    return said + me.said(), attached.registrations


first = (
    plain,
    allreduce,
    accumulation,
    uninterrupted,
    without_state,
    two_models,
    one_after_the_other,
    again,
    compiled,
    compiled_and_late,
    overlap,
    found_by_the_core,
)
second = (resumed,)
single = (alone,)
