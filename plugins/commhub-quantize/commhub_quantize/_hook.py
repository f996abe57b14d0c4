"""Quantized all-reduce in two steps, both at the same few bits."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub import AllGather, AllReduce, AllToAll, Bucket, Exchange, Setup
from commhub.toolkit import ErrorFeedback, PerBucket, Rules

from ._coding import Coding
from ._layout import Stretch, joined, section
from ._noise import Noise
from ._plan import Part, Plan, part_of
from ._work import Work, kernels, work_on

if TYPE_CHECKING:
    from collections.abc import Mapping

_SMALL = 1024
"""Elements below which a parameter counts as small."""

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
    _codings: dict[str, Coding] = attrs.field(init=False, factory=dict, repr=False)
    _work: dict[tuple[Coding, torch.dtype], Work] = attrs.field(init=False, factory=dict, repr=False)
    _plans: PerBucket[Plan] = attrs.field(init=False, repr=False, default=None)  # set by prepare
    _feedback: ErrorFeedback | None = attrs.field(init=False, default=None, repr=False)
    _noise: Noise | None = attrs.field(init=False, default=None, repr=False)
    _rules: Rules = attrs.field(init=False, repr=False, default=None)  # set when all is known

    def __attrs_post_init__(self) -> None:
        if self.error_feedback and self.stochastic_rounding and self.bits == 2:
            raise ValueError(
                "error_feedback with stochastic_rounding at 2 bits is not bounded: what is left grows from step to "
                "step. Leave one of them out; rounding by chance is right in expectation without."
            )
        self._rules = Rules(self.rules, self._settings(), self._check)

    def _check(self, settings: Mapping[str, object]) -> None:
        changed: dict[str, Any] = {"rules": {}, **settings}
        attrs.evolve(self, **changed)

    def prepare(self, setup: Setup) -> None:
        """Choose how each parameter is coded; allocate residuals; compile what is large enough."""
        self._codings, self._plans = {}, PerBucket(self._lay_out)
        chosen = self._rules.settings(setup.names)
        sizes: dict[tuple[Coding, torch.dtype], int] = {}
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
            settings = chosen[name]
            small = len(shape) < 2 or prod(shape) < _SMALL
            if (
                settings is None
                or not dtype.is_floating_point
                or (small and settings["dense_small"])
                or not prod(shape)
            ):
                continue
            coding = self._coding(settings)
            self._codings[name] = coding
            key = coding, torch.promote_types(dtype, torch.float32)
            sizes[key] = sizes.get(key, 0) + prod(shape)
        kept = [name for name, coding in self._codings.items() if self._keeps(coding)]
        self._feedback = ErrorFeedback(setup, kept, dtype=_RESIDUALS[self.residual_dtype]) if kept else None
        self._noise = Noise(self.seed, setup.device) if self.stochastic_rounding else None
        self._work = {
            (coding, dtype): work_on(coding, dtype, setup.device, elements, keeping=self._keeps(coding))
            for (coding, dtype), elements in sizes.items()
        }

    def reduce(self, bucket: Bucket) -> Exchange:
        """An all-to-all and an all-gather, of bytes; one plain all-reduce where nothing is compressed."""
        plan = self._plans[bucket]
        if not plan.parts:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
            return

        # 1. g = gradient + residual, in the bucket's own memory if that is wide enough.
        values = plan.working_copy(bucket.flat)
        for part in plan.parts:
            for line in part.section.lines:
                if self._feedback is not None and self._keeps(part.section.coding):
                    self._feedback.add(bucket, line.place, part_of(values, line.stretch))

        # 2. Encode, and send every rank what it owns.
        for part in plan.parts:
            noise = self._draw(part, bucket, own=False)
            part.encode(values, noise, keeping=self._keeps(part.section.coding))
        plan.fill(values, bucket.divisor)
        received = yield AllToAll(plan.message.view(-1))

        # 3. The mean of this rank's share. 4. Encode it, and send it to all.
        plan.sum(received, bucket.divisor)
        for part in plan.parts:
            part.encode_own(self._draw(part, bucket, own=True), keeping=self._keeps(part.section.coding))
            part.fill_own(plan.share)
        gathered = yield AllGather(plan.share)

        # 6. Keep what the codes missed, unless there was no number somewhere. 5. Decode the result.
        bucket.finite = bucket.finite & plan.finite(gathered)
        for part in plan.parts:
            if self._keeps(part.section.coding):
                self._keep(bucket, part, values)
        plan.take(gathered, values)
        if values is not bucket.flat:
            bucket.flat.copy_(values)

    def _keep(self, bucket: Bucket, part: Part, values: Tensor) -> None:
        assert self._feedback is not None
        row = 0
        for line in part.owned:
            missed = part.own[row : row + len(line.rows)].view(-1)[: line.stretch.length].mul_(bucket.divisor)
            row += len(line.rows)
            if bucket.used[line.place]:
                part_of(values, line.stretch).add_(missed)
            else:  # it keeps its residual, and takes this on top
                self._feedback.deposit(bucket, line.place, line.skipped, missed)
        for line in part.section.lines:
            # All values that any rank coded were finite, or the mean's marks are not.
            self._feedback.keep(bucket, line.place, part_of(values, line.stretch), finite=True)

    def _lay_out(self, bucket: Bucket) -> Plan:
        sizes = [segment.numel() for segment in bucket.segments]
        spans = [Stretch(end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        by_coding: dict[Coding, list[int]] = {}
        dense = []
        for place, name in enumerate(bucket.names):
            if name in self._codings:
                by_coding.setdefault(self._codings[name], []).append(place)
            else:
                dense.append(spans[place])
        p = bucket.world_size
        wide = torch.promote_types(bucket.flat.dtype, torch.float32)
        return Plan(
            [section(coding, places, bucket.names, spans, p) for coding, places in by_coding.items()],
            {coding: self._work.get((coding, wide)) or kernels(coding) for coding in by_coding},
            joined(dense),
            rank=bucket.rank,
            p=p,
            dtype=wide,
            device=bucket.flat.device,
        )

    def _draw(self, part: Part, bucket: Bucket, *, own: bool) -> Tensor | None:
        if self._noise is None:
            return None
        if own:
            return self._noise.draw(part.noise(own=True), part.owned, bucket, "mean", packed=True)
        return self._noise.draw(part.noise(own=False), part.section.lines, bucket, bucket.rank, packed=False)

    def _keeps(self, coding: Coding) -> bool:
        if self.error_feedback is None:
            return coding.bits < 8 and not self.stochastic_rounding  # by chance, nothing is lost on average
        return self.error_feedback

    def _settings(self) -> dict[str, object]:
        """What a rule may change, and what holds elsewhere."""
        return {"bits": self.bits, "symmetric": self.symmetric, "dense_small": self.dense_small}

    def _coding(self, settings: Mapping[str, Any]) -> Coding:
        """By group where there is a group size, else one scale for all rows of a parameter."""
        return Coding(
            bits=settings["bits"],
            row=settings.get("group_size", _ROW),
            symmetric=settings["symmetric"],
            whole="group_size" not in settings,
            stochastic=self.stochastic_rounding,
        )


@attrs.define(eq=False, kw_only=True, slots=False)
class QuantizePerTensor(_Quantize):
    """Average gradients as codes of a few bits, one scale per parameter and rank; see `QuantizePerChannel`.

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

    The other arguments are those of `QuantizePerTensor`.
    """

    group_size: int = attrs.field(default=256, validator=_group_size)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "group_size": self.group_size}
