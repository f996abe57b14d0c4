"""An all-reduce of codes in two steps, whatever the codec and the number of ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from commhub._errors import HookOptionError
from commhub.protocol._collectives import AllGather, AllToAll

from ._codec import checked, shown
from ._columns import columns_of
from ._feedback import ErrorFeedback
from ._layout import Stretch, in_turn, joined, section
from ._messages import Messages
from ._noise import Noise
from ._per_bucket import PerBucket
from ._pieces import part_of
from ._scatter import Scatter
from ._selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange
    from commhub.protocol._setup import Setup

    from ._codec import Codec, FullCodec
    from ._layout import Owners
    from ._part import Part
    from ._scatter import Coded


class TwoStep:
    """A hook that averages codes, in two messages of their size, for any number of ranks.

    The ranks share the work of summing. A parameter is cut into rows, and each rank owns some of them:

    1. add what former steps left unsent: g = gradient + residual
    2. encode g; send every rank the codes that it owns, with their scales: one all-to-all
    3. decode what came, and average it in float32, or wider
    4. encode the mean; send it to all ranks: one all-gather
    5. decode. The owner does so too, so that the result is the same on all ranks, bit by bit
    6. keep what the codes missed: residual = g - decoded g. The owner adds what step 4 missed of the mean, as many
       times as there are ranks, for only it will send that: the residuals' mean is exactly what is unsent

    Two steps are those of a ring or tree all-reduce (Rabenseifner 2004). Error feedback is inside, for it needs what
    this rank itself contributed.

    Args:
        codec: how all parameters are coded, or a function that makes a codec of a parameter's settings.
        selection: what is compressed.
        feedback: whether residuals are kept, or a function that says so of a codec.
        residual_dtype: of the residuals, where that is not to be the wider of float32 and the gradient's.
        within: send what is not compressed in the two messages as well, summed in rank order in float32 or wider;
            otherwise it is all-reduced beside the first one.
        owners: which rank sums which rows: from a parameter's name, how many rows it has, and p, a range of them for
            each rank. By default all have as many, beginning with a rank that the name decides.

    Raises:
        HookOptionError: if one of them cannot be that; for a function's codecs when the hook is prepared.
    """

    def __init__(
        self,
        codec: Codec | Callable[[Mapping[str, object]], Codec],
        selection: Selection,
        feedback: bool | Callable[[Any], bool] = True,
        *,
        residual_dtype: torch.dtype | None = None,
        within: bool = False,
        owners: Owners = in_turn,
    ) -> None:
        self._makes = callable(codec) and not isinstance(codec, type) and not hasattr(codec, "encode")
        if not self._makes:
            checked(cast("Codec", codec))
        if not isinstance(selection, Selection):
            raise HookOptionError(f"selection is {selection!r}; give a Selection.")
        if residual_dtype is not None and not residual_dtype.is_floating_point:
            raise HookOptionError(f"residual_dtype is {residual_dtype}; residuals need a floating dtype.")
        self._codec, self._selection, self._wanted = codec, selection, feedback
        self._residual_dtype, self._within, self._owners = residual_dtype, within, owners
        self._codecs: dict[str, Codec] = {}
        self._messages, self._scatters = PerBucket(self._lay_out), PerBucket(self._lay_out_parts)
        self._feedback: ErrorFeedback | None = None
        self._noise: Noise | None = None

    def prepare(self, setup: Setup) -> None:
        """Choose how each parameter is coded; allocate residuals; have codecs prepare."""
        self._messages, self._scatters = PerBucket(self._lay_out), PerBucket(self._lay_out_parts)
        made: dict[Codec, Codec] = {}  # equal ones are one
        chosen = self._selection.choose(setup)
        codecs = {name: self._code(settings) for name, settings in chosen.items()}
        self._codecs = {name: made.setdefault(codec, codec) for name, codec in codecs.items()}
        kept = [name for name, codec in self._codecs.items() if self._keeps(codec)]
        self._feedback = ErrorFeedback(setup, kept, dtype=self._residual_dtype) if kept else None
        self._noise = Noise(setup.device)
        setup.agree("how parameters are coded", self._shown)
        sizes: dict[tuple[Codec, torch.dtype], int] = {}
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
            if name in self._codecs:
                key = self._codecs[name], torch.promote_types(dtype, torch.float32)
                sizes[key] = sizes.get(key, 0) + torch.Size(shape).numel()
        for (codec, dtype), elements in sizes.items():
            if hasattr(codec, "prepare"):
                cast("FullCodec", codec).prepare(dtype, setup.device, elements, keeping=self._keeps(codec))

    def reduce(self, bucket: Bucket) -> Exchange:
        """An all-to-all and an all-gather of bytes; one plain all-reduce where nothing is compressed."""
        if not self._selection.places(bucket):
            yield from self._selection.exactly(bucket)
            return
        messages = self._messages[bucket]

        # 1. g = gradient + residual, in the bucket's own memory if that is wide enough.
        values = messages.working_copy(bucket.flat)
        for part in messages.parts:
            if self._feedback is not None and self._keeps(part.codec):
                for line in part.section.lines:
                    self._feedback.add(bucket, line.place, part_of(values, line.stretch))

        # 2. Encode, and send every rank what it owns.
        for part in messages.parts:
            part.encode(values, self._draw(part, bucket, own=False), keeping=self._keeps(part.codec))
        messages.fill(values, bucket.divisor)
        first = AllToAll(messages.message.view(-1))
        if self._within:
            received = yield first
        else:
            received = yield from self._selection.beside(bucket, first)

        # 3. The mean of this rank's share. 4. Encode it, and send it to all.
        messages.sum(received, bucket.divisor)
        for part in messages.parts:
            part.encode_own(self._draw(part, bucket, own=True), keeping=self._keeps(part.codec))
            part.fill_own(messages.share)
        gathered = yield AllGather(messages.share)

        # 6. Keep what the codes missed, unless there was no number somewhere. 5. Decode the result.
        bucket.finite = bucket.finite & messages.finite(gathered, bucket.flat.dtype)
        for part in messages.parts:
            if self._feedback is not None and self._keeps(part.codec):
                self._keep(bucket, part, values, self._feedback)
        messages.take(gathered, values)
        if values is not bucket.flat:
            self._put_back(bucket, messages, values)

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """Steps 1 to 3 alone: an all-to-all of bytes, of which each rank makes the mean of its part.

        Rows never cross a rank's part, and residuals are what this rank's own codes missed.
        """
        assert bucket.shard is not None
        if not self._selection.places(bucket):
            yield from self._selection.exactly(bucket)
            return
        scatter, columns = self._scatters[bucket], columns_of(bucket)
        values = scatter.wide("values", bucket.flat)
        if values is not bucket.flat:
            values.copy_(bucket.flat)
        parts = values.view(bucket.parts.shape)
        kept = [
            (one.codec, line.place) for one in scatter.coded for line in one.section.lines if self._keeps(one.codec)
        ]
        feedback = cast("ErrorFeedback", self._feedback)  # there is one if anything is kept
        for _, place in kept:
            feedback.add(bucket, place, parts[:, columns[place]])
        for rank, part in enumerate(parts):
            for one in scatter.coded:
                one.encode(part, rank, self._draw_for(one, bucket, rank), keeping=self._keeps(one.codec))
        scatter.fill(parts, bucket.divisor)
        first = AllToAll(scatter.message.view(-1))
        if self._within:
            received = yield first
        else:
            received = yield from self._selection.beside(bucket, first)
        for codec, place in kept:  # where a row was not finite, its rank says so at the end of the step
            feedback.keep(bucket, place, parts[:, columns[place]], finite=getattr(codec, "bounded", False))
        out = scatter.wide("out", bucket.shard)
        scatter.sum(received, out, bucket.divisor)
        if out is not bucket.shard:
            coded = [line.place for one in scatter.coded for line in one.section.lines]
            for place in range(len(columns)) if self._within else coded:
                bucket.shard[columns[place]] = out[columns[place]]

    def _keep(self, bucket: Bucket, part: Part, values: Tensor, feedback: ErrorFeedback) -> None:
        row = 0
        for line in part.owned:
            missed = part.own[row : row + len(line.rows)].view(-1)[: line.stretch.length].mul_(bucket.divisor)
            row += len(line.rows)
            if bucket.used[line.place]:
                part_of(values, line.stretch).add_(missed)
            else:  # it keeps its residual, and takes this on top
                feedback.deposit(bucket, line.place, line.skipped, missed)
        # All values that any rank coded were finite, or the mean's scales are not.
        bounded = getattr(part.codec, "bounded", False)
        for line in part.section.lines:
            feedback.keep(bucket, line.place, part_of(values, line.stretch), finite=bounded)

    def _put_back(self, bucket: Bucket, messages: Messages, values: Tensor) -> None:
        if self._within:
            bucket.flat.copy_(values)
            return
        for part in messages.parts:  # what travelled beside is in its place already
            for line in part.section.lines:
                bucket.segments[line.place].copy_(part_of(values, line.stretch))

    def _lay_out(self, bucket: Bucket) -> Messages:
        spans = [Stretch(span.offset, span.numel) for span in bucket.spans]
        by_codec, rest = self._sorted(bucket, spans)
        p = bucket.world_size
        return Messages(
            [
                (codec, section(codec.row, places, bucket.names, spans, p, self._owners))
                for codec, places in by_codec.items()
            ],
            joined(rest) if self._within else (),
            rank=bucket.rank,
            p=p,
            dtype=torch.promote_types(bucket.flat.dtype, torch.float32),
            device=bucket.flat.device,
        )

    def _lay_out_parts(self, bucket: Bucket) -> Scatter:
        p = bucket.world_size
        spans = [Stretch(span.offset, span.numel // p) for span in bucket.spans]
        by_codec, rest = self._sorted(bucket, spans)
        return Scatter(
            [
                (codec, section(codec.row, places, bucket.names, spans, 1, in_turn))
                for codec, places in by_codec.items()
            ],
            joined(rest) if self._within else (),
            p=p,
            dtype=torch.promote_types(bucket.flat.dtype, torch.float32),
            device=bucket.flat.device,
        )

    def _sorted(self, bucket: Bucket, spans: Sequence[Stretch]) -> tuple[dict[Codec, list[int]], list[Stretch]]:
        """Places of the parameters by their codec, and where those lie that have none."""
        by_codec: dict[Codec, list[int]] = {}
        rest = []
        for place, name in enumerate(bucket.names):
            if name in self._codecs:
                by_codec.setdefault(self._codecs[name], []).append(place)
            else:
                rest.append(spans[place])
        return by_codec, rest

    def _draw_for(self, coded: Coded, bucket: Bucket, rank: int) -> Tensor | None:
        seed = getattr(coded.codec, "seed", None)
        if seed is None or self._noise is None:
            return None
        purpose = bucket.rank, rank
        return self._noise.draw(coded.noise, coded.section.lines, bucket, seed, purpose, packed=False)

    def _draw(self, part: Part, bucket: Bucket, *, own: bool) -> Tensor | None:
        seed = getattr(part.codec, "seed", None)
        if seed is None or self._noise is None:
            return None
        if own:
            return self._noise.draw(part.noise(own=True), part.owned, bucket, seed, "mean", packed=True)
        return self._noise.draw(part.noise(own=False), part.section.lines, bucket, seed, bucket.rank, packed=False)

    def _shown(self) -> str:
        """What ranks must have alike, of what no option says: which parameter is coded how, and the rest."""
        words = {codec: shown(codec) + " with residuals" * self._keeps(codec) for codec in self._codecs.values()}
        counts = Counter(words[codec] for codec in self._codecs.values())
        which = repr([(name, words[codec]) for name, codec in self._codecs.items()])
        digest = hashlib.sha256(which.encode()).hexdigest()[:12]  # in few words, where the counts do not tell
        coded = [f"{word} for {count} parameters" for word, count in counts.items()]
        owners = getattr(self._owners, "__qualname__", type(self._owners).__qualname__)
        said = [f"names {digest}", f"from step {self._selection.start_step} on", f"within={self._within}", f"{owners=}"]
        return "; ".join(coded + said)

    def _code(self, settings: Mapping[str, object]) -> Codec:
        return checked(cast("Any", self._codec)(settings)) if self._makes else cast("Codec", self._codec)

    def _keeps(self, codec: Codec) -> bool:
        return self._wanted(codec) if callable(self._wanted) else self._wanted
