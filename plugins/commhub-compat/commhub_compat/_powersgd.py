"""PowerSGD's settings in PyTorch's words, and its two hooks."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import commhub

from ._order import Order, as_comm_hook, group_of

_INTERNAL = frozenset(
    {
        "error_dict",
        "next_stats_report",
        "p_memory_dict",
        "q_memory_dict",
        "rng",
        "total_numel_after_compression",
        "total_numel_before_compression",
    }
)


class PowerSGDState:
    """PowerSGD's settings, for ``model.register_comm_hook(state, powerSGD_hook)``; read when that registers.

    What the hook remembers is kept by commhub: ``commhub.registration(model)`` saves and loads it. One state may serve
    several models; each remembers its own, and ``iter`` and ``compression_stats`` are of the one that came last.

    Args:
        process_group: the ranks to average over; ``None`` is the model's own.
        matrix_approximation_rank: ``rank``.
        start_powerSGD_iter: ``start_step``; 0 and 1 are allowed.
        min_compression_rate: as in commhub.
        use_error_feedback: ``error_feedback``.
        warm_start: as in commhub.
        orthogonalization_epsilon: not needed, and not used: gradients that are zero or of low rank are orthogonalised
            as they are.
        random_seed: ``seed``; the same on all ranks.
        compression_stats_logging_frequency: ``stats_frequency``, in steps.
        batch_tensors_with_same_shape: ``batch_same_shapes``; ``False`` leaves it to commhub, as PyTorch's default.
    """

    def __init__(
        self,
        process_group: Any,
        matrix_approximation_rank: int = 1,
        start_powerSGD_iter: int = 1_000,  # noqa: N803 - PyTorch's name
        min_compression_rate: float = 2,
        use_error_feedback: bool = True,
        warm_start: bool = True,
        orthogonalization_epsilon: float = 0,
        random_seed: int = 0,
        compression_stats_logging_frequency: int = 10_000,
        batch_tensors_with_same_shape: bool = False,
    ) -> None:
        self.process_group = process_group
        self.matrix_approximation_rank = matrix_approximation_rank
        self.start_powerSGD_iter = start_powerSGD_iter
        self.min_compression_rate = min_compression_rate
        self.use_error_feedback = use_error_feedback
        self.warm_start = warm_start
        self.orthogonalization_epsilon = orthogonalization_epsilon
        self.random_seed = random_seed
        self.compression_stats_logging_frequency = max(1, compression_stats_logging_frequency)
        self.batch_tensors_with_same_shape = batch_tensors_with_same_shape
        self._registration: weakref.ref[commhub.Registration] | None = None

    @property
    def iter(self) -> int:
        """Synchronised backward passes so far."""
        registration = self._registered
        return 0 if registration is None else registration.step

    def compression_stats(self) -> tuple[float, int, int]:
        """The rate of compression, and the elements before and after it; zeros before the first compressed step."""
        registration = self._registered
        figures = None if registration is None else getattr(registration.hook, "compression_stats", None)
        return (0.0, 0, 0) if figures is None else figures()

    @property
    def _registered(self) -> commhub.Registration | None:
        return None if self._registration is None else self._registration()

    def _order(self, hook: str) -> Order:
        options: dict[str, Any] = {
            "rank": self.matrix_approximation_rank,
            "start_step": self.start_powerSGD_iter,
            "min_compression_rate": float(self.min_compression_rate),
            "error_feedback": bool(self.use_error_feedback),
            "warm_start": bool(self.warm_start),
            "seed": self.random_seed,
            "stats_frequency": self.compression_stats_logging_frequency,
        }
        if self.batch_tensors_with_same_shape and hook == "powersgd":
            options["batch_same_shapes"] = True
        group = group_of(self.process_group)
        return Order(hook=hook, options=options, process_group=group, registered=self._take)

    def _take(self, registration: commhub.Registration) -> None:
        self._registration = weakref.ref(registration)

    def __getattr__(self, name: str) -> NoReturn:
        if name in _INTERNAL:
            raise AttributeError(
                f"{name!r} is within commhub: commhub.registration(model).state_dict() has what the hook remembers, "
                "and .stats the figures."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> NoReturn:
        raise commhub.RegistrationError(
            "a PowerSGDState is not saved: it has no memory of its own. Save commhub.registration(model).state_dict() "
            "on every rank, or all of them with .save(directory), and load that after a new state was registered."
        )


def _order(state: Any, hook: str) -> Order:
    if not isinstance(state, PowerSGDState):
        raise commhub.HookOptionError(
            f"the state is {type(state).__name__}. Give a commhub_compat.PowerSGDState; PyTorch's own is not read."
        )
    return state._order(hook)


@as_comm_hook
def powerSGD_hook(state: Any) -> Order:  # noqa: N802 - PyTorch's name
    """Low-rank gradients, commhub's ``powersgd``: ``model.register_comm_hook(PowerSGDState(...), powerSGD_hook)``."""
    return _order(state, "powersgd")


@as_comm_hook
def batched_powerSGD_hook(state: Any) -> Order:  # noqa: N802 - PyTorch's name
    """Each whole bucket as one matrix of low rank, commhub's ``batched_powersgd``; takes a ``PowerSGDState``."""
    return _order(state, "batched_powersgd")
