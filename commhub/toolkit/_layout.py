"""Which elements of a bucket are coded in which rows, and which rank sums which row. Pure arithmetic, no tensors.

A parameter's memory is cut into rows, of which the last may be short. Each rank owns a run of a parameter's rows: who
owns a row depends on the parameter's name and size alone, so that it survives other buckets and a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import attrs

from commhub._errors import HookOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Owners = Callable[[str, int, int], Sequence[range]]
    """From a parameter's name, the number of its rows, and p: for each rank a run of rows, each row in one of them."""


@attrs.frozen
class Stretch:
    """Elements of the bucket that follow one another: ``length`` of them from ``offset``."""

    offset: int
    length: int


@attrs.frozen
class Lines:
    """One parameter's rows.

    Attributes:
        place: of the parameter in the bucket.
        rows: their numbers in the section: whole rows in a run, then perhaps a short one.
        stretch: the elements that they hold.
        skipped: how many of the parameter's elements lie before these.
    """

    place: int
    rows: tuple[int, ...]
    stretch: Stretch
    skipped: int = 0

    def part(self, low: int, high: int, width: int) -> Lines:
        """The rows from ``low`` to ``high`` of them."""
        length = min(high * width, self.stretch.length) - low * width
        stretch = Stretch(self.stretch.offset + low * width, length)
        return Lines(self.place, self.rows[low:high], stretch, self.skipped + low * width)


@attrs.frozen(eq=False)
class Section:
    """All parameters of a bucket that are coded alike.

    Rows are numbered: those that are full, parameter after parameter, then the short ones. One more, empty, fills
    the shares up to equal lengths.

    Attributes:
        width: elements of a row.
        lines: each parameter's rows.
        full: stretches of whole rows, in the order of their rows.
        short: what is left of each parameter that does not fill its last row, in the order of their rows.
        shares: for each rank the rows that it owns, all of one length.
        owned: what each rank's share holds, in its order.
    """

    width: int
    lines: tuple[Lines, ...]
    full: tuple[Stretch, ...]
    short: tuple[Stretch, ...]
    shares: tuple[tuple[int, ...], ...]
    owned: tuple[tuple[Lines, ...], ...]

    @property
    def rows(self) -> int:
        """Rows without the empty one."""
        return sum(len(line.rows) for line in self.lines)

    @property
    def share_rows(self) -> int:
        """Rows of a share."""
        return len(self.shares[0])

    def parameters(self) -> list[int]:
        """For each row, and the empty one, its parameter's number in ``lines``; the empty one's is ``len(lines)``."""
        numbers = [len(self.lines)] * (self.rows + 1)
        for number, line in enumerate(self.lines):
            for row in line.rows:
                numbers[row] = number
        return numbers

    def counts(self) -> list[int]:
        """For each row how many elements of it are its parameter's; for the empty one 1, to divide by."""
        return [self.width] * (self.rows - len(self.short)) + [stretch.length for stretch in self.short] + [1]


_sections: WeakValueDictionary[object, Section] = WeakValueDictionary()
"""Those in use. All ranks of a simulation have the same ones, and each of them takes work for every rank."""


def section(
    width: int, places: Sequence[int], names: Sequence[str], spans: Sequence[Stretch], p: int, owners: Owners
) -> Section:
    """Lay out the parameters at ``places`` in rows of ``width`` elements among p ranks.

    Args:
        width: of a row.
        places: of the parameters in the bucket.
        names, spans: those of the whole bucket.
        p: ranks.
        owners: which of them sums which rows.

    Raises:
        HookOptionError: if ``owners`` does not give each row to one rank.
    """
    mine = tuple((place, names[place], spans[place]) for place in places)
    if not isinstance(owners, Hashable):
        return _lay_out(width, places, names, spans, p, owners)
    key = width, mine, p, owners
    found = _sections.get(key)
    if found is None:
        found = _sections[key] = _lay_out(width, places, names, spans, p, owners)
    return found


def _lay_out(
    width: int, places: Sequence[int], names: Sequence[str], spans: Sequence[Stretch], p: int, owners: Owners
) -> Section:
    whole = sum(spans[place].length // width for place in places)
    lines, full, short = [], [], []
    first, tail = 0, whole
    for place in places:
        offset, length = spans[place].offset, spans[place].length
        count, rest = divmod(length, width)
        rows = tuple(range(first, first + count))
        first += count
        if count:
            full.append(Stretch(offset, count * width))
        if rest:
            short.append(Stretch(offset + count * width, rest))
            rows += (tail,)
            tail += 1
        lines.append(Lines(place, rows, spans[place]))
    owned: list[list[Lines]] = [[] for _ in range(p)]
    for line in lines:
        runs = owners(names[line.place], len(line.rows), p)
        if len(runs) != p or sorted(row for run in runs for row in run) != list(range(len(line.rows))):
            raise HookOptionError(
                f"owners={getattr(owners, '__name__', owners)} gave {list(runs)} for {len(line.rows)} rows of "
                f"{names[line.place]!r} among {p} ranks. Give one range for each rank, with every row in one of them."
            )
        for mine, run in zip(owned, runs, strict=True):
            if run:
                mine.append(line.part(run.start, run.stop, width))
    shares = [[row for part in parts for row in part.rows] for parts in owned]
    longest = max(map(len, shares))
    return Section(
        width=width,
        lines=tuple(lines),
        full=joined(full),
        short=tuple(short),
        shares=tuple((*share, *[tail] * (longest - len(share))) for share in shares),
        owned=tuple(map(tuple, owned)),
    )


def in_turn(name: str, rows: int, p: int) -> list[range]:
    """Runs as equal as can be, the first one at a rank that the name decides: many small parameters spread evenly."""
    first = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % p
    bounds = [-(-k * rows // p) for k in range(p + 1)]
    return [range(bounds[k], bounds[k + 1]) for k in ((rank - first) % p for rank in range(p))]


def joined(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The same elements, with neighbours joined."""
    found: list[Stretch] = []
    for stretch in stretches:
        if found and found[-1].offset + found[-1].length == stretch.offset:
            found[-1] = Stretch(found[-1].offset, found[-1].length + stretch.length)
        else:
            found.append(stretch)
    return tuple(found)
