"""``relay``: an exchange inside another one, its requests and results changed on the way."""

import pytest

import commhub


class Inner:
    """An exchange that yields what it is given, and notes what it is sent and whether it was closed."""

    def __init__(self, *requests, error=None):
        self.requests, self.error, self.got, self.closed = requests, error, [], 0

    def exchange(self):
        try:
            for request in self.requests:
                self.got.append((yield request))
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


def unchanged(requests):
    return (yield requests)


def shouted(requests):
    """Asks for each in capitals, and answers with what came back between brackets."""
    results = yield tuple(request.upper() for request in requests)
    return tuple(f"<{result}>" for result in results)


def driven(exchange):
    """All that the exchange asks for, each answered with itself."""
    asked, answer = [], None
    while True:
        try:
            request = exchange.send(answer)
        except StopIteration:
            return asked
        asked.append(request)
        answer = request


def test_a_single_request_reaches_the_stage_as_a_tuple_of_one_and_gets_a_single_result():
    inner = Inner("a", "b")
    assert driven(commhub.relay(inner.exchange(), unchanged)) == [("a",), ("b",)]
    assert inner.got == ["a", "b"]


def test_a_tuple_of_requests_gets_a_tuple_of_results_also_where_it_holds_one_or_none():
    inner = Inner(("a", "b"), ("c",), ())
    assert driven(commhub.relay(inner.exchange(), unchanged)) == [("a", "b"), ("c",), ()]
    assert inner.got == [("a", "b"), ("c",), ()]


def test_the_stage_changes_what_is_asked_for_and_what_is_answered():
    inner = Inner("a", ("b", "c"))
    assert driven(commhub.relay(inner.exchange(), shouted)) == [("A",), ("B", "C")]
    assert inner.got == ["<A>", ("<B>", "<C>")]


def test_a_stage_may_ask_twice_or_not_at_all():
    def twice(requests):
        first = yield requests
        return (yield tuple(reversed(first)))

    def alone(requests):
        return [f"{request}!" for request in requests]
        yield

    inner = Inner(("a", "b"), "c")
    assert driven(commhub.relay(inner.exchange(), twice)) == [("a", "b"), ("b", "a"), ("c",), ("c",)]
    assert inner.got == [("b", "a"), "c"]
    inner = Inner(("a", "b"), "c")
    assert driven(commhub.relay(inner.exchange(), alone)) == []
    assert inner.got == [("a!", "b!"), "c!"]


def test_an_exchange_that_ends_at_once_asks_the_stage_for_nothing():
    inner = Inner()
    assert driven(commhub.relay(inner.exchange(), shouted)) == []
    assert inner.closed == 1


def test_what_the_inner_exchange_raises_comes_out_unchanged():
    error = ValueError("inside")
    with pytest.raises(ValueError, match="inside") as caught:
        driven(commhub.relay(Inner("a", error=error).exchange(), shouted))
    assert caught.value is error


def test_an_exchange_that_is_closed_in_the_middle_closes_the_inner_one_at_once():
    inner, stages = Inner("a", "b"), []

    def stage(requests):
        try:
            return (yield requests)
        finally:
            stages.append(inner.closed)

    exchange = inner.exchange()  # held here, so that nobody but the relay closes it
    outer = commhub.relay(exchange, stage)
    assert next(outer) == ("a",)
    outer.close()
    assert (inner.closed, inner.got, stages) == (1, [], [0])


def test_a_stage_that_raises_closes_the_inner_exchange():
    inner = Inner("a")

    def stage(requests):
        yield requests
        raise ValueError("in the stage")

    exchange = inner.exchange()
    outer = commhub.relay(exchange, stage)
    next(outer)
    with pytest.raises(ValueError, match="in the stage"):
        outer.send(("a",))
    assert (inner.closed, inner.got) == (1, [])


def test_a_hook_with_a_relay_gives_what_its_inner_hook_gives_with_the_changed_requests():
    import attrs
    import torch

    class Narrow:
        def __init__(self):
            self.inner = commhub.create("allreduce")

        def reduce(self, bucket):
            def stage(requests):
                return (yield tuple(attrs.evolve(request, wire=torch.float16) for request in requests))

            yield from commhub.relay(self.inner.reduce(bucket), stage)

    exact, sent = torch.tensor([1.0 + 2.0**-14]), torch.tensor([1.0])
    result = commhub.simulate(Narrow(), [[exact], [exact]])
    assert result.gradients[0][0].tolist() == sent.tolist()
    assert result.compression == 2.0


@pytest.mark.parametrize("asked", ["a", ("a", "b")], ids=["a single one", "two"])
@pytest.mark.parametrize("answer", ["", "a", ("a", "b", "c"), None], ids=["text", "one", "three", "nothing"])
def test_a_stage_that_returns_anything_but_a_result_for_each_is_an_error_that_says_so(asked, answer):
    def stage(requests):
        yield requests
        return answer

    inner = Inner(asked)
    exchange = inner.exchange()
    with pytest.raises(
        commhub.HookError, match=r"the stage of a relay returned .* for [12]: return a tuple of results"
    ):
        driven(commhub.relay(exchange, stage))
    assert (inner.closed, inner.got) == (1, [])
