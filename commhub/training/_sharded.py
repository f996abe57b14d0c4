"""The way in for models that FSDP2 shards: a hook between their replicas, or in place of the reduce-scatter."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch.distributed as dist

from commhub._errors import CommhubError, RegistrationError
from commhub.training.attachments._ddp import check_device, group_in, group_of
from commhub.training.attachments._fsdp import gather_anew, units_of
from commhub.training.attachments._replicas import Replicas
from commhub.training.attachments._scattered import Scattered
from commhub.training.attachments._shards import Shards

from ._registration import Registration
from ._start import refuse, start
from ._target import Target, part_between, part_inside, usable_timeout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from commhub.registry._recipe import Recipe
    from commhub.training.attachments._fsdp import Unit
    from commhub.training.attachments._shards import Way

    from ._given import Given

logger = logging.getLogger("commhub")

_STEPS = "FSDP puts gradients where optimizers read them only after the hook. Register the hook inside it by itself."
_BETWEEN = (
    "Shard inside a group of ranks and register between the groups: "
    'mesh = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard")), '
    'fully_shard(module, mesh=mesh["shard"]), commhub.register(model, hook, process_group=mesh["replicate"]).'
)


def register_sharded(root: nn.Module, given: Given) -> Registration:
    """Have a hook exchange a sharded model's gradients from now on; collective on all ranks of the mesh.

    Args:
        root: the outermost module that ``fully_shard`` was applied to.
        given: what ``register`` was given. Where ``process_group`` holds the ranks that the model is sharded over, as
            by default, the hook takes the place of FSDP's reduce-scatter; where it holds ranks with the same shard, it
            averages between these.

    Raises:
        CommhubError: as ``register``.
    """
    try:
        units = units_of(root)
        shard_group = _shard_group(units)
        group = _group(given, shard_group)
    except CommhubError as error:
        refuse(error, "register", group_in(given.process_group))
        raise
    scatters = _ranks(group) == _ranks(shard_group)
    way: Way = Scattered() if scatters else Replicas()
    device, former = units[0].device, Shards.on(root)

    def chosen_here() -> Recipe:
        if not scatters:
            _check_apart(group, shard_group)
        if former is not None and not former.goes(type(way)):
            raise RegistrationError(
                "the model has a hook in another place already: one between replicas and one in place of the "
                "reduce-scatter exclude each other. Call remove() on the former one."
            )
        if not any(unit.dtype for unit in units):
            raise RegistrationError("the model has no trainable parameters.")
        check_device(device, dist.get_backend(group))
        return given.chosen(group, device)

    target = Target(
        group=group,
        device=device,
        module=weakref.ref(root),
        parameters=way.parameters(units),
        unused=True,
        traits={"units": [[unit.name, str(unit.dtype), unit.divide_factor] for unit in units]},
        optimizers=given.optimizers,
        scaler=given.scaler,
        timeout=usable_timeout(given.timeout, group, device),
        verify=given.verify is not False,
        dtypes={shard.name: unit.dtype for unit in units for shard in unit.shards if unit.dtype is not None},
        no_optimizer=_STEPS,
    )
    target = attrs.evolve(target, **(_inside(units) if scatters else _between(units, shard_group, target.traits)))
    session = start(target, chosen_here, None if former is None else former.session)
    replaced = None if former is None else former.owner
    shards = former or Shards(root, units, way)
    taken = "reduce-scatter" if scatters else "all-reduce hook"
    theirs = any(unit.has_reduce_scatter if scatters else unit.has_hook for unit in units)
    if former is None and theirs and session.engine.rank == 0:
        logger.warning("%s: takes the place of a custom %s that was set on the model, until remove().", session, taken)
    if scatters and group.size() < dist.get_world_size() and session.engine.rank == 0:
        logger.warning(
            "%s: works inside the %d ranks that the model is sharded over; commhub averages nothing between these and "
            "the other ranks.",
            session,
            group.size(),
        )
    registration = Registration(session, shards)
    if replaced is not None:
        replaced._retire(session)
    return registration


def _between(units: Sequence[Unit], shard_group: dist.ProcessGroup, traits: Mapping[str, Any]) -> dict[str, Any]:
    """What a target between replicas has of its own."""
    rank, size = shard_group.rank(), shard_group.size()
    return {
        "traits": {**traits, "shard": f"{rank} of {size}"},
        "others": shard_group if size > 1 else None,
        "part": part_between(rank, size),
        "kept": lambda: tuple((shard.name, shard.parameter) for unit in units for shard in unit.shards),
        "written": lambda: gather_anew(units),
    }


def _inside(units: Sequence[Unit]) -> dict[str, Any]:
    """What a target inside the sharded group has of its own: no two ranks hold the same."""
    size = units[0].shard_group.size()
    return {
        "shapes": {shard.name: (size, *shard.padded_size) for unit in units for shard in unit.shards},
        "scatters": f"Take one that has, as the documentation on sharded models lists them. Or: {_BETWEEN}",
        "part": part_inside(size),
        "kept": tuple,
    }


def _group(given: Given, shard_group: dist.ProcessGroup) -> dist.ProcessGroup:
    if given.process_group is not None:
        return group_of(None, given.process_group)
    if shard_group.size() < dist.get_world_size():
        raise RegistrationError(
            f"the model is sharded over {shard_group.size()} of {dist.get_world_size()} ranks, and process_group= does "
            "not say where the hook belongs. Give the ranks that keep the same shards, "
            'process_group=mesh["replicate"], for a hook between them; or those that it is sharded over, '
            'process_group=mesh["shard"], for one in place of the reduce-scatter, if something else exchanges '
            "gradients between such groups or nothing is to."
        )
    return shard_group


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _shard_group(units: Sequence[Unit]) -> dist.ProcessGroup:
    groups = {id(unit.shard_group): unit.shard_group for unit in units}
    if len(groups) != 1:
        raise RegistrationError(
            f"the model's units are sharded over {len(groups)} groups of ranks; a hook needs one for all."
        )
    return next(iter(groups.values()))


def _check_apart(group: dist.ProcessGroup, shard_group: dist.ProcessGroup) -> None:
    """Raise RegistrationError where replicas are no replicas: two of the ranks keep different shards."""
    both = set(_ranks(group)) & set(_ranks(shard_group))
    if len(both) > 1:
        raise RegistrationError(
            f"process_group= holds ranks {', '.join(map(str, sorted(both)))}, which keep different shards, and not all "
            f"of those. Give the ranks that keep the same. {_BETWEEN}"
        )
