"""Averaging in bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from commhub.toolkit import CastAllReduce, Rules

if TYPE_CHECKING:
    from commhub import Bucket, Exchange, Setup


@attrs.define(eq=False, kw_only=True, slots=False)
class Bf16:
    """Average gradients in bfloat16: half the bytes of float32 and its range, 8 significant bits.

    Args:
        rules: by glob on parameter names, ``"dense"`` for what travels in the gradients' own dtype.
    """

    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _rules: Rules = attrs.field(init=False, repr=False, default=None)  # set when all is known
    _average: CastAllReduce = attrs.field(init=False, repr=False, default=None)  # set by prepare

    def __attrs_post_init__(self) -> None:
        self._rules = Rules(self.rules, {})

    def prepare(self, setup: Setup) -> None:
        """Choose what is not cast."""
        self._average = CastAllReduce(torch.bfloat16, self._rules.dense(setup.names))

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-reduce of the bucket (any dtype), cast for the way; 16-bit gradients travel as they are."""
        return self._average.reduce(bucket)
