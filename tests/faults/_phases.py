"""Where a fault strikes: each phase is set up, and then every rank acts.

To add one: a class, its name in PHASES, and a column of the table in ``test_matrix``.
"""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import attrs
import torch

import commhub
from commhub.registry._recipe import Recipe
from commhub.testing._faults import faults
from commhub.training.saving._folder import Folder

from ._faults import LONGER, SLEEPS, TIMEOUT
from ._here import LEARNING_RATE, PATIENT

if TYPE_CHECKING:
    from commhub.protocol._bucket import Bucket

    from ._here import Here


class Twice:
    """Averages in two stages. What a fault delays writes into the bucket afterwards: nothing of that may be seen."""

    def __init__(self, here: Here) -> None:
        self.here = here

    def prepare(self, setup: Any) -> None:
        setup.partition(self.here.at("prepare", [list(range(setup.world_size))]))

    def reduce(self, bucket: Bucket) -> commhub.Exchange:
        mine = bucket.flat.clone()
        if bucket.index == 1:
            mine = self.here.at("encode", mine)
        bucket.flat.fill_(1e6)
        mean = (yield commhub.AllReduce(mine)).clone()
        if bucket.index == 1:
            mean = self.here.at("between", mean)
        mean = (yield commhub.AllReduce(mean)).clone()
        if bucket.index == 2:
            self.here.at("confirm")
        bucket.flat.copy_(mean)


class Mean:
    """Averages the parameters after each step."""

    def __init__(self, here: Here) -> None:
        self.here = here

    def due(self, step: int) -> None:
        return None if step < 0 else self.everyone

    def prepare(self, setup: Any) -> None:
        self.everyone = setup.partition([range(setup.world_size)])

    def reduce(self, bucket: Bucket) -> commhub.Exchange:
        bucket.flat.copy_((yield commhub.AllReduce(self.here.at("average", bucket.flat.clone()))))


class Phase:
    """A step in which the fault strikes in the hook.

    Attributes:
        detains: whether it strikes in the thread that trains.
        launch: which of the victim's collectives a fault of the link hits.
    """

    detains: ClassVar[bool] = False
    launch: ClassVar[int | None] = None

    def set_up(self, here: Here) -> None:
        """Train a little with what is to fail, and then wait for peers no longer than the timeout."""
        here.build()
        with faults(here.link) as here.communicators:
            self.register(here)
        for step in range(2):  # buckets are rebuilt after the first
            self.step(here, step)
        session = here.registration._session
        session.target = attrs.evolve(session.target, timeout=TIMEOUT)
        session.driver._watch.timeout = TIMEOUT
        for group in here.communicators[0].bare._groups.values():
            group.set_timeout(timedelta(seconds=SLEEPS))

    def register(self, here: Here) -> None:
        here.registration = commhub.register(here.model, Twice(here), timeout=PATIENT)

    def step(self, here: Here, number: int) -> None:
        here.backward(number)

    def act(self, here: Here) -> None:
        """Do what the fault strikes in. Who needs nothing more of the victim learns of it in the next step."""
        self.step(here, 2)
        if here.fault.words:
            self.step(here, 3)


class Encode(Phase):
    launch = 0


class Between(Phase):
    launch = 2


class Confirm(Phase):
    launch = 6


class Average(Phase):
    launch = 0

    def register(self, here: Here) -> None:
        here.optimizer = torch.optim.SGD(here.model.parameters(), lr=LEARNING_RATE)
        here.registration = commhub.register(here.model, Mean(here), optimizer=here.optimizer, timeout=PATIENT)

    def step(self, here: Here, number: int) -> None:
        here.backward(number)
        here.optimizer.step()


def striking(here: Here) -> Any:
    """While a hook is made the fault strikes, on the way to where the ranks meet."""
    load = Recipe.load

    def struck(recipe: Recipe) -> Any:
        factory = load(recipe)
        return lambda **options: here.at(here.place, factory)(**options)

    return patch.object(Recipe, "load", struck)


class Handshake(Phase):
    detains = True

    def act(self, here: Here) -> None:
        with striking(here):
            commhub.register(here.model, here.hook, timeout=TIMEOUT)


class Prepare(Phase):
    detains = True

    def act(self, here: Here) -> None:
        commhub.register(here.model, Twice(here), timeout=TIMEOUT)


class Swap(Phase):
    detains = True

    def act(self, here: Here) -> None:
        with striking(here):
            here.registration.swap(here.hook)


class Schedule(Phase):
    """A swap that happens after a step, because it is its time."""

    detains = True

    def act(self, here: Here) -> None:
        here.registration.schedule({3: here.hook})
        with striking(here):
            here.backward(2)


class Save(Phase):
    detains = True

    def act(self, here: Here) -> None:
        write = Folder.write

        def strike(folder: Folder, *given: Any) -> Any:
            here.at("save", folder.path)
            return write(folder, *given)

        with patch.object(Folder, "write", strike):
            here.registration.save(here.folder)


class Load(Phase):
    detains = True

    def set_up(self, here: Here) -> None:
        super().set_up(here)
        here.registration.save(here.folder)

    def act(self, here: Here) -> None:
        read = Folder.read

        def strike(folder: Folder, *given: Any) -> Any:
            here.at("load", folder.path)
            return read(folder, *given)

        with patch.object(Folder, "read", strike):
            here.registration.load(here.folder)


class Exit(Phase):
    """The interpreter ends while a step is under way: nobody waits for it any more."""

    launch = 0

    def act(self, here: Here) -> None:
        here.place = "encode"
        if here.fault.stops and here.is_victim:  # its peers are gone then
            words = f"sleep {LONGER}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", words], start_new_session=True)
        engine = here.registration._session.engine
        engine.begin()
        for _ in range(3):
            engine.add(torch.ones(500_000), (), (), (), lambda: None)


PHASES: dict[str, Phase] = {
    "handshake": Handshake(),
    "prepare": Prepare(),
    "encode": Encode(),
    "between": Between(),
    "confirm": Confirm(),
    "average": Average(),
    "swap": Swap(),
    "schedule": Schedule(),
    "save": Save(),
    "load": Load(),
    "exit": Exit(),
}
