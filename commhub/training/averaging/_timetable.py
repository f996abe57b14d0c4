"""When parameters are averaged: noted as a step's gradients are ready, done where training's parameters are in place.

With optimizers that is the end of their step. A loss scaler may skip it on one rank only, and a user's hook may end it,
so a training forward does it too, if nothing has written to the parameters since the backward: nobody has moved them
then, as between the two backward passes of sharpness-aware minimisation. Without optimizers it is a training forward.
An evaluation averages only where it takes all ranks itself. Every rank runs every average once, in the order of the
steps, whichever of these comes first there: an average that is due while another waits follows it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from commhub._errors import HookError, RegistrationError

from ._background import Background
from ._beginning import Beginning
from ._listener import Listener, bare, is_collective, with_closure
from ._snapshot import Snapshot
from ._telling import PATIENCE, advise, tell_of_delay
from ._together import Together

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Averager

    from ._together import Meet


class Timetable:
    """Asks an averager after each step, and averages when its time has come.

    Args:
        averager: says whether and among whom.
        average: does it, given the step, the group, and why this rank cannot, if so; returns what went wrong.
        world_size: how many ranks make an average one of all.
        parameters: what is averaged, as it is now, by name.
        tell: lets the peers know that this rank's averager has failed.
        is_late: steps are counted after the optimizers' steps, and their averages asked for at once.
        meet: for a model that is sharded, where its own forward gathers the parameters: how the ranks of all shards
            meet where an average is due.

    ``then`` is what waits for the optimizers to have used a step's gradients.
    """

    def __init__(
        self,
        averager: Averager,
        average: Callable[[int, Subgroup | None, BaseException | None], BaseException | None],
        world_size: int,
        parameters: Callable[[], Sequence[tuple[str, Tensor]]],
        tell: Callable[[str], None],
        *,
        is_late: bool = False,
        meet: Meet | None = None,
    ) -> None:
        self.then: weakref.WeakMethod[Callable[[], None]] | None = None
        self._is_late, self._together = is_late, Together(meet)
        self._averager, self._average, self._world_size, self._parameters = averager, average, world_size, parameters
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._handles: list[Any] = []
        self._last, self._ended = -1, False
        self._due: list[tuple[int, Subgroup]] = []
        self._waiting = False  # something else than an average
        self._is_told = self._in_closure = False
        self._awaited: set[int] = set()
        self._place = Snapshot(())  # of the parameters after the first backward since the optimizers' last step
        self._beginning = Beginning(averager, parameters, tell)
        self._even: Snapshot | None = Snapshot(())  # of the parameters since they were the same on all ranks
        self._background = Background()

    @property
    def is_open(self) -> bool:
        """Whether a step has ended whose gradients the optimizers may not have used yet."""
        return self._ended

    def watch(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Learn of the optimizers' steps, of the module's forward passes and of weights that are loaded into it."""
        self._optimizers = tuple(optimizers)
        self._look()
        first = self._together.is_sharded  # ahead of what gathers the parameters
        self._handles.append(module.register_forward_pre_hook(Listener(self._forward), prepend=first))
        if hasattr(self._averager, "begin"):
            for part in bare(module).modules():  # any of them may be loaded by itself
                self._handles.append(part.register_load_state_dict_pre_hook(Listener(self._beginning.loading)))
                self._handles.append(part.register_load_state_dict_post_hook(Listener(self._beginning.loaded)))
        optimizer: Any
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(Listener(self._step_begins)))
            handle = optimizer.register_step_post_hook(Listener(self._step_ends))
            optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # the others may raise
            self._handles.append(handle)

    def advise(self, hook: str) -> None:
        """Say what only optimizers make possible, where there are none."""
        if not self._optimizers and not self._is_late:
            advise(hook)

    def record(self, step: int) -> None:
        """A step's gradients are ready."""
        if not self._is_late:
            self.renew()
        self._beginning.step_ended()
        group = self._averager.due(step)
        if group is not None:
            self._due.append((step, group))
        self._last, self._ended, self._even = step, True, None
        self._awaited = {id(optimizer) for optimizer in self._optimizers}
        if self._together.is_sharded:
            self._look()  # shards may lie elsewhere once the model has run
        self._keep_place()
        if self._due and step - self._due[0][0] >= PATIENCE and not self._is_told:
            self._is_told = True
            tell_of_delay(self._due[0][0], step - self._due[0][0], has_optimizers=bool(self._optimizers))

    def hold(self) -> None:
        """Something waits until the optimizers have used the step's gradients: ``then``, which is called then."""
        self._waiting = True
        self._keep_place()

    def run_due(self, *, met: bool = False) -> None:
        """Average now what is due; between steps. ``met``: the ranks of all shards know that this one does.

        Raises:
            HookError: what went wrong.
        """
        self.join()
        if not self._ended:
            return
        self._ended = False
        failure = self._run(met=met)
        if failure is not None:
            raise failure
        then = None if self.then is None else self.then()
        if then is not None:
            then()

    def finish(self) -> None:
        """Average now what is due, where training's parameters are in place.

        Raises:
            RegistrationError: where they are not.
            HookError: what went wrong.
        """
        if (self._due or self._waiting) and not self._may_run():
            raise RegistrationError(
                "an average is due, and the parameters were moved since the backward before, while no optimizer given "
                "to register() has stepped. Put them back and take the step, or load other state, first."
            )
        self.run_due(met=True)
        self.renew()

    def let_through(self) -> None:
        """Average what is due, as ranks wait for it that are wanted elsewhere; ``synchronize`` meets errors."""
        with contextlib.suppress(HookError):
            self.join()
        self._ended = False
        self._run()

    def forget(self) -> None:
        """Drop what is due, as the averager's memory is loaded and with it another time is gone back to.

        Until the next step that memory counts, whichever weights are loaded.
        """
        self.join()
        self._ended, self._waiting = False, False
        self._place.forget()
        self._due.clear()
        self._beginning.restore()

    def renew(self) -> None:
        """Have the averager remember the parameters as they are, unless it has since they were set."""
        self._beginning.renew()

    def run_due_in_background(self) -> None:
        """The same for a rank that must not wait here: ``join`` does."""
        self.join()
        if self._ended:
            self._ended = False
            self._background.start(self._run)

    def join(self) -> None:
        """Wait for what runs in the background.

        Raises:
            HookError: what went wrong there.
        """
        self._background.join()

    def synchronize(self) -> BaseException | None:
        """Average among all ranks, unless the last step ended with that: nothing else averages from here on."""
        try:
            self.join()
        except HookError as error:
            return error
        self._ended = False
        failure = self._run()
        is_even = failure is None and self._even is not None and self._even.holds()
        return None if self._together.holds(is_even) else self._average(self._last, None, failure)

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _run(self, failure: BaseException | None = None, *, met: bool = False) -> BaseException | None:
        try:
            if self._due and not met and failure is None:
                self._together.begin()
            self.renew()  # weights loaded since the step are where training goes on
        except HookError as error:
            if not self._due:
                return error
            failure = failure or error
        self._waiting = False
        self._place.forget()
        due, self._due = self._due, []
        for step, group in due:
            failure, self._even = self._average(step, group, failure), None
            if failure is not None:
                return failure
            whole = len(group) == self._world_size and not getattr(self._averager, "partial", False)
            if step == self._last and whole:
                self._even = Snapshot.now([parameter for _, parameter in self._parameters()])
        if due:
            self._look()
        return None

    # Whether training's parameters are in place.

    def _look(self) -> None:
        tensors = [parameter for _, parameter in self._parameters()]
        if not self._place.is_of(tensors):
            self._place = Snapshot(tensors)

    def _keep_place(self) -> None:
        if self._optimizers and not self._is_late:
            self._place.keep(bits=bool(self._due) or self._waiting)

    def _may_run(self, *, begins: bool = True) -> bool:
        """Whether what is due runs here, with ``run_due(met=True)``; ``begins``: also where no other shard's rank does.

        Raises:
            HookError: where others do, and it cannot run on some rank.
        """
        holds = self._place.holds()
        if not self._due:
            return holds and begins
        try:
            return self._together.may_run(holds, begins=begins)
        except HookError as error:
            raise (self._run(error) or error) from None

    # What the hooks on the module and the optimizers call.

    def _forward(self, module: nn.Module, _inputs: object) -> None:
        self.join()  # what it writes to, this forward reads
        trains = bare(module).training and torch.is_grad_enabled()
        # Where an evaluation takes all ranks, one whose step was skipped is waited for in an average.
        evaluates = not trains and bool(self._optimizers) and (self._together.is_sharded or is_collective(module))
        if self._in_closure or not (trains or evaluates):
            return
        begins = trains or not self._together.is_sharded  # one replica may evaluate while the others wait for it
        if self._is_late:
            self.renew()
        elif not self._optimizers:
            self.run_due()
        elif (self._due or self._waiting) and self._may_run(begins=begins):
            self.run_due(met=True)

    def _step_begins(self, _optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_late:
            self.renew()
        return with_closure(args, kwargs, self._evaluating)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        outer, self._in_closure = self._in_closure, True  # the step has yet to end
        try:
            yield
        finally:
            self._in_closure = outer

    def _step_ends(self, optimizer: object, _args: object, _kwargs: object) -> None:
        self._awaited.discard(id(optimizer))
        self._place.forget()
        if not self._awaited:
            self.run_due()
        else:
            self._keep_place()
