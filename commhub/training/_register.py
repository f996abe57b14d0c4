"""``commhub.register``: the one line that a training script needs."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commhub._errors import (
    CommhubError,
    HookOptionError,
    HookOptionTypeError,
    PluginError,
    RegistrationError,
    described,
)
from commhub._printable import type_name
from commhub.protocol._hook import is_averager
from commhub.protocol._nesting import InnerHook
from commhub.protocol._wire import wire_dtype
from commhub.registry._models import spec_of
from commhub.registry._recipe import Recipe, choose
from commhub.training.attachments._armed import attach_to, fed_by
from commhub.training.attachments._coming import Coming
from commhub.training.attachments._ddp import check_devices, check_group, find, group_in, group_of, inside, refuse
from commhub.training.attachments._fsdp import root_of
from commhub.training.attachments._shards import Shards
from commhub.training.attachments._unserved import refuse_owners
from commhub.training.attachments._way_in import come, is_passing_on
from commhub.training.attachments._wrapped import outside, wrapped

from ._given import Given, check_scaler, check_verify, optimizers_of
from ._registration import Registration
from ._replicated import home_of
from ._running import relieve
from ._sharded import register_sharded
from ._start import refuse as refuse_together
from ._start import start
from ._target import Target, check_timeout, usable_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel


logger = logging.getLogger("commhub")


def register(
    model: object,
    hook: object,
    *,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    scaler: Any = None,
    wire: torch.dtype | str | None = None,
    verify: bool = True,
    timeout: float | None = None,
    **options: Any,
) -> Registration:
    """Average the model's gradients with a hook from now on; collective.

    Args:
        model: a DistributedDataParallel model, a module given to ``replicate()`` or ``fully_shard``, or what holds one.
        hook: a name, a hook string such as ``"powersgd(rank=4)"``, a ``HookType`` member, or a hook object.
        process_group: the ranks to average over, a group or a device mesh of one dimension; default: the model's own.
            For a sharded model, the ranks that keep the same shards as this one.
        optimizer: one or several, for hooks that need them, and for parameters to be averaged at the end of their step.
        scaler: the ``torch.amp.GradScaler`` in use, so that residuals are kept unscaled.
        wire: a 16-bit dtype (or ``"fp16"``, ``"bf16"``) in which the hook's payloads travel.
        verify: compare hook, options and model across ranks.
        timeout: seconds after which a collective, or a rank that does not come, is an error; default: the group's.
        options: the hook's own.

    Registering again replaces the hook. A registration that fails leaves no trace.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
        HookMismatchError: the ranks asked for different things; raised on all of them.
        RegistrationError: the model cannot run a hook, or another rank failed.

    >>> registration = commhub.register(model, "powersgd_rank2")  # doctest: +SKIP
    """
    given = Given(
        hook=hook,
        options=options,
        process_group=process_group,
        optimizer=optimizer,
        scaler=scaler,
        wire=wire,
        verify=verify,
        timeout=timeout,
    )
    try:
        refuse_owners(model)
        root = None if inside(model) else root_of(model)
    except CommhubError as error:
        if not is_passing_on():
            refuse_together(error, "register", group_in(process_group))
        raise
    return _register_ddp(model, given) if root is None else register_sharded(root, given)


def _register_ddp(model: object, given: Given) -> Registration:
    try:
        ddp = find(model)
        group, strange_group = _group_of(ddp, given.process_group)
    except CommhubError as error:
        if not is_passing_on():
            refuse_together(error, "register", group_in(given.process_group))
        raise
    come(ddp, given.timeout)

    def chosen_here() -> Recipe:
        check_verify(given.verify)
        if strange_group is not None:
            raise strange_group
        refuse(ddp)
        check_devices((p for _, p in parameters), dist.get_backend(group))
        return given.chosen(group, ddp.device)

    parameters = wrapped(ddp)
    target = Target(
        group=group,
        device=ddp.device,
        module=weakref.ref(ddp.module if isinstance(ddp, Coming) else home_of(ddp)),
        parameters=parameters,
        unused=ddp.find_unused_parameters or ddp.static_graph,
        traits=_traits(ddp),
        optimizers=given.optimizers,
        scaler=given.scaler,
        timeout=usable_timeout(given.timeout, group, ddp.device),
        verify=given.verify is not False,
    )
    former = fed_by(ddp)
    session = start(target, chosen_here, None if former is None else former.session)
    replaced = former.owner if former is not None else None
    slot = attach_to(ddp, parameters)
    leftover = slot.session
    registration = Registration(session, slot)
    if replaced is not None:
        replaced._retire(session)
    elif leftover is not None:
        relieve(leftover, session)
    said = outside(ddp, parameters, gradients=not is_averager(registration.hook))
    if said and session.engine.rank == 0:
        logger.warning("%s: %s", registration, said)
    return registration


def _group_of(
    ddp: DistributedDataParallel | Coming, given: dist.ProcessGroup | DeviceMesh | None
) -> tuple[dist.ProcessGroup, CommhubError | None]:
    """The group; where what was given is none, the model's own, through which the peers hear of it, and the error."""
    try:
        return group_of(ddp, given), None
    except HookOptionTypeError as error:
        return group_of(ddp, None), error


def _traits(model: DistributedDataParallel | Coming) -> dict[str, Any]:
    return {
        "find_unused_parameters": model.find_unused_parameters,
        "static_graph": model.static_graph,
        "bucket_cap_mb": model.bucket_bytes_cap / 2**20,
    }


def create(hook: object, **options: Any) -> InnerHook:
    """Make a hook without registering it, for use inside another one.

    Args:
        hook, options: as for ``register``, whose own options (``wire`` and so on) have no place here.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
    """
    chosen = choose(hook, options)
    if chosen.reserved:
        raise HookOptionError(
            f"{sorted(chosen.reserved)[0]!r} belongs to register(), not to a hook inside another one."
        )
    return InnerHook(chosen.make(), chosen.name)


def checked(hook: object, **options: Any) -> InnerHook:
    """Make what ``register`` would be given, and register nothing: what is wrong with it is raised here already.

    For whoever takes a hook before there is a model to register it on, as frameworks' adapters do.

    Args:
        hook, options: as for ``register``; ``wire`` and the other arguments of its own may stand among the options.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
        HookOptionError, RegistrationError: an argument of ``register``'s own is none that it takes.
    """
    chosen = choose(hook, options)
    strange = sorted(chosen.reserved.keys() - options.keys() - {"wire"})
    if strange:
        raise HookOptionError(f"{strange[0]!r} cannot stand in a hook string; pass it to register().")
    wire_dtype(chosen.reserved.get("wire"))
    check_verify(chosen.reserved.get("verify", True))
    check_timeout(chosen.reserved.get("timeout"))
    check_group(chosen.reserved.get("process_group"))
    optimizers_of(chosen.reserved.get("optimizer"))
    check_scaler(chosen.reserved.get("scaler"))
    return InnerHook(chosen.make(), chosen.name)


def registration(model: object) -> Registration | None:
    """The registration at work on ``model``, if there is one.

    Args:
        model: a DDP model, what holds one, or what an installed adapter knows to hold models, such as a trainer.

    Raises:
        RegistrationError: if ``model`` neither is nor holds a DDP model, or several have a registration.
        PluginError: if the adapter for its package cannot be loaded.
    """
    root = None if inside(model) else root_of(model)
    if root is not None:
        shards = Shards.on(root)
        return None if shards is None else shards.owner
    spec = None if inside(model) else spec_of(model)
    if spec is None or spec.models is None:
        slot = fed_by(find(model))
        return None if slot is None else slot.owner
    found = {id(one): one for held in _held(spec.models, model) if (one := registration(held)) is not None}
    if len(found) > 1:
        raise RegistrationError(f"{type_name(model)} holds {len(found)} models with a hook. Ask for each of them.")
    return next(iter(found.values()), None)


def _held(models: Callable[[Any], Iterable[object]], model: object) -> list[object]:
    try:
        held = list(models(model))
    except Exception as error:
        raise PluginError(f"which models {type_name(model)} holds cannot be told: {described(error)}") from error
    return [one for one in held if one is not None and one is not model]
