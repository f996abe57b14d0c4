"""Making a hook work on a group, collectively: choose, agree, connect, prepare. All ranks succeed or all raise."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch

from commhub._errors import RegistrationError
from commhub._version import __version__
from commhub.drivers._stats import Meter
from commhub.protocol._bucket import lay_out
from commhub.protocol._hook import Averager, Hook, LocalSteps, Setup
from commhub.protocol._state import State
from commhub.registry._choosing import Chosen, short_dtype, wire_dtype
from commhub.training.averaging._averaging import Averaging
from commhub.training.averaging._optimizers import check_local, watch_steps
from commhub.training.averaging._timetable import Timetable

from ._agree import Meeting, agree, number_hosts
from ._callbacks import Callbacks
from ._compared import Compared
from ._engine import Engine
from ._trained import Trained

if TYPE_CHECKING:
    from collections.abc import Callable

    from commhub.drivers._driver import Driver

    from ._target import Ground


_at_work: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
"""By the hook's identity: an object's memory belongs to one model."""
_starting: set[int] = set()
"""Those that some thread is about to put to work."""
_taking = threading.Lock()


@attrs.frozen(eq=False)
class Session:
    """A hook at work."""

    chosen: Chosen
    engine: Engine
    wire: torch.dtype | None


def start(
    ground: Ground,
    choose: Callable[[], Chosen],
    former: Engine | None = None,
    *,
    call: str = "register",
    loading: bool = False,
) -> Session:
    """Make the hook that ``choose`` names work on ``ground``; collective.

    Whatever fails on this rank, in ``choose`` too, joins the handshake, so that every rank raises. ``former`` is the
    engine that this one replaces, if any; ``call`` is what the user called.

    Raises:
        HookMismatchError: on all ranks where they disagree.
        RegistrationError: where another rank failed; there the error is the original.
    """
    if former is not None and former.timetable is not None and former.driver.failure is None and not loading:
        former.timetable.let_through()
    with contextlib.ExitStack() as at_end:
        return _start(ground, choose, former, call, at_end)


def _start(
    ground: Ground, choose: Callable[[], Chosen], former: Engine | None, call: str, at_end: contextlib.ExitStack
) -> Session:
    meeting = Meeting.of(ground.group, ground.timeout)
    failure: BaseException | None = None
    facts: dict[str, Any] = {}
    try:
        chosen = choose()
        wire = wire_dtype(chosen.reserved.get("wire"))
        hook = chosen.make() if chosen.kind == "hook" else LocalSteps(cast("Averager", chosen.make()))
        _check_fit(ground, chosen)
        if former is not None and (why := former.driver.in_use()):
            raise RegistrationError(f"the former hook cannot be replaced yet: {why}")
        _take(at_work(hook), chosen.name, former, at_end)
        facts = _facts(ground, chosen, wire)
    except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
        failure = error
    hosts = agree(meeting, call, facts, failure, verify=ground.verify, more=True)
    driver: Driver | None = None
    callbacks, compared = Callbacks(), Compared()
    try:
        driver = make_driver(ground, meeting, chosen.label)
        engine = _prepared(ground, meeting, hook, wire, number_hosts(hosts), driver, callbacks, compared)
        facts = compared.facts() if meeting.size > 1 and ground.verify else {}
    except BaseException as error:  # noqa: BLE001 - the same
        failure, facts = error, {}
    try:
        with compared.told():
            agree(meeting, call, facts, failure, verify=ground.verify)
    except BaseException:
        callbacks.end()
        if driver is not None:
            driver.close()
        raise
    _at_work[id(at_work(hook))] = engine
    module = ground.module()
    if engine.timetable is not None and module is not None:
        engine.timetable.watch(module, ground.optimizers)
    return Session(chosen, engine, wire)


def at_work(hook: Hook) -> Hook | Averager:
    """The object that the user chose: the hook, or the averager that was registered by itself."""
    return hook.averager if isinstance(hook, LocalSteps) else hook


def latest(step: int, engine: Engine, device: torch.device) -> int:
    """The largest of the ranks' step counts: one that failed in a local step is behind; collective."""
    steps = torch.zeros(engine.world_size, dtype=torch.float64, device=device)
    steps[engine.rank] = step
    largest = int(engine.sum(steps).max())
    engine.driver.meter.take()  # no step's figures
    return largest


def stop(engine: Engine) -> None:
    """End a hook's work: its thread and groups are freed, and the object may be registered again."""
    worker = at_work(engine.hook)
    if _at_work.get(id(worker)) is engine:
        del _at_work[id(worker)]
    if engine.timetable is not None:
        engine.timetable.close()
    engine.callbacks.end()
    engine.driver.close()


def _check_fit(ground: Ground, chosen: Chosen) -> None:
    if ground.device.type not in chosen.devices:
        raise RegistrationError(
            f"{chosen.label} works on {', '.join(chosen.devices)}; the gradients are on {ground.device}."
        )
    given = {"optimizer": bool(ground.optimizers), "scaler": ground.scaler is not None}
    for need in chosen.needs:
        if not given.get(need, True):
            raise RegistrationError(f"{chosen.label} needs {need}=; pass it to register().")


def _take(worker: Hook | Averager, name: str, former: Engine | None, at_end: contextlib.ExitStack) -> None:
    """Keep other threads from putting the object to work until this one has, or has failed to."""
    with _taking:
        other = _at_work.get(id(worker))
        elsewhere = other is not None and other is not former and at_work(other.hook) is worker
        if elsewhere or id(worker) in _starting:
            raise RegistrationError(f"this {name} object is at work already. Give each model a hook of its own.")
        _starting.add(id(worker))
    at_end.callback(_starting.discard, id(worker))


def _prepared(
    ground: Ground,
    meeting: Meeting,
    hook: Hook,
    wire: torch.dtype | None,
    hosts: tuple[int, ...],
    driver: Driver,
    callbacks: Callbacks,
    compared: Compared,
) -> Engine:
    names = tuple(name for name, _ in ground.parameters)
    tensors = [parameter for _, parameter in ground.parameters]
    state = State(names)
    engine = Engine(
        hook=hook,
        state=state,
        driver=driver,
        rank=meeting.rank,
        world_size=meeting.size,
        wire=wire,
        callbacks=callbacks,
    )
    averagers: list[tuple[Averager, Setup]] = []
    prepare = getattr(hook, "prepare", None)
    if prepare is not None:
        setup = Setup(
            names=names,
            shapes=tuple(tuple(t.shape) for t in tensors),
            dtypes=tuple(t.dtype for t in tensors),
            strides=tuple(span.stride for span in lay_out(names, tensors)),
            parameters=tuple(tensors),
            device=ground.device,
            rank=meeting.rank,
            world_size=meeting.size,
            hosts=hosts,
            unused=ground.unused,
            optimizers=ground.optimizers,
            scaler=ground.scaler,
            state=state,
            connect=driver.connect,
            after_step=callbacks.after_step.append,
            at_end=callbacks.at_end.append,
            average=averagers.append,
            agree=compared.add,
        )
        with torch.no_grad():
            prepare(setup)
    if averagers:
        engine.timetable = _timetable(ground, engine, averagers)
    return engine


def _timetable(ground: Ground, engine: Engine, averagers: list[tuple[Averager, Setup]]) -> Timetable:
    if len(averagers) > 1:
        raise RegistrationError(f"the hook brings {len(averagers)} averagers; one serves a registration.")
    averager, setup = averagers[0]
    module = ground.module()
    if engine.world_size > 1 and module is not None:
        check_local(ground.optimizers, module.parameters())
        engine.callbacks.at_end.append(watch_steps(module))
    averaging = Averaging(
        averager=averager,
        setup=setup,
        engine=weakref.ref(engine),
        trained=Trained(ground.module),
        optimizers=ground.optimizers,
    )
    if averaging.optimizer_state and not ground.optimizers:
        raise RegistrationError("to average the optimizer's state, pass optimizer= to register().")
    engine.callbacks.after_step.append(averaging.look)
    return Timetable(averager, averaging, engine.world_size, averaging.prepared)


def make_driver(ground: Ground, meeting: Meeting, label: str) -> Driver:
    """The driver for the gradients' device."""
    if ground.device.type == "cuda":
        from commhub.drivers._stream import CudaStreams, StreamDriver

        return StreamDriver(ground.group, CudaStreams(ground.device), Meter(), label=label)
    from commhub.drivers._board import FailureBoard
    from commhub.drivers._gloo import GlooCommunicator
    from commhub.drivers._signature import Signatures
    from commhub.drivers._thread import ThreadDriver

    patience = ground.timeout + 5.0  # the driver's own timeout comes first, and knows what it was waiting for
    try:
        communicator = GlooCommunicator(meeting.branch("gloo"), meeting.rank, meeting.size, patience)
    except RuntimeError as error:
        raise RegistrationError(f"the ranks could not be connected: {error}") from error
    board = FailureBoard(meeting.branch("board"), meeting.rank)
    signatures = Signatures(meeting.branch("signatures"), meeting.rank, meeting.size)
    return ThreadDriver(communicator, board, signatures, Meter(), timeout=ground.timeout, label=label)


def _facts(ground: Ground, chosen: Chosen, wire: torch.dtype | None) -> dict[str, Any]:
    described = [[name, list(p.shape), str(p.dtype), list(p.stride())] for name, p in ground.parameters]
    return {
        "hook": chosen.name,
        "version": f"{chosen.distribution} {chosen.version}".strip(),
        **{f"version of {name}": version for name, version in _others(chosen).items()},
        **{f"option {key}": _shown(value) for key, value in chosen.options.items()},
        "wire": None if wire is None else short_dtype(wire),
        "parameters": described,
        **ground.traits,
    }


def _others(chosen: Chosen) -> dict[str, str]:
    """The versions of what else takes part: the core, and the packages of nested hooks."""
    return {n: v for n, v in {**chosen.packages(), "commhub": __version__}.items() if n != chosen.distribution}


def _shown(value: object) -> str:
    """An option's value as ranks compare it: equal dicts alike, in whatever order they were written."""
    return repr(dict(sorted(value.items(), key=repr)) if isinstance(value, dict) else value)
