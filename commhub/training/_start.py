"""Making a hook work on a group, collectively: choose, agree, connect, prepare. All ranks succeed or all raise."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist

from commhub._errors import CommhubError, RegistrationError, described
from commhub.drivers._driver import make_driver
from commhub.drivers._meeting import Unmet
from commhub.protocol._hook import is_averager
from commhub.protocol._setup import Setup
from commhub.protocol._state import State
from commhub.protocol._wire import wire_dtype
from commhub.training.averaging._averaging import Averaging
from commhub.training.averaging._optimizers import check_local, watch_steps
from commhub.training.averaging._timetable import Timetable
from commhub.training.rendezvous._agree import Rendezvous, agree, number_hosts
from commhub.training.rendezvous._comparisons import Comparisons
from commhub.training.rendezvous._everywhere import HASTE, LATER, all_ranks, among
from commhub.training.steps._callbacks import Callbacks
from commhub.training.steps._engine import Engine

from ._elsewhere import Elsewhere
from ._facts import facts_of
from ._fit import made
from ._session import Session, at_work, taken
from ._trained import Trained

if TYPE_CHECKING:
    from collections.abc import Callable

    from commhub.drivers._driver import Driver
    from commhub.protocol._hook import Averager, Hook
    from commhub.registry._recipe import Recipe

    from ._target import Target


_REFUSED = 2.0
"""Seconds that a rank waits for its peers which has nothing to register."""
_REMOVED = 10.0
"""Seconds that it waits, at most, which calls on a registration that was removed."""


def start(
    target: Target,
    choose: Callable[[], Recipe],
    former: Session | None = None,
    *,
    call: str = "register",
    loading: bool = False,
) -> Session:
    """Make the hook that ``choose`` names work on ``target``; collective.

    Whatever fails on this rank, in ``choose`` too, joins the handshake, so that every rank raises. ``former`` is the
    session that this one replaces, if any; ``call`` is what the user called.

    Raises:
        HookMismatchError: on all ranks where they disagree.
        RegistrationError: where another rank failed; there the error is the original.
    """
    waits = former is not None and not former.engine.in_step and not former.engine.has_failed and not loading
    if waits and former is not None and former.timetable is not None:
        former.timetable.let_through()
    with contextlib.ExitStack() as at_end:
        if target.others is None:
            return _start(target, choose, former, call, at_end)
        session: Session | None = None
        failure: BaseException | None = None
        try:
            session = _start(target, choose, former, call, at_end)
        except BaseException as error:  # noqa: BLE001 - it is raised again, after those were told who average other parts
            failure = error
        try:
            facts = {} if session is None else {"hook": str(session)}
            patience = LATER * target.timeout if failure is None else min(target.timeout, HASTE)
            everyone = target.everyone
            if not everyone:
                others = Rendezvous.of(target.others, patience, numbered=True)
                agree(others, call, facts, failure, verify=target.verify, more=True)
                everyone = all_ranks(others, dist.get_process_group_ranks(target.group))
            agree(among(everyone, patience), call, facts, failure, verify=target.verify)
        except BaseException:
            if session is not None:
                session.stop()
            raise
        assert session is not None
        session.target = attrs.evolve(session.target, everyone=everyone)
        return session


def _start(
    target: Target, choose: Callable[[], Recipe], former: Session | None, call: str, at_end: contextlib.ExitStack
) -> Session:
    rendezvous = Rendezvous.of(target.group, target.timeout, numbered=target.others is not None)
    failure: BaseException | None = None
    facts: dict[str, Any] = {}
    try:
        chosen = choose()
        wire = wire_dtype(chosen.reserved.get("wire"))
        hook = made(target, chosen)
        if former is not None and (why := former.in_use()):
            raise RegistrationError(f"the former hook cannot be replaced yet: {why}")
        at_end.enter_context(taken(hook, chosen.name, former))
        facts = facts_of(target, chosen, wire)
    except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
        failure = error
    hosts = agree(rendezvous, call, facts, failure, verify=target.verify, more=True)
    driver: Driver | None = None
    callbacks, comparisons = Callbacks(), Comparisons()
    try:
        driver = make_driver(
            device=target.device,
            group=target.group,
            rank=rendezvous.rank,
            size=rendezvous.size,
            timeout=target.timeout,
            label=chosen.label,
            branch=rendezvous.branch,
        )
        engine, averagers = _prepared(
            target, rendezvous, hook, wire, number_hosts(hosts), driver, callbacks, comparisons, chosen.label
        )
        timetable = _timetable(target, engine, averagers, driver.tell) if averagers else None
        engine.averages = timetable
        facts = comparisons.facts() if rendezvous.size > 1 and target.verify else {}
    except BaseException as error:  # noqa: BLE001 - the same
        failure, facts = error, {}
        if driver is not None and not isinstance(error, Unmet):
            driver.tell(described(error))
    try:
        with comparisons.told():
            agree(
                rendezvous,
                call,
                facts,
                failure,
                verify=target.verify,
                connecting=driver is not None and driver.partitions > 0,
            )
    except BaseException:
        callbacks.end()
        if driver is not None:
            driver.close()
        raise
    module = target.module()
    if timetable is not None and module is not None:
        timetable.watch(module, target.optimizers)
    return Session(target, chosen, engine, engine.driver, timetable)


def refuse(error: CommhubError, call: str, group: object) -> None:
    """Raise ``error``, which came before there was a target, and let peers that wait for this rank know.

    Args:
        error: why this rank cannot go on.
        call: what the user called.
        group: the process group that was given, if any: peers are looked for there, and among all ranks otherwise.
    """
    among = group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
    _refuse(error, call, among, _REFUSED)


def refuse_removed(error: CommhubError, call: str, target: Target) -> None:
    """The same for a call on a registration of ``target`` that was removed; peers may call on one that was not."""
    _refuse(error, call, target.group, min(target.timeout, _REMOVED))


def _refuse(error: CommhubError, call: str, group: dist.ProcessGroup | None, seconds: float) -> None:
    if dist.is_initialized():
        with contextlib.suppress(ValueError, RuntimeError):
            if group is not None and dist.get_rank(group) >= 0:
                agree(Rendezvous.of(group, seconds), call, {}, error)
    raise error


def _prepared(
    target: Target,
    rendezvous: Rendezvous,
    hook: Hook,
    wire: torch.dtype | None,
    hosts: tuple[int, ...],
    driver: Driver,
    callbacks: Callbacks,
    comparisons: Comparisons,
    label: str,
) -> tuple[Engine, list[tuple[Averager, Setup]]]:
    names = tuple(name for name, _ in target.parameters)
    tensors = [parameter for _, parameter in target.parameters]
    state = State(names)
    engine = Engine(
        hook=hook,
        state=state,
        driver=driver,
        rank=rendezvous.rank,
        world_size=rendezvous.size,
        wire=wire,
        callbacks=callbacks,
    )
    averagers: list[tuple[Averager, Setup]] = []
    prepare = getattr(hook, "prepare", None)
    if prepare is not None:
        setup = Setup(
            names=names,
            shapes=tuple(target.shape(name, t) for name, t in target.parameters),
            dtypes=tuple(target.dtypes.get(name, t.dtype) for name, t in target.parameters),
            strides=tuple(target.stride(name, t) for name, t in target.parameters),
            parameters=tuple(tensors),
            device=target.device,
            rank=rendezvous.rank,
            world_size=rendezvous.size,
            hosts=hosts,
            wire=wire,
            scatters=bool(target.scatters),
            unused=target.unused,
            optimizers=target.optimizers,
            scaler=target.scaler,
            state=state,
            connect=engine.connect,
            after_step=callbacks.after_step.append,
            at_end=callbacks.at_end.append,
            settle=callbacks.settle.append,
            average=averagers.append,
            agree=comparisons.add,
        )
        try:
            with torch.no_grad():
                prepare(setup)
        except CommhubError:
            raise
        except Exception as error:
            raise RegistrationError(f"{label}: its prepare raised {described(error)}") from error
    return engine, averagers


def _timetable(
    target: Target, engine: Engine, averagers: list[tuple[Averager, Setup]], tell: Callable[[str], None]
) -> Timetable:
    if len(averagers) > 1:
        raise RegistrationError(f"the hook brings {len(averagers)} averagers; one serves a registration.")
    if target.scatters:
        raise RegistrationError(f"the hook averages parameters, of which no two ranks hold the same. {target.scatters}")
    averager, setup = averagers[0]
    module = target.module()
    if engine.world_size > 1 and module is not None:
        check_local(target.optimizers, module.parameters() if target.kept is None else dict(target.kept()).values())
        engine.callbacks.at_end.append(watch_steps(module))
    elsewhere = Elsewhere(target)
    averaging = Averaging(
        averager=averager,
        setup=setup,
        engine=weakref.ref(engine),
        trained=Trained(target.module, target.kept, target.written),
        optimizers=target.optimizers,
        elsewhere=None if target.others is None else elsewhere.told,
    )
    if averaging.optimizer_state and not target.optimizers:
        raise RegistrationError("to average the optimizer's state, pass optimizer= to register().")
    engine.callbacks.after_step.append(averaging.look)
    is_late = target.after_optimizers and is_averager(at_work(engine.hook))
    meet = None if target.kept is None else elsewhere.meet
    return Timetable(averager, averaging, engine.world_size, averaging.prepared, tell, is_late=is_late, meet=meet)
