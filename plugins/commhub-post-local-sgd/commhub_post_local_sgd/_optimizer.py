"""An optimizer that averages parameters after its steps, for scripts written for PyTorch's class of that name.

It wraps another one and shares that one's groups and state, also after ``load_state_dict``: whatever changes them, a
scheduler for example, changes both.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

import commhub

if TYPE_CHECKING:
    from collections import defaultdict
    from collections.abc import Callable

    import torch.distributed as dist


class PostLocalSGDOptimizer(torch.optim.Optimizer):
    """Steps like ``optimizer``, counts, and averages the parameters when ``averager`` says that they are due.

    Collective: every rank takes the same number of steps. The first of them makes the communicators, so the process
    group must be there by then and not before. All parameters of the optimizer that require gradients are averaged,
    in its order, whichever of them have a gradient.

    Under a ``torch.amp.GradScaler`` a step whose gradients are not finite leaves the parameters as they are and
    counts, so that ranks stay together even where one of them alone met an Inf.

    Args:
        optimizer: takes the local steps; ``.optim`` afterwards.
        averager: what ``commhub.create("periodic", period=4)`` returns, a hook string, or an averager object. What one
            remembers between averages beside the number of steps is not part of ``state_dict``: one that remembers
            parameters begins anew after ``load_state_dict``, which then every rank calls.
        process_group: among whom; default: all ranks.

    Raises:
        TypeError: if one of these is something else.
        ValueError: if the averager asks for the buffers, which an optimizer does not have.
        UnknownHookError, HookOptionError: for an averager that cannot be had.

    >>> optimizer = PostLocalSGDOptimizer(sgd, "periodic(period=4, warmup_steps=100)")  # doctest: +SKIP
    """

    optim: torch.optim.Optimizer
    averager: object
    process_group: dist.ProcessGroup | None
    _steps: int
    _registration: Any
    _step_supports_amp_scaling = True  # a scaler then calls step() on every rank, and says what it found

    def __init__(
        self, optimizer: torch.optim.Optimizer, averager: object, process_group: dist.ProcessGroup | None = None
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is no torch.optim.Optimizer. Give the one to wrap.")
        made = commhub.create(averager) if isinstance(averager, str) else averager
        if not callable(getattr(made, "due", None)) or not callable(getattr(made, "reduce", None)):
            raise TypeError(
                f"{averager!r} averages no parameters. Give what commhub.create('periodic', period=4) returns, a hook "
                "string such as 'periodic(period=4)', or an object with due(step) and reduce(bucket)."
            )
        if getattr(made, "buffers", False):
            raise ValueError(
                "an optimizer knows no buffers. Leave buffers=true out, or use commhub.register(model, ...)."
            )
        self.__setstate__({"optim": optimizer, "averager": made, "process_group": process_group, "_steps": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_registration": None})
        for name in vars(self.optim):
            if name.endswith(("state_dict_pre_hooks", "state_dict_post_hooks")):
                setattr(self, name, getattr(self.optim, name))  # the wrapped one saves and loads

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError("a process group cannot be pickled, and without it all ranks would be averaged.")
        return {"optim": self.optim, "averager": self.averager, "process_group": None, "_steps": self._steps}

    def __deepcopy__(self, memo: dict[int, Any]) -> PostLocalSGDOptimizer:
        made = type(self)(copy.deepcopy(self.optim, memo), copy.deepcopy(self.averager, memo), self.process_group)
        made._steps = self._steps
        return made

    def __repr__(self) -> str:
        return f"{self.optim!r}\n{self.averager!r} at step {self._steps}"

    @property
    def steps(self) -> int:
        """Steps so far, warm-up included: what the averager goes by. It may be set, on all ranks alike."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps
        if self._registration is not None:
            self._count_from(self._registration)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.optim.param_groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:  # type: ignore[override]
        """That of the wrapped optimizer."""
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.optim.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optim.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, on every rank; they are averaged from the next step on."""
        self.optim.add_param_group(param_group)
        if self._registration is not None and hasattr(self.averager, "begin"):
            self._registration.remove()  # averages: it begins anew, with parameters that are the same on all ranks
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and under ``"step"`` how many steps were counted."""
        return {**self.optim.state_dict(), "step": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``; one without a ``"step"``, of another optimizer, counts from 0 and warns."""
        self.optim.load_state_dict(state_dict)
        if "step" not in state_dict:
            warnings.warn("the state has no 'step': the averager counts from 0, warm-up included.", stacklevel=2)
        self._steps = int(state_dict.get("step", 0))
        if hasattr(self.averager, "begin"):
            self._let_go()  # it begins anew, with the parameters as the next step finds them
        elif self._registration is not None:
            self._count_from(self._registration)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take the wrapped optimizer's step, then average the parameters if they are due.

        Raises:
            HookError: what went wrong with an average.
            RegistrationError, HookMismatchError: in the first step, if ranks cannot begin together.
        """
        if self._registration is None:
            self._registration = self._registered()  # before the parameters move: an averager may begin with them
        loss = self._local_step(closure)
        self._registration.average()
        self._steps = self._registration.step
        return loss

    def _local_step(self, closure: Callable[[], float] | None) -> float | None:
        """The wrapped optimizer's step; under a scaler only if it found everything finite."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return self.optim.step() if closure is None else self.optim.step(closure)
        if getattr(self.optim, "_step_supports_amp_scaling", False):
            return self._fused_step(found_inf, scale)
        if float(found_inf):
            return None
        if scale is not None:
            self._unscale(scale)
        return self.optim.step()

    def _fused_step(self, found_inf: torch.Tensor, scale: torch.Tensor | None) -> float | None:
        inner: Any = self.optim
        inner.found_inf, inner.grad_scale = found_inf, scale
        try:
            return cast("float | None", inner.step())
        finally:
            del inner.found_inf, inner.grad_scale

    def _unscale(self, scale: torch.Tensor) -> None:
        inverse = scale.double().reciprocal().float()  # as the scaler itself does it
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    values = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
                    values.mul_(inverse.to(values.device))

    def _registered(self) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        module = torch.nn.ParameterList(parameters)
        registration = commhub.manual(module, self.averager, process_group=self.process_group, optimizer=self.optim)
        self._count_from(registration)
        return registration

    def _count_from(self, registration: commhub.Registration) -> None:
        registration.load_state_dict({**registration.state_dict(), "step": self._steps})

    def _let_go(self) -> None:
        """Forget the communicators; the next step makes new ones."""
        registration, self._registration = self._registration, None
        if registration is not None:
            registration.close()
