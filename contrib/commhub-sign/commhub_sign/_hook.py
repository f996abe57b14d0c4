"""Signs with error feedback (Karimireddy et al. 2019, arXiv 1901.09847), averaged in two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from commhub.toolkit import Rules, Selection, TwoStep

from ._signs import Signs

if TYPE_CHECKING:
    from commhub import Bucket, Exchange, Setup


def _group_size(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 8 or value % 8:
        raise ValueError(f"{field.name} is {value}; it must be a multiple of 8.")


def _start_step(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 0:
        raise ValueError(f"{field.name} is {value}; it must be at least 0.")


def _in_order(_name: str, rows: int, p: int) -> list[range]:
    """Which rank sums which groups of a parameter: the first so many, the next so many, ..."""
    share = -(-rows // p)
    return [range(min(rank * share, rows), min((rank + 1) * share, rows)) for rank in range(p)]


@attrs.define(eq=False, kw_only=True, slots=False)
class Sign:
    """Average gradients as signs and a scale per group, in two messages of that size, for any number of ranks.

    The ranks share the work of summing; each owns as many groups of every parameter:

    1. add what former steps left unsent: v = gradient + residual
    2. for each group send sign(v) and the mean of |v|, to the rank that owns it: one all-to-all
    3. average what came, in float32 or wider
    4. encode the mean in the same way and send it to all ranks: one all-gather
    5. the result is scale times sign; the owner too takes it from there, so that all ranks have the same bits
    6. residual = v - decoded v. The owner adds what step 4 missed, times the ranks, for only it will send that

    Steps 1, 2 and 6 are EF-signSGD (arXiv 1901.09847); both directions are compressed as in 1-bit Adam (Tang et al.
    2021, arXiv 2102.02888).

    Args:
        group_size: elements that share a scale, a multiple of 8.
        dense_small: average vectors and parameters of less than 1024 elements exactly; complex ones always are.
        start_step: this many steps are averaged exactly first.
        rules: by glob on parameter names, ``"dense"`` for what is averaged exactly.

    Raises:
        ValueError: if an option is out of range.
    """

    group_size: int = attrs.field(default=64, validator=_group_size)
    dense_small: bool = True
    start_step: int = attrs.field(default=1000, validator=_start_step)
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _two_step: TwoStep = attrs.field(init=False, repr=False, default=None)  # set when all is known

    def __attrs_post_init__(self) -> None:
        selection = Selection(Rules(self.rules, {}), start_step=self.start_step, dense_small=self.dense_small)
        self._two_step = TwoStep(Signs(self.group_size), selection, owners=_in_order)

    def prepare(self, setup: Setup) -> None:
        """Choose what is compressed; allocate residuals."""
        self._two_step.prepare(setup)

    def reduce(self, bucket: Bucket) -> Exchange:
        """An all-to-all and an all-gather of bytes; beside the first an all-reduce of what is averaged exactly."""
        return self._two_step.reduce(bucket)

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """The all-to-all alone, and beside it a reduce-scatter of what is averaged exactly."""
        return self._two_step.reduce_scatter(bucket)
