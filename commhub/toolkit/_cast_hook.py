"""The hook that averages in a narrower dtype: what differs from one to another is the dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from commhub._errors import HookOptionError
from commhub.protocol._wire import short_dtype

from ._cast_all_reduce import CastAllReduce
from ._rules import Rules

if TYPE_CHECKING:
    import torch

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange
    from commhub.protocol._setup import Setup


@attrs.define(eq=False, kw_only=True, slots=False)
class CastHook:
    """Averages gradients in the dtype ``wire``, which a class made from this one names; all else is here.

    Args:
        rules: by glob on parameter names, ``"dense"`` for what travels in the gradients' own dtype.

    Attributes:
        wire: a floating dtype. The mean is taken before the cast, and sums are taken in this dtype.

    Raises:
        HookOptionError: if a rule is anything but ``"dense"``.
    """

    wire: ClassVar[torch.dtype]
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _rules: Rules = attrs.field(init=False, repr=False, default=None)  # set when all is known
    _average: CastAllReduce = attrs.field(init=False, repr=False, default=None)  # set by prepare

    def __attrs_post_init__(self) -> None:
        self._rules = Rules(self.rules, {})

    def prepare(self, setup: Setup) -> None:
        """Choose what is not cast.

        Raises:
            HookOptionError: if a rule's pattern matches no parameter, or if ``wire=`` is given and all is cast here.
        """
        dense = self._rules.dense(setup.names)
        if setup.wire is not None and not dense:
            mine, given = short_dtype(self.wire), short_dtype(setup.wire)
            raise HookOptionError(f"wire={given} changes nothing: all that this hook sends is cast to {mine} already.")
        self._average = CastAllReduce(self.wire, dense)

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-reduce of the bucket (any dtype), cast for the way; 16-bit gradients travel as they are."""
        return self._average.reduce(bucket)

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """One reduce-scatter of the bucket, cast in the same way."""
        return self._average.reduce_scatter(bucket)
