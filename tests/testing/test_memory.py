"""What is seen of a hook's memory: what it makes anew, how much of that is alive at once, and from which step on."""

import torch

import commhub
from commhub.testing import Largest, Living, Watched


def test_the_largest_new_tensor_is_seen_and_views_and_results_in_place_are_not():
    given = torch.ones(1000)
    with Largest() as seen:
        given.view(10, 100).add_(1)
    assert seen.nbytes == 0
    with Largest() as seen:
        given[:10].clone()
        given[:20].to(torch.float64)
        given[:5].split(2)
    assert seen.nbytes == 160


def test_what_was_alive_at_once_is_counted_and_what_is_gone_is_not():
    with Living() as seen:
        for _ in range(3):
            torch.zeros(100).add_(1)
        kept = torch.zeros(50)
        both = kept + 1
        both.view(5, 10)
    assert seen.peak == 400
    del kept, both
    with seen:
        _both = torch.zeros(100), torch.zeros(1)
    assert seen.peak == 404


class Growing:
    """Makes as many elements as there were steps, and others while it prepares."""

    def prepare(self, setup):
        self.kept = torch.zeros(1000)

    def reduce(self, bucket):
        torch.zeros(10 * (bucket.step + 1))
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))
        torch.zeros(10 * (bucket.step + 2))


def test_a_hook_is_watched_from_a_step_on_and_does_what_it_does():
    def watched(since, steps, mode=Largest):
        result = commhub.simulate(Watched(Growing(), mode, since), [[torch.ones(3)], [torch.zeros(3)]], steps=steps)
        assert result.gradients[0][0].tolist() == [0.5] * 3
        return result.hooks[1].seen

    assert watched(0, 1).nbytes == 80
    assert watched(1, 1).nbytes == 0
    assert watched(1, 2).nbytes == 120
    assert watched(-1, 1).nbytes == 4000
    assert watched(-1, 1, Living).peak == 4080
