"""The way in for models that FSDP2 shards: a hook between their replicas."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch.distributed as dist

from commhub._errors import CommhubError, RegistrationError
from commhub.training.attachments._ddp import check_device, group_in, group_of
from commhub.training.attachments._fsdp import gather_anew, units_of
from commhub.training.attachments._shards import Shards, trained

from ._registration import Registration
from ._start import refuse, start
from ._target import Target, usable_timeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from commhub.registry._recipe import Recipe
    from commhub.training.attachments._fsdp import Unit

    from ._given import Given

logger = logging.getLogger("commhub")

_STEPS = "FSDP puts gradients where optimizers read them only after the hook. Register the hook inside it by itself."
_WHOLE = (
    "Shard inside a group of ranks and register between the groups: "
    'mesh = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard")), '
    'fully_shard(module, mesh=mesh["shard"]), commhub.register(model, hook, process_group=mesh["replicate"]).'
)


def register_sharded(root: nn.Module, given: Given) -> Registration:
    """Average the shards' gradients between replicas with a hook from now on; collective on all ranks of the mesh.

    Args:
        root: the outermost module that ``fully_shard`` was applied to.
        given: what ``register`` was given; ``process_group`` holds the ranks with the same shard as this one.

    Raises:
        CommhubError: as ``register``.
    """
    try:
        group = _replicas(given)
        units = units_of(root)
        shard_group = _shard_group(units)
    except CommhubError as error:
        refuse(error, "register", group_in(given.process_group))
        raise
    device = units[0].device
    parameters = trained(units)

    def chosen_here() -> Recipe:
        _check_apart(group, shard_group)
        if not any(unit.dtype for unit in units):
            raise RegistrationError("the model has no trainable parameters.")
        check_device(device, dist.get_backend(group))
        return given.chosen(group, device)

    target = Target(
        group=group,
        device=device,
        module=weakref.ref(root),
        parameters=parameters,
        unused=True,
        traits={
            "units": [[unit.name, str(unit.dtype), unit.divide_factor] for unit in units],
            "shard": f"{shard_group.rank()} of {shard_group.size()}",
        },
        optimizers=given.optimizers,
        scaler=given.scaler,
        timeout=usable_timeout(given.timeout, group, device),
        verify=given.verify is not False,
        dtypes={shard.name: unit.dtype for unit in units for shard in unit.shards if unit.dtype is not None},
        others=shard_group if shard_group.size() > 1 else None,
        part=f"shard{shard_group.rank()}-of-{shard_group.size()}",
        kept=lambda: tuple((shard.name, shard.parameter) for unit in units for shard in unit.shards),
        written=lambda: gather_anew(units),
        no_optimizer=_STEPS,
    )
    former = Shards.on(root)
    session = start(target, chosen_here, None if former is None else former.session)
    replaced = None if former is None else former.owner
    shards = former or Shards(root, units)
    if former is None and any(unit.has_hook for unit in units) and session.engine.rank == 0:
        logger.warning("%s: takes the place of an all-reduce hook that was set on the model, until remove().", session)
    registration = Registration(session, shards)
    if replaced is not None:
        replaced._retire(session)
    return registration


def _replicas(given: Given) -> dist.ProcessGroup:
    if given.process_group is None:
        raise RegistrationError(
            f"fully_shard averages inside the group that it shards over, and no hook takes its place there. {_WHOLE}"
        )
    return group_of(None, given.process_group)


def _shard_group(units: Sequence[Unit]) -> dist.ProcessGroup:
    groups = {id(unit.shard_group): unit.shard_group for unit in units}
    if len(groups) != 1:
        raise RegistrationError(
            f"the model's units are sharded over {len(groups)} groups of ranks; a hook between replicas needs one."
        )
    return next(iter(groups.values()))


def _check_apart(group: dist.ProcessGroup, shard_group: dist.ProcessGroup) -> None:
    """Raise RegistrationError where replicas are no replicas: two of the ranks keep different shards."""
    both = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(shard_group))
    if len(both) > 1:
        raise RegistrationError(
            f"process_group= holds ranks {', '.join(map(str, sorted(both)))}, which keep different shards. "
            f"Give the ranks that keep the same. {_WHOLE}"
        )
