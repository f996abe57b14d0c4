"""Which parameters of a module are trained. Asked whenever it matters: users freeze, unfreeze, add and replace them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from commhub._errors import RegistrationError

from ._replicated import home_of, ignored_buffers, replicated

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    Named = tuple[str, nn.Parameter]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Under which ``torch.compile`` and activation checkpointing keep the module that they wrap."""


def named(model: nn.Module, *, ignored: bool = False) -> Iterator[Named]:
    """The module's parameters, frozen ones too, by the name they have in the bare module.

    A name does not change when the module, or a part of it, is compiled or has its activations checkpointed. What DDP
    was told to ignore is left out, unless ``ignored``, and a lazy module's that has no shape yet. A module of
    ``replicate()`` has the parameters that this averages.
    """
    module, left_out = _bare(model)
    for name, parameter in replicated(module) or module.named_parameters():
        if (ignored or name not in left_out) and not is_lazy(parameter):
            yield unwrapped(name), parameter


def trainable(model: nn.Module) -> Iterator[Named]:
    """Those that require gradients now."""
    return ((name, parameter) for name, parameter in named(model) if parameter.requires_grad)


def buffers_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers, named as ``named`` names parameters."""
    module, left_out = _bare(model)
    left_out = left_out | ignored_buffers(module)
    for name, buffer in module.named_buffers():
        if name not in left_out and not is_lazy(buffer):
            yield unwrapped(name), buffer


def unwrapped(name: str) -> str:
    """A name without what ``torch.compile`` and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def local(tensor: Tensor) -> Tensor:
    """What this rank keeps of a tensor, sharing its memory: all of it, unless it is a DTensor."""
    part = getattr(tensor, "to_local", None)
    if part is None:
        return tensor
    with torch.no_grad():
        kept: Tensor = part()
    return kept


def nbytes_of(name: str, parameter: Tensor) -> int:
    """The bytes that a parameter takes in a bucket.

    Raises:
        RegistrationError: if it is sparse itself, as no bucket is.
    """
    if parameter.layout is not torch.strided:
        raise RegistrationError(f"{name!r} is a parameter of layout {parameter.layout}; only dense ones are averaged.")
    return parameter.nbytes


def _bare(model: nn.Module) -> tuple[nn.Module, set[str]]:
    model = home_of(model)
    if isinstance(model, DistributedDataParallel):
        return model.module, model.parameters_to_ignore
    return model, set()


class Trained:
    """The parameters that this rank trains, and those that it has trained: one frozen later may have drifted.

    Args:
        module: whose; a DDP model or a bare one.
        kept: gives the parameters, where they are not simply the module's.
        written: called when some were written to.
    """

    def __init__(
        self,
        module: weakref.ref[nn.Module],
        kept: Callable[[], Sequence[Named]] | None = None,
        written: Callable[[], None] | None = None,
    ) -> None:
        self._module, self._kept, self._written = module, kept, written
        self._names: set[str] = set()
        self.look()

    def look(self) -> tuple[Named, ...]:
        """Those that the module holds now, in its order; to be asked after each step that may train others."""
        module = self._module()
        every = () if module is None else tuple(named(module) if self._kept is None else self._kept())
        self._names.update(name for name, parameter in every if parameter.requires_grad)
        return tuple((name, parameter) for name, parameter in every if name in self._names)

    def parts(self) -> tuple[tuple[str, Tensor], ...]:
        """What this rank keeps of them: all of each, or of a DTensor its part, unless that has no elements."""
        every = ((name, parameter, local(parameter)) for name, parameter in self.look())
        return tuple((name, part) for name, parameter, part in every if part is parameter or part.numel())

    def written(self) -> None:
        """Have the module compute with what was written into its parameters."""
        if self._written is not None:
            self._written()

    def buffers(self) -> tuple[tuple[str, Tensor], ...]:
        """The buffers that the module holds now."""
        module = self._module()
        return () if module is None else tuple(buffers_of(module))
