"""One training step played through in virtual time: backward, the communication thread, and the link.

The communication thread does what ``drivers._pipeline.Pipeline`` does, in its order. Training, that thread and what
moves the bytes share the cores that a rank has: where there are fewer cores than work, all of it slows down alike.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import attrs

from commhub.drivers._pipeline import STRIDE

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

_NEVER = float("inf")


@attrs.frozen(kw_only=True)
class Flight:
    """One collective on its way. Seconds.

    Attributes:
        latency: that it takes on top of its bytes; another one's bytes may travel meanwhile.
        occupied: for which its bytes keep the link busy.
        load: the share of a core that moving them takes.
    """

    latency: float
    occupied: float
    load: float = 0.0


@attrs.frozen(kw_only=True)
class Stage:
    """What a hook does until it asks for collectives, and these. Seconds of a core that does nothing else."""

    work: float
    flights: tuple[Flight, ...]


@attrs.frozen(kw_only=True)
class Bucket:
    """One bucket of gradients. Seconds of a core that does nothing else.

    Attributes:
        ready: of training, since the step began, after which its gradients are there.
        stages: what its hook does.
        decode: the hook's work after the last collective.
    """

    ready: float
    stages: tuple[Stage, ...] = ()
    decode: float = 0.0


@attrs.frozen(kw_only=True)
class Step:
    """All that happens in a step. Seconds of a core that does nothing else.

    Attributes:
        buckets: in the order in which they are ready.
        computed: of training until backward has nothing left to do but wait.
        after: of training when all buckets are there.
        word: latency of the exchange by which ranks tell each other that all went well; zero for none.
        cores: that a rank has.
    """

    buckets: tuple[Bucket, ...]
    computed: float
    after: float = 0.0
    word: float = 0.0
    cores: float = _NEVER


@attrs.frozen(kw_only=True)
class Played:
    """What came of it, in seconds since the step began.

    Attributes:
        seconds: when the step ended.
        exposed: for how long training did nothing but wait.
        issued: per bucket and stage, when its collectives were issued.
        landed: per bucket and stage, when all of them had arrived.
    """

    seconds: float
    exposed: float
    issued: dict[tuple[int, int], float]
    landed: dict[tuple[int, int], float]


def play(step: Step) -> Played:
    """Play a step through."""
    return _Clock(step).run()


class _Clock:
    """Virtual time, and how far training is in it.

    Attributes:
        now: seconds since the step began.
        trained: seconds of work that training has done, of a core that does nothing else.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.now = self.trained = self._computed_at = 0.0
        self._link = _Link(self)
        self._thread = _Thread(step.buckets, self, self._link)
        self._milestones = sorted({*(bucket.ready for bucket in step.buckets), step.computed})

    def run(self) -> Played:
        step, moves = self._step, self._thread.moves()
        work = next(moves, None)  # that the thread has left; zero while it waits for something
        while work is not None or self.trained < step.computed:
            left = self._advance(work or 0.0)
            if work is not None:
                work = left if left else next(moves, None)
        end = max(self._computed_at, self.now)
        if step.word and step.buckets:
            end += step.word
        return Played(
            seconds=end + step.after,
            exposed=end - self._computed_at,
            issued=self._thread.issued,
            landed=self._link.landed,
        )

    def _advance(self, work: float) -> float:
        """Go on to where something changes; what is left of the thread's work then."""
        target = next((each for each in self._milestones if each > self.trained), None)
        busy = (target is not None) + (work > 0) + self._link.load(self.now)
        speed = min(1.0, self._step.cores / busy) if busy else 1.0
        training = _NEVER if target is None else (target - self.trained) / speed
        working = work / speed if work else _NEVER
        change = self._link.next_change(self.now)
        passed = min(training, working, change - self.now)
        assert passed < _NEVER, "everybody waits"
        self.now = change if passed == change - self.now else self.now + passed
        if target is not None:
            self.trained = target if passed == training else self.trained + passed * speed
            self._computed_at = self.now
        return 0.0 if passed == working else max(0.0, work - passed * speed)


class _Link:
    """Carries one flight's bytes after another's, in the order in which they were issued."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._free_at = 0.0
        self._carried: list[tuple[float, float, float]] = []
        self._changes: list[float] = []
        self.landed: dict[tuple[int, int], float] = {}

    def launch(self, key: tuple[int, int], flights: Sequence[Flight]) -> None:
        landed = self._clock.now
        for flight in flights:
            begins = max(self._clock.now, self._free_at)
            self._free_at = begins + flight.occupied
            self._carried.append((begins, self._free_at, flight.load))
            landed = max(landed, self._free_at + flight.latency)
            self._changes += [begins, self._free_at, landed]
        self.landed[key] = landed

    def load(self, now: float) -> float:
        return sum(load for begins, ends, load in self._carried if begins <= now < ends)

    def next_change(self, now: float) -> float:
        return min((change for change in self._changes if change > now), default=_NEVER)


class _Thread:
    """The communication thread: a generator of the work that it does next, or of zero where it waits."""

    def __init__(self, buckets: Sequence[Bucket], clock: _Clock, link: _Link) -> None:
        self._buckets, self._clock, self._link = buckets, clock, link
        self._entered = 0
        self._stage: dict[int, int] = {}  # of those that were started
        self._in_flight: dict[int, tuple[int, int]] = {}
        self.issued: dict[tuple[int, int], float] = {}

    def moves(self) -> Generator[float, None, None]:
        active: dict[int, int] = {}  # and the turn in which each entered
        for turn in itertools.count():
            for bucket in [each for each, entered in active.items() if (turn - entered) % STRIDE == 0]:
                while bucket in self._in_flight:
                    yield from self._do_something()
                self._go_on(bucket, active)
            bucket = self._entered
            if bucket < len(self._buckets):
                while not self._is_ready(bucket):
                    yield from self._do_something()
                if bucket not in self._stage:
                    yield from self._start(bucket)
                self._entered += 1
                active[bucket] = turn
                self._go_on(bucket, active)
            elif not active:
                return

    def _go_on(self, bucket: int, active: dict[int, int]) -> None:
        if self._is_finished(bucket):
            del active[bucket]
            return
        key = bucket, self._stage[bucket]
        self._in_flight[bucket] = key
        self.issued[key] = self._clock.now
        self._link.launch(key, self._buckets[bucket].stages[key[1]].flights)

    def _do_something(self) -> Generator[float, None, None]:
        """Resume what has arrived, else encode what waits, else wait."""
        now = self._clock.now
        landed = next((each for each, key in self._in_flight.items() if self._link.landed[key] <= now), None)
        unstarted = (each for each in range(self._entered, len(self._buckets)) if each not in self._stage)
        waiting = next(unstarted, None)
        if landed is not None:
            del self._in_flight[landed]
            self._stage[landed] += 1
            yield from self._work(landed)
        elif waiting is not None and self._is_ready(waiting):
            yield from self._start(waiting)
        else:
            yield 0.0

    def _start(self, bucket: int) -> Generator[float, None, None]:
        self._stage[bucket] = 0
        yield from self._work(bucket)

    def _work(self, bucket: int) -> Generator[float, None, None]:
        plan = self._buckets[bucket]
        work = plan.decode if self._is_finished(bucket) else plan.stages[self._stage[bucket]].work
        if work > 0:
            yield work

    def _is_finished(self, bucket: int) -> bool:
        return self._stage[bucket] >= len(self._buckets[bucket].stages)

    def _is_ready(self, bucket: int) -> bool:
        return self._buckets[bucket].ready <= self._clock.trained
