"""An average that runs in the background is over before a forward reads what it writes to."""

import time

import pytest
import torch

from commhub import Subgroup
from commhub.training.averaging._timetable import Timetable


class Always:
    def due(self, step):
        return Subgroup((0, 1))


@pytest.mark.parametrize("trains", [True, False])
def test_a_forward_waits_for_the_average(trains):
    module, done = torch.nn.Linear(2, 2), []

    def average(step, group, failure=None):
        time.sleep(0.2)
        done.append(step)

    timetable = Timetable(Always(), average, 2, lambda: list(module.named_parameters()), str)
    timetable.watch(module, [torch.optim.SGD(module.parameters(), lr=0.1)])
    timetable.record(0)
    timetable.run_due_in_background()
    module.train(trains)
    module(torch.ones(1, 2))
    assert done == [0]
    timetable.close()
