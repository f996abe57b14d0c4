"""Whatever a public call is given, it works or raises a CommhubError; and no public call is left out of this."""

import concurrent.futures
import contextlib
import inspect
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import testing
from commhub.checkpoint import HookState
from commhub.drivers._simulator import Simulation
from commhub.training._manual import ManualRegistration

from .values import BAD, complaints

TENSOR = torch.ones(4)
SPEC = {"name": "foo", "summary": "One line.", "factory": "foo:Foo"}
ALONE = {
    "AllGather": (commhub.AllGather, {"tensor": TENSOR}),
    "AllReduce": (commhub.AllReduce, {"tensor": TENSOR}),
    "AllToAll": (commhub.AllToAll, {"tensor": TENSOR}),
    "Broadcast": (commhub.Broadcast, {"tensor": TENSOR}),
    "ReduceScatter": (commhub.ReduceScatter, {"tensor": TENSOR}),
    "AveragerSpec": (commhub.AveragerSpec, SPEC),
    "AveragerSpec.option": (commhub.AveragerSpec(**SPEC).option, {"name": "foo"}),
    "HookSpec": (commhub.HookSpec, SPEC),
    "HookSpec.option": (commhub.HookSpec(**SPEC).option, {"name": "foo"}),
    "Option": (commhub.Option, {"name": "foo", "type": int}),
    "Option.convert": (commhub.Option(name="foo", type=float).convert, {}),
    "Network": (commhub.Network, {}),
    "Network.of": (commhub.Network.of, {}),
    "Network.parse": (commhub.Network.parse, {}),
    "Network.seconds": (commhub.Network(1e9).seconds, {}),
    "Network.occupied": (commhub.Network(1e9).occupied, {}),
    "State": (commhub.State, {"names": ("w",)}),
    "ModelSpec": (commhub.ModelSpec, {"type": "weaver.Trainer", "advice": "Use that."}),
    "State.local": (commhub.State(("w",)).local, {}),
    "State.shared": (commhub.State(("w",)).shared, {}),
    "Subgroup": (commhub.Subgroup, {"ranks": (0,)}),
    "checked": (commhub.checked, {"hook": "allreduce"}),
    "comm_hook": (commhub.comm_hook, {"begin": commhub.register}),
    "create": (commhub.create, {"hook": "allreduce"}),
    "hooks": (commhub.hooks, {}),
    "info": (commhub.info, {}),
    "installed": (commhub.installed, {}),
    "registration": (commhub.registration, {}),
    "simulate": (commhub.simulate, {"hook": "allreduce", "gradients": [[TENSOR], [TENSOR]]}),
    "register": (commhub.register, {"model": None, "hook": "allreduce"}),
    "manual": (commhub.manual, {"module": torch.nn.Linear(2, 2), "hook": "allreduce"}),
    "HookState": (HookState, {}),
    "HookInfo.as_dict": (commhub.info("allreduce").as_dict, {}),
    "HookType": (commhub.HookType.ALLREDUCE, {"model": None}),
    "testing.check_hook": (testing.check_hook, {"hook": "allreduce", "where": (), "minimum": 0}),
    "testing.parametrize_with_checks": (
        testing.parametrize_with_checks,
        {"hooks": ["allreduce"], "where": ("static",)},
    ),
}
"""Calls that need no process group, or are made without one here, with arguments that are right."""

EXCUSED = {
    "Averager": "a protocol",
    "Hook": "a protocol",
    "Scatterer": "a protocol",
    "Exchange": "a type, for annotations",
    "Collective": "what kinds of collectives derive from, and never yielded itself",
    "Bucket": "made by the core; its methods are called by hooks, whose errors become HookErrors",
    "Setup": "made by the core",
    "HookInfo": "made by the core",
    "Registration": "made by register()",
    "hookimpl": "pluggy's decorator",
    "relay": "a generator for use inside a hook, whose errors become HookErrors",
    "State.inner": "for hooks inside others, made by create()",
    "toolkit": "parts for hooks, used inside them",
    **dict.fromkeys(
        [f"testing.{name}" for name in ("CheckResult", "Rank", "RankError", "RankFailure", "RankResult", "Run")],
        "made by the harness",
    ),
    **dict.fromkeys(
        [f"testing.{name}" for name in ("Branches", "EveryKind", "batches", "mlp", "train", "TemporaryPlugin")]
        + [f"testing.{name}" for name in ("Largest", "Living", "Watched", "temporary_plugin")]
        + [f"testing.{name}" for name in ("assert_equal_across_ranks", "bitwise_equal")],
        "a test's own material: what it is given wrongly is a mistake of that test, and told as Python and torch do",
    ),
    "testing.RankPool": "starts processes; tests/testing/test_rank_pool.py has what it is given wrongly",
    "testing.current": "a RuntimeError outside of a rank: there is no test for anybody to catch it in",
}
FACES = [
    commhub.AveragerSpec,
    commhub.HookInfo,
    commhub.HookSpec,
    commhub.Network,
    commhub.Option,
    commhub.Registration,
    ManualRegistration,
    Simulation,
    HookState,
]
REMOVED_MAY = {"close"}
"""What of a registration may be called after ``remove``; attributes may be read."""


def public(kind):
    """The names of a class's public methods."""
    return {
        name for name, one in inspect.getmembers(kind, callable) if not name.startswith("_") and inspect.isroutine(one)
    }


def called():
    """The names of all public calls."""
    names = {name for name in commhub.__all__ if not name.endswith("Error")} | {"HookState", "Registration"}
    names |= {f"testing.{name}" for name in testing.__all__}
    for kind in FACES:
        names |= {f"{kind.__name__}.{name}" for name in public(kind)}
    return names


def test_every_public_call_has_its_row():
    own = {f"{k.__name__}.{name}" for k in (commhub.Registration, ManualRegistration) for name in rows(None, "")}
    inherited = {f"HookState.{name}" for name in ("state_dict", "load_state_dict")}
    missing = called() - ALONE.keys() - EXCUSED.keys() - own - inherited
    assert not missing, f"give each a row here, or a reason in EXCUSED: {sorted(missing)}"


@pytest.mark.parametrize("name", ALONE)
def test_what_is_called_wrongly_without_a_process_group_is_a_commhub_error(name):
    function, good = ALONE[name]
    assert "\n".join(complaints(name, function, good)) == ""


def rows(registration, folder):
    """The calls of a registration, each with arguments that are right."""
    good = {
        "swap": {"hook": "allreduce"},
        "schedule": {"hooks": {}},
        "observe": {},
        "report": {},
        "timeline": {},
        "emulate": {"network": None},
        "load_state_dict": {},
        "save": {"directory": folder},
        "load": {"directory": folder},
        "state_dict": {},
        "finish": {},
        "average": {},
        "remove": {},
        "close": {},
    }
    return good if registration is None else {name: row for name, row in good.items() if hasattr(registration, name)}


def net():
    torch.manual_seed(0)
    return DistributedDataParallel(torch.nn.Linear(4, 4))


def made(kind):
    return commhub.register(net(), "allreduce") if kind == "ddp" else commhub.manual(net().module, "allreduce")


def walk_alone(folder):
    """On one rank: what registrations are given; then after ``remove``, and after the process group's end."""
    with contextlib.chdir(folder):  # odd directories are written to
        return walk(folder)


def walk(folder):
    told = complaints("register", commhub.register, {"model": net(), "hook": "allreduce"})
    told += complaints("HookType", commhub.HookType.ALLREDUCE, {"model": net()})
    told += complaints("manual", commhub.manual, {"module": torch.nn.Linear(4, 4), "hook": "allreduce"})
    kept = []
    for kind in ("ddp", "manual"):
        registration = made(kind)
        for name, good in rows(registration, folder).items():
            if name not in {"remove", "close"}:
                told += complaints(f"{kind}.{name}", getattr(registration, name), good)
        told += complaints("HookState.load_state_dict", HookState(registration).load_state_dict, {})
        registration.remove()
        told += refused(f"removed {kind}", registration, folder)
        kept.append(made(kind))
    dist.destroy_process_group()
    for registration in kept:
        for name, right in rows(registration, folder).items():
            good = {"state": {}} if name == "load_state_dict" else right
            told += complaints(f"without a group {name}", getattr(registration, name), good)
            told += calls_badly(f"without a group {name}", getattr(registration, name), good)
        registration.close()
    told += complaints("register without a group", commhub.register, {"model": None, "hook": "allreduce"})
    return told


def calls_badly(name, function, good):
    """What is wrong with a call that is given what is right, and may end in a CommhubError only."""
    try:
        function(**good)
    except commhub.CommhubError:
        return []
    except Exception as error:
        return [f"{name}: {type(error).__name__}: {error}"]
    return []


def refused(what, registration, folder):
    """The calls that are not refused after ``remove``, though they should be; its attributes can be read."""
    told = []
    assert str(registration)
    assert repr(registration)
    assert registration.stats.steps == 0
    assert [registration.name, registration.step, registration.options, registration.hook]
    for name, good in rows(registration, folder).items():
        if name in REMOVED_MAY:
            getattr(registration, name)(**good)
            continue
        good = {"state": {}} if name == "load_state_dict" else good
        try:
            getattr(registration, name)(**good)
            told.append(f"{what}: {name} works")
        except commhub.RegistrationError as error:
            told += [] if "was removed" in str(error) else [f"{what}: {name}: {error}"]
    return told


def test_what_a_registration_is_given_wrongly_is_a_commhub_error(ranks, tmp_path):
    (told,) = ranks(walk_alone, 1, tmp_path)
    assert "\n".join(told) == ""


def on_a_model(kind, hook="allreduce"):
    """A registration, and its model, which lives as long as it is held."""
    model = net() if kind == "ddp" else net().module
    return (commhub.register if kind == "ddp" else commhub.manual)(model, hook), model


def every_call(what, registration, model, folder):
    """What is wrong with each call on a registration, given what is right, and with registering anew."""
    enter = commhub.manual if isinstance(registration, ManualRegistration) else commhub.register
    first = next(iter(inspect.signature(enter).parameters))
    told = []
    for name, right in rows(registration, folder).items():
        if name == "remove":
            told += calls_badly(f"{what}: {enter.__name__}", enter, {first: model, "hook": "fp16"})
        good = {"state": {}} if name == "load_state_dict" else right
        told += calls_badly(f"{what}: {name}", getattr(registration, name), good)
    return told


def halved(module):
    module.to(torch.bfloat16)


def on_meta(module):
    module.to("meta")


def replaced(module):
    module.weight = torch.nn.Parameter(torch.zeros(4, 4))


def resized(module):
    module.weight.data = torch.zeros(5, 4)
    module.bias.data = torch.zeros(5)


def gone(module):
    module.weight = module.bias = None


def frozen(module):
    module.requires_grad_(False)


def grown(module):
    module.more = torch.nn.Linear(4, 4)


def lazy(module):
    module.more = torch.nn.LazyLinear(4)


def itself_sparse(module):
    module.weight = torch.nn.Parameter(torch.zeros(4, 4).to_sparse())


def in_inference(module):
    with torch.inference_mode():
        module.weight = torch.nn.Parameter(torch.zeros(4, 4))


def sparse_gradient(module):
    module.weight.grad = torch.zeros(4, 4).to_sparse()


def spoken_for(module):
    module.kept = [DistributedDataParallel(module)]  # wrapped again


def parametrized(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Identity())


CHANGES = [
    *(halved, on_meta, replaced, resized, gone, frozen, grown, lazy, itself_sparse, in_inference, sparse_gradient),
    *(spoken_for, parametrized),
]
"""What users do to a module that has a hook."""


def changed(folder):
    """After each change, every call on a registration, and the ways to another one."""
    told = []
    for kind, hook in itertools.product(("ddp", "manual"), ("allreduce", "periodic(period=1)")):
        for change in CHANGES:
            registration, model = on_a_model(kind, hook)
            if kind == "manual":
                registration.average()
            change(getattr(model, "module", model))
            told += every_call(f"{change.__name__} {kind} {hook}", registration, model, folder)
    return told


def test_calls_on_a_model_that_was_changed_end_in_a_commhub_error_or_well(ranks, tmp_path):
    (told,) = ranks(changed, 1, tmp_path)
    assert "\n".join(told) == ""


class Spoilt:
    """Cannot be prepared, or fails in a step."""

    def __init__(self, where):
        self.where = where

    def prepare(self, setup):
        if self.where == "prepare":
            raise ValueError("spoilt")

    def reduce(self, bucket):
        raise ValueError("spoilt")
        yield


def after_failures(folder):
    """Calls on a registration whose swap, load or step has failed; each works or is refused by a CommhubError."""
    told = []
    for kind in ("ddp", "manual"):
        for failing in ("swap", "prepare", "load", "step"):
            registration, model = on_a_model(kind)
            with contextlib.suppress(commhub.CommhubError):
                if failing == "load":
                    registration.load(folder / "nothing")
                elif failing == "swap":
                    registration.swap("no such hook")
                else:
                    registration.swap(Spoilt(failing))
                    model(torch.ones(2, 4)).sum().backward()
                    registration.average()
            told += every_call(f"{kind} after a failed {failing}", registration, model, folder)
    return told


def in_a_thread(function, *given):
    """What the function returns, called in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *given).result(60)


def from_other_threads(folder):
    """Calls from another thread than the one that registered: between steps, and while one is under way."""
    told = []
    for kind in ("ddp", "manual"):
        registration, model = on_a_model(kind)
        told += in_a_thread(every_call, f"{kind} in a thread", registration, model, folder)

        told += in_a_step(kind, folder)
    return told


def in_a_step(kind, folder):
    registration, model = on_a_model(kind)
    told = []
    end = registration.observe(lambda *_: told.extend(every_call(f"{kind} in a step", registration, model, folder)))
    with contextlib.suppress(commhub.CommhubError):
        model(torch.ones(2, 4)).sum().backward()
        if kind == "manual":
            registration.average()
    end()
    registration.close()
    return told


@pytest.mark.parametrize("walked", [after_failures, from_other_threads])
def test_calls_at_other_times_and_places_end_in_a_commhub_error_or_well(ranks, walked, tmp_path):
    (told,) = ranks(walked, 1, tmp_path)
    assert "\n".join(told) == ""


def on_one_rank(folder):
    """Rank 1 alone gives each bad value; both must raise within seconds, and training goes on."""
    model, wrong = net(), dist.get_rank() == 1
    registration = commhub.register(model, "allreduce", timeout=30.0)
    told = []
    cases = [(commhub.register, {"model": model, "hook": "allreduce"}, parameter, kind) for parameter, kind in REGISTER]
    cases += [
        (registration.swap, {"hook": "allreduce"}, "hook", "unspeakable"),
        (registration.schedule, {"hooks": {}}, "hooks", "minus"),
        (registration.schedule, {"hooks": {}}, "hooks", "odd dict"),
        (registration.save, {"directory": folder}, "directory", "none"),
        (registration.load, {"directory": folder}, "directory", "nan"),
    ]
    registration.save(folder)
    for function, good, parameter, kind in cases:
        began = time.monotonic()
        try:
            function(**{**good, parameter: BAD[kind] if wrong else good.get(parameter)})
            told.append(f"{function.__name__}({parameter}={kind}) works")
        except commhub.CommhubError:
            pass
        if time.monotonic() - began > 5:
            told.append(f"{function.__name__}({parameter}={kind}) took {time.monotonic() - began:.1f} s")
    model(torch.full((1, 4), float(dist.get_rank()))).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.full((4, 4), 0.5))
    return told


REGISTER = [
    ("model", "minus"),
    ("hook", "minus"),
    ("hook", "surrogate"),
    ("process_group", "text"),
    ("optimizer", "unspeakable"),
    ("scaler", "minus"),
    ("wire", "dict"),
    ("verify", "none"),
    ("timeout", "long"),
    ("timeout", "nan"),
    ("timeout", "text"),
]


def test_a_bad_value_on_one_rank_is_an_error_on_all_and_training_goes_on(ranks, tmp_path):
    assert ranks(on_one_rank, 2, tmp_path) == [[], []]
