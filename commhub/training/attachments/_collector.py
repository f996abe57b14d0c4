"""The attachment to a bare module: its gradients are collected into buckets when the user says so."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from commhub._errors import CommhubError
from commhub.protocol._spans import lay_out
from commhub.training._trained import Trained
from commhub.training.steps._between import Between
from commhub.training.steps._own_hooks import Failure

from ._packing import Packed, pack, sparse_in
from ._unprepared import Unprepared

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from commhub.training._session import Session
    from commhub.training._trained import Named


class Collector:
    """Feeds an engine with the gradients of a module, or with empty steps for an averager.

    Attributes:
        after: as in ``Attachment``.
    """

    _session: Session

    def __init__(self, module: nn.Module) -> None:
        self.after: weakref.WeakMethod[Callable[[], None]] | None = None
        self._module = module
        self._trained = Trained(weakref.ref(module))
        self._prepared: tuple[Named, ...] | None = None
        self._buckets: list[Packed] = []
        self._sparse: list[Named] = []

    def parameters(self) -> tuple[Named, ...]:
        """Those that this rank trains now, or has trained."""
        return self._trained.look()

    def attach(self, session: Session, owner: object) -> None:  # noqa: ARG002 - nothing here is found by its owner
        """Feed this session's engine; lay the gradients out that its hook was prepared for."""
        self._session = session
        prepared = session.target.parameters
        if prepared is not self._prepared:
            sparse = sparse_in(self._module)
            self._prepared = prepared
            self._buckets = pack([(name, p) for name, p in prepared if id(p) not in sparse])
            self._sparse = [(name, p) for name, p in prepared if id(p) in sparse]
            self._unprepared = Unprepared(self._trained, self._module, prepared)

    def detach(self) -> bool:
        """Nothing comes any more."""
        return False

    def count(self, finish: Callable[[], None]) -> None:
        """Count a step without gradients, then average the parameters if they are due, which ``finish`` does.

        Raises:
            HookError: what went wrong.
        """
        engine = self._session.engine
        engine.begin()
        failure = engine.end() or engine.after_step()
        if failure is not None:
            raise failure
        finish()
        self._follow()

    def reduce(self) -> None:
        """Average the gradients in place.

        Raises:
            HookError: what went wrong, on every rank; also where ranks do not train the same parameters.
        """
        try:
            self._reduce()
        except CommhubError:
            raise
        except Exception as error:  # gradients may be of anybody's making
            engine = self._session.engine
            failure = Between(engine, engine.step).tell(
                Failure("the gradients cannot be averaged", error), self._session.target.device
            )
            if engine.in_step:
                engine.abandon()
                engine.settle()
            assert failure is not None
            raise failure from error
        failure = self._session.engine.after_step()
        if failure is not None:
            raise failure
        self._follow()

    def _reduce(self) -> None:
        target, engine, unprepared = self._session.target, self._session.engine, self._unprepared
        somewhere = self._used_somewhere()
        scale = target.loss_scale
        with torch.no_grad():
            engine.begin(loss_scale=scale)
            filled: list[tuple[Tensor, Tensor]] = []
            for packed, plain in [*((p, False) for p in self._buckets), *((p, True) for p in unprepared.buckets)]:
                flat, views = packed.empty(target.device)
                fit = [plain or unprepared.knows(parameter) for parameter in packed.parameters]
                pairs = [(p, v) for p, v, fits in zip(packed.parameters, views, fit, strict=True) if fits]
                for parameter, view in pairs:
                    if parameter.grad is not None:
                        view.copy_(parameter.grad)
                used = tuple(fits and p.grad is not None for p, fits in zip(packed.parameters, fit, strict=True))
                engine.add(flat, packed.parameters, packed.spans, used, plain=plain)
                filled += pairs
            for name, parameter in [*self._sparse, *unprepared.sparse]:
                if parameter.grad is None and id(parameter) in somewhere:
                    parameter.grad = torch.sparse_coo_tensor(
                        torch.empty((1, 0), dtype=torch.int64),
                        parameter.new_empty((0, *parameter.shape[1:])),
                        parameter.shape,
                        device=parameter.device,
                    )
                if parameter.grad is not None:
                    engine.add(parameter.grad, [parameter], lay_out([name], [parameter]), (True,))
            failure = engine.end()
            if failure is not None:
                raise failure
            for parameter, view in filled:
                if parameter.grad is not None:
                    parameter.grad.copy_(view)
                elif id(parameter) in somewhere:
                    parameter.grad = view.clone()

    def _follow(self) -> None:
        after = None if self.after is None else self.after()
        if after is not None:
            after()

    def _used_somewhere(self) -> set[int]:
        """The parameters that have a gradient on some rank. What ranks train is compared here where it has changed.

        Raises:
            HookError: if the ranks differ in it.
        """
        engine, target = self._session.engine, self._session.target
        prepared = [p for _, p in target.parameters]
        while True:
            late, changed = self._unprepared.look()
            flags = [p is not None and p.grad is not None for p in (*prepared, *late)]
            told = torch.tensor([*flags, changed], dtype=torch.float32, device=target.device)
            counts = engine.sum(told).tolist()
            if not counts[-1]:
                break
            failure = self._unprepared.agree(engine, target.device)
            if failure is not None:
                raise failure
        self._unprepared.pack()
        return {id(p) for p, count in zip((*prepared, *late), counts[:-1], strict=True) if count}
