"""Error feedback: writing an error straight into the residual, where keeping it would only copy."""

import pytest
import torch

import commhub


class Writing:
    """Sends nothing and remembers everything; says what it was offered to write into."""

    def __init__(self, *, finite=True, used=True, loss_scale=1.0):
        self.finite, self.used, self.loss_scale, self.offered = finite, used, loss_scale, None

    def prepare(self, setup):
        self.feedback = commhub.toolkit.ErrorFeedback(setup, setup.names)

    def reduce(self, bucket):
        bucket.used = (self.used,)
        bucket.loss_scale = self.loss_scale
        bucket.finite = bucket.finite & self.finite
        error = self.feedback.compensated(bucket, 0)
        residual = self.feedback.writable(bucket, 0)
        self.offered = residual is not None
        if residual is None:
            self.feedback.keep(bucket, 0, error.clone())
        else:
            residual.copy_(error)
        bucket.flat.copy_((yield commhub.AllReduce(torch.zeros_like(bucket.flat))))


def test_what_is_written_is_the_residual():
    gradient = torch.arange(6.0).view(2, 3).t()
    result = commhub.simulate(Writing(), [[gradient]], steps=3)
    assert result.hooks[0].offered
    assert torch.equal(result.states[0].local("0")["residual"], 3 * gradient)


@pytest.mark.parametrize("otherwise", [{"finite": False}, {"used": False}, {"loss_scale": 2.0}], ids=str)
def test_it_is_not_offered_where_keeping_does_more_than_to_copy(otherwise):
    result = commhub.simulate(Writing(**otherwise), [[torch.ones(3)]])
    assert not result.hooks[0].offered
    assert result.states[0].local("0")["residual"].tolist() == [0.5 if "loss_scale" in otherwise else 0.0] * 3


@pytest.mark.parametrize("used", [True, False])
def test_what_waits_is_the_residual_itself_unless_the_parameter_was_not_used(used):
    class Looking(Writing):
        def reduce(self, bucket):
            waiting = self.feedback.waiting(bucket, 0)
            assert waiting.shape == (6,)
            waiting.fill_(3.0)
            bucket.used = (used,)
            assert (self.feedback.waiting(bucket, 0) is None) == (not used)
            yield commhub.AllReduce(bucket.flat)

    result = commhub.simulate(Looking(), [[torch.zeros(2, 3).t()]])
    assert result.states[0].local("0")["residual"].tolist() == [[3.0] * 2] * 3
