"""Quantized all-reduce in two steps, both at the same few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub.toolkit import Rules, Selection, TwoStep

from ._codes import Codes
from ._coding import Coding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from commhub import Bucket, Exchange, Setup

_ROW = 256
"""Elements that are handled together where they need not share a scale with them alone."""

_RESIDUALS = {"float32": None, "bf16": torch.bfloat16}


def _one_of(*allowed: object) -> Any:
    def check(_hook: object, field: attrs.Attribute[Any], value: object) -> None:
        if value not in allowed:
            raise ValueError(f"{field.name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")

    return check


def _group_size(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 16 or value % 16:
        raise ValueError(f"{field.name} is {value}; it must be a multiple of 16.")


@attrs.define(eq=False, kw_only=True, slots=False)
class _Quantize:
    """Average gradients as codes of a few bits, in two messages of the codes' size, for any number of ranks.

    The ranks share the work of summing. A parameter is cut into rows, and each rank owns an equal part of them:

    1. add what former steps left unsent: g = gradient + residual
    2. encode g; send every rank the codes that it owns, with their scales: one all-to-all
    3. decode what came, and average it in float32
    4. encode the mean; send it to all ranks: one all-gather
    5. decode. The owner does so too, so that the result is the same on all ranks, bit by bit
    6. keep what the codes missed: residual = g - decoded g. The owner adds what step 4 missed of the mean, as many
       times as there are ranks, for only it will send that: the residuals' mean is exactly what is unsent

    Two steps are those of a ring or tree all-reduce (Rabenseifner 2004), on codes as in QSGD (Alistarh et al. 2017,
    arXiv 1610.02132) and 1-bit Adam (Tang et al. 2021, arXiv 2102.02888).
    """

    bits: int = attrs.field(default=8, validator=_one_of(8, 4, 2))
    symmetric: bool = True
    error_feedback: bool | None = None
    residual_dtype: str = attrs.field(default="float32", validator=_one_of(*_RESIDUALS))
    stochastic_rounding: bool = False
    seed: int = 0
    dense_small: bool = True
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _two_step: TwoStep = attrs.field(init=False, repr=False, default=None)  # set when all is known

    def __attrs_post_init__(self) -> None:
        if self.error_feedback and self.stochastic_rounding and self.bits == 2:
            raise ValueError(
                "error_feedback with stochastic_rounding at 2 bits is not bounded: what is left grows from step to "
                "step. Leave one of them out; rounding by chance is right in expectation without."
            )
        self._two_step = TwoStep(
            self._code,
            Selection(Rules(self.rules, self._settings(), self._check)),
            self._keeps,
            residual_dtype=_RESIDUALS[self.residual_dtype],
            within=True,
        )

    def _check(self, settings: Mapping[str, object]) -> None:
        changed: dict[str, Any] = {"rules": {}, **settings}
        attrs.evolve(self, **changed)

    def prepare(self, setup: Setup) -> None:
        """Choose how each parameter is coded; allocate residuals; compile what is large enough."""
        self._two_step.prepare(setup)

    def reduce(self, bucket: Bucket) -> Exchange:
        """An all-to-all and an all-gather, of bytes; one plain all-reduce where nothing is compressed."""
        return self._two_step.reduce(bucket)

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """The all-to-all alone, of which each rank makes the mean of its part."""
        return self._two_step.reduce_scatter(bucket)

    def _keeps(self, codes: Codes) -> bool:
        if self.error_feedback is None:
            return codes.coding.bits < 8 and not self.stochastic_rounding  # by chance, nothing is lost on average
        return self.error_feedback

    def _settings(self) -> dict[str, object]:
        """What a rule may change, and what holds elsewhere."""
        return {"bits": self.bits, "symmetric": self.symmetric, "dense_small": self.dense_small}

    def _code(self, settings: Mapping[str, Any]) -> Codes:
        """By group where there is a group size, else one scale for all rows of a parameter."""
        coding = Coding(
            bits=settings["bits"],
            row=settings.get("group_size", _ROW),
            symmetric=settings["symmetric"],
            whole="group_size" not in settings,
            stochastic=self.stochastic_rounding,
        )
        return Codes(coding, self.seed if self.stochastic_rounding else None)


@attrs.define(eq=False, kw_only=True, slots=False)
class QuantizePerTensor(_Quantize):
    """Average gradients as codes of a few bits, one scale per parameter and rank; see ``QuantizePerChannel``.

    The mean is scaled once per parameter and owner. One large element makes a whole parameter coarse.

    Args:
        bits: of a code: 8, 4 or 2. With 2 and symmetric, codes are -1, 0 and 1.
        symmetric: codes stand for multiples of the scale; otherwise for a range that need not be symmetric.
        error_feedback: keep residuals; by default only below 8 bits, and not with stochastic rounding.
        residual_dtype: "float32", or "bf16" for half the memory.
        stochastic_rounding: round up or down by chance, so that the expectation is exact.
        seed: of that chance.
        dense_small: send vectors, scalars and parameters of less than 1024 elements uncompressed: they are few,
            and most of the error would come from them.
        rules: by glob on parameter names, ``"dense"`` or a dict of ``bits``, ``symmetric``, ``dense_small``.
    """


@attrs.define(eq=False, kw_only=True, slots=False)
class QuantizePerChannel(_Quantize):
    """Average gradients as codes of a few bits, with a scale for each group of elements.

    An all-to-all and an all-gather of codes, for any number of ranks: 2 (p-1)/p of the codes' bytes, as an
    all-reduce of them would send. Scales travel with their codes, and so does what is not compressed.

    Args:
        group_size: elements that share a scale, a multiple of 16; rules may set it too.

    The other arguments are those of ``QuantizePerTensor``.
    """

    group_size: int = attrs.field(default=256, validator=_group_size)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "group_size": self.group_size}
