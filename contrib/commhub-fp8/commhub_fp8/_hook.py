"""8-bit floats with error feedback (Karimireddy et al. 2019, arXiv 1901.09847), averaged in two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from commhub.toolkit import Rules, Selection, TwoStep

from ._codec import E4M3

if TYPE_CHECKING:
    from commhub import Bucket, Exchange, Setup


def _group_size(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 16 or value % 16:
        raise ValueError(f"{field.name} is {value}; it must be a multiple of 16.")


def _start_step(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 0:
        raise ValueError(f"{field.name} is {value}; it must be at least 0.")


@attrs.define(eq=False, kw_only=True, slots=False)
class FP8:
    """Average gradients as e4m3 codes and a scale per group, in two messages of that size, for any number of ranks.

    The ranks share the work of summing; each owns as many groups of every parameter:

    1. add what former steps left unsent: v = gradient + residual
    2. for each group send v / s, rounded to e4m3, and s = max |v| / 448, to the rank that owns it: one all-to-all
    3. average what came, in float32 or wider
    4. encode the mean in the same way and send it to all ranks: one all-gather
    5. the result is scale times code; the owner too takes it from there, so that all ranks have the same bits
    6. residual = v - decoded v. The owner adds what step 4 missed, times the ranks, for only it will send that

    e4m3 (Micikevicius et al. 2022, arXiv 2209.05433) rounds to 4 significant bits, over a range of 2^17.

    Args:
        group_size: elements that share a scale, a multiple of 16.
        error_feedback: keep what was not sent, and add it to the next gradient.
        dense_small: average vectors and parameters of less than 1024 elements exactly; complex ones always are.
        start_step: this many steps are averaged exactly first.
        rules: by glob on parameter names, ``"dense"`` for what is averaged exactly.

    Raises:
        ValueError: if an option is out of range.
    """

    group_size: int = attrs.field(default=512, validator=_group_size)
    error_feedback: bool = True
    dense_small: bool = True
    start_step: int = attrs.field(default=0, validator=_start_step)
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _two_step: TwoStep = attrs.field(init=False, repr=False, default=None)  # set when all is known

    def __attrs_post_init__(self) -> None:
        selection = Selection(Rules(self.rules, {}), start_step=self.start_step, dense_small=self.dense_small)
        self._two_step = TwoStep(E4M3(self.group_size), selection, self.error_feedback)

    def prepare(self, setup: Setup) -> None:
        """Choose what is compressed; allocate residuals."""
        self._two_step.prepare(setup)

    def reduce(self, bucket: Bucket) -> Exchange:
        """An all-to-all and an all-gather of bytes; beside the first an all-reduce of what is averaged exactly."""
        return self._two_step.reduce(bucket)

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """The all-to-all alone, and beside it a reduce-scatter of what is averaged exactly."""
        return self._two_step.reduce_scatter(bucket)
