"""PyTorch's averagers of parameters, called by the script after each of the optimizer's steps.

Each is a commhub averager as well: commhub makes the communicators, counts, and names what goes wrong.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import commhub
from commhub import AllReduce

from ._order import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from commhub import Bucket, Exchange, Setup, Subgroup

_ONE = "with a period of 1 averaging parameters sends as much as averaging gradients, which plain DDP does."


class ModelAverager:
    """The base of both: when to average, among whom, and the counting.

    Args:
        levels: the size of the groups for each period; of the periods that are due, the last in this order decides.
        warmup_steps: no average before this step.
        offset: steps are counted from here to tell whether a period divides them.
        process_group: all ranks that average; ``None`` is the world, whenever it is made.
        without_gradient: average parameters that have no gradient on any rank, too; PyTorch leaves these alone.

    Attributes:
        step: calls of ``average_parameters`` so far. It may be set, on all ranks alike.
    """

    def __init__(
        self,
        levels: Mapping[int, int | None],
        warmup_steps: int,
        offset: int,
        process_group: dist.ProcessGroup | None,
        without_gradient: bool,
    ) -> None:
        if warmup_steps < 0:
            raise commhub.HookOptionError(f"warmup_steps is {warmup_steps}; give a number of steps, 0 or more.")
        self.step = 0
        self.warmup_steps = warmup_steps
        self.without_gradient = without_gradient
        self._given, self._levels, self._offset = process_group, dict(levels), offset
        self._groups: dict[int, Subgroup | None] = {}
        self._registration: Any = None
        self._registered: tuple[int, ...] = ()

    @property
    def process_group(self) -> Any:
        """All ranks that average."""
        return dist.group.WORLD if self._given is None else self._given

    def average_parameters(self, params: Iterable[Any]) -> None:
        """Count a step, and average the parameters in place if that is due; collective.

        Args:
            params: parameters, or the ``param_groups`` of an optimizer. Those that require gradients are averaged; the
                same on all ranks.

        Raises:
            HookOptionError: if they are something else.
            HookError: what went wrong with an average.
            RegistrationError, HookMismatchError: when this is first called, or with others than before.
        """
        try:
            parameters = list(_parameters_in(params))
        except commhub.HookOptionError as error:
            if self._registration is None and dist.is_initialized():  # the others wait for this rank to begin
                any_module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1))])
                commhub.manual(any_module, Refused(error), process_group=self._given)
            raise
        registration = self._registration_of([p for p in parameters if p.requires_grad])
        if registration is not None:
            if registration.step != self.step:
                registration.load_state_dict({**registration.state_dict(), "step": self.step})
            registration.average()
        self.step += 1

    def _registration_of(self, parameters: list[torch.nn.Parameter]) -> Any:
        identities = tuple(map(id, parameters))
        if identities != self._registered:
            if self._registration is not None:
                self._registration.close()
            self._registration, self._registered = None, ()
            if parameters:
                module = torch.nn.ParameterList(parameters)
                self._registration = commhub.manual(module, self, process_group=self._given)
            self._registered = identities
        return self._registration

    # What a commhub averager is.

    def prepare(self, setup: Setup) -> None:
        """Make the communicators of every level: consecutive ranks. Have the ranks compare when they average."""
        setup.agree("the averager", lambda: f"{self._levels} from step {self.warmup_steps} on, by {self._offset}")
        for period, given in self._levels.items():
            size = setup.world_size if given is None else given
            starts = range(0, setup.world_size, size)
            self._groups[period] = setup.partition([range(start, start + size) for start in starts])

    def due(self, step: int) -> Subgroup | None:
        """Among whom to average after this step."""
        due = [period for period in self._levels if step >= self.warmup_steps and (step - self._offset) % period == 0]
        return self._groups[due[-1]] if due else None

    def reduce(self, bucket: Bucket) -> Exchange:
        """The mean in the parameters' own dtype; without a gradient on any rank a parameter stays as it is."""
        if self.without_gradient:
            bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.float64)))
            return
        used = torch.tensor([float(p.grad is not None) for p in bucket.parameters], device=bucket.flat.device)
        mine = bucket.flat.clone()
        mean, used = yield AllReduce(bucket.flat, wire=torch.float64), AllReduce(used, op="sum", wire=torch.float64)
        bucket.flat.copy_(mean)
        for span, count in zip(bucket.spans, used.tolist(), strict=True):
            if not count:
                here = slice(span.offset, span.offset + span.numel)
                bucket.flat[here] = mine[here]

    def __getstate__(self) -> dict[str, Any]:
        if self._given is not None:
            raise commhub.RegistrationError("an averager with a process group is not copied or saved. Save its step.")
        return {**vars(self), "_groups": {}, "_registration": None, "_registered": ()}


class PeriodicModelAverager(ModelAverager):
    """Averages parameters among all ranks every ``period`` steps: where ``period`` divides ``step - warmup_steps``.

    Args:
        period: steps from one average to the next, at least 1.
        warmup_steps: steps before the first average.
        process_group: all ranks that average; ``None`` is the world, whenever it is made.
        without_gradient: average parameters that have no gradient on any rank, too; PyTorch leaves these alone.

    Raises:
        HookOptionError: if a number is out of range.
    """

    def __init__(
        self,
        period: int,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        without_gradient: bool = False,
    ) -> None:
        if period < 1:
            raise commhub.HookOptionError(f"period is {period}; give a number of steps of at least 1.")
        if period == 1:
            warnings.warn(_ONE, stacklevel=2)
        super().__init__({period: None}, warmup_steps, warmup_steps, process_group, without_gradient)
        self.period = period


class HierarchicalModelAverager(ModelAverager):
    """Averages parameters among few ranks often and among all seldom, where a period divides ``step`` itself.

    commhub's own ``hierarchical`` counts from the end of the warm-up. Making one is collective, since it makes the
    process groups that ``period_process_group_dict`` shows.

    Args:
        period_group_size_dict: the size of the groups for each period, the longest last; the last size is that of
            ``process_group``. Of the periods that divide ``step`` the last decides.
        warmup_steps: steps before the first average.
        process_group: all ranks that average; ``None`` is the world.
        without_gradient: average parameters that have no gradient on any rank, too; PyTorch leaves these alone.

    Attributes:
        period_process_group_dict: this rank's process group for each period. The averages use communicators of their
            own.

    Raises:
        HookOptionError: if a number is out of range.
        RegistrationError: if there is no process group yet.
    """

    def __init__(
        self,
        period_group_size_dict: Mapping[int, int] | None = None,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        without_gradient: bool = False,
    ) -> None:
        if not period_group_size_dict:
            raise commhub.HookOptionError("period_group_size_dict is empty. Give {period: size of the groups}.")
        if not dist.is_initialized():
            raise commhub.RegistrationError("there is no process group. Call init_process_group first.")
        periods, sizes = list(period_group_size_dict), list(period_group_size_dict.values())
        ranks = dist.get_world_size(process_group)
        if min(periods) < 1:
            raise commhub.HookOptionError(f"a period is {min(periods)}; give numbers of steps of at least 1.")
        if sizes[-1] != ranks:
            raise commhub.HookOptionError(f"the last groups are of {sizes[-1]} ranks; give {ranks}, which is all.")
        if uneven := [size for size in sizes if size < 1 or ranks % size]:
            raise commhub.HookOptionError(f"{ranks} ranks are not made of groups of {uneven[0]}.")
        if periods[-1] == 1:
            warnings.warn(_ONE, stacklevel=2)
        super().__init__(period_group_size_dict, warmup_steps, 0, process_group, without_gradient)
        self.period_process_group_dict: OrderedDict[int, Any] = OrderedDict()
        for period, size in period_group_size_dict.items():
            whole = size == ranks
            made = self.process_group if whole else dist.new_subgroups(group_size=size, group=process_group)[0]
            self.period_process_group_dict[period] = made


def _parameters_in(params: Iterable[Any]) -> Iterable[torch.nn.Parameter]:
    for one in params:
        if isinstance(one, torch.Tensor):
            yield one  # type: ignore[misc]
        elif isinstance(one, dict):
            yield from one["params"]
        else:
            raise commhub.HookOptionError(f"params hold a {type(one).__name__}; give parameters, or param_groups.")
