"""Who keeps whom waiting, told from where each rank says that it is."""

import json
from types import SimpleNamespace

import pytest

from commhub import AllReduce, Broadcast
from commhub.drivers._asked import Position
from commhub.drivers._progress import Doing, Progress, told_behind
from commhub.drivers._told import told_left
from commhub.protocol._collectives import Subgroup


class Fake(SimpleNamespace):
    """As much of a task as there has to be."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def task(bucket=0, stage=0, step=2, group=None, kinds=(AllReduce,), topic="step"):
    jobs = tuple(SimpleNamespace(kind=kind, group=group) for kind in kinds)
    place = SimpleNamespace(index=bucket, step=step)
    return Fake(jobs=jobs, stage=stage, bucket=place, position=Position(topic, (step,)), finished=False)


def flight(is_over):
    return SimpleNamespace(is_done=lambda: is_over)


def at(*tasks, ended=0, held=0, told="waits too", waits=True):
    """What a rank answers that has come to these tasks, of which so many have ended, and so many are held back."""
    progress = Progress()
    for number, one in enumerate(tasks):
        progress.comes_to(one)
        if number < len(tasks) - held:
            progress.issued(one, [flight(number < ended)])
        if number < ended - 1:  # and has gone on with the results, but for the last of them
            progress.has(one)
    return Doing.read(json.loads(json.dumps(progress.said(told, waits=waits))))


def several(*answers):
    return dict(enumerate(answers))


FIRST, SECOND, THIRD = task(0), task(1), task(0, stage=1)
HERE, THERE = at(FIRST, SECOND), at(FIRST, SECOND, THIRD, ended=2)


@pytest.mark.parametrize("asks", [0, 1, 2])
def test_who_waits_for_what_has_ended_elsewhere_is_behind_whoever_asks(asks):
    told = told_behind(asks, several(THERE, HERE, THERE))
    assert told == (
        "rank 1 is behind: it waits for AllReduce 1 of bucket 0 in step 2, which has ended on ranks 0, 2; there "
        "AllReduce 2 of bucket 0 in step 2 is awaited"
    )


def test_who_holds_a_collective_back_waits_for_who_has_not_come_to_it():
    """And not for those before it, which may have ended since."""
    held = at(FIRST, SECOND, THIRD, ended=2, held=1)
    assert told_behind(0, several(held, HERE, held)).startswith("rank 1 is behind: ")
    on_its_way = at(FIRST, SECOND, THIRD, ended=1, held=1)
    assert on_its_way.at == "AllReduce 2 of bucket 0 in step 2"
    assert told_behind(1, several(on_its_way, HERE)).startswith("rank 1 is behind: ")


def test_several_may_be_behind_in_one_place():
    told = told_behind(0, several(THERE, HERE, HERE))
    assert told.startswith("ranks 1-2 are behind: they wait for AllReduce 1 of bucket 0 in step 2, which has ended on ")
    told = told_behind(1, several(THERE, HERE, HERE))
    assert told.startswith("ranks 1-2 are behind: ")


def test_what_has_ended_nowhere_is_blamed_on_no_rank():
    told = told_behind(1, several(HERE, HERE, HERE))
    assert told == (
        "AllReduce 1 of bucket 0 in step 2 has begun on all ranks and ended on none: a message between them is late or "
        "lost"
    )


def test_who_has_not_come_and_waits_for_nothing_is_told_by_what_it_does():
    idle = at(FIRST, SECOND, ended=2, told="asks for nothing at present", waits=False)
    assert told_behind(0, several(THERE, idle, THERE)) == "rank 1 asks for nothing at present"


def test_who_does_nothing_now_but_has_come_is_not_blamed():
    idle = at(FIRST, SECOND, THIRD, ended=3, told="asks for nothing at present", waits=False)
    assert told_behind(0, several(HERE, idle)).startswith("rank 0 is behind: ")


def test_a_rank_that_waits_for_another_group_first_is_not_the_first_cause():
    left, right = Subgroup((0, 1), 1), Subgroup((2, 3), 1)
    mine, theirs = task(0, group=left), task(0, group=right)
    late = at(told="has been in the hook's code for 3.0 s", waits=False)
    waits_for_late = at(theirs)
    everyone = at(mine, task(1), ended=1)
    told = told_behind(0, several(everyone, everyone, waits_for_late, late))
    assert told == "rank 3 has been in the hook's code for 3.0 s"


def test_ranks_that_wait_for_each_other_are_named_with_what_each_waits_for():
    one, other = Subgroup((0, 1), 1), Subgroup((0, 1), 2)
    first = at(task(0, group=one), waits=True)
    second = at(task(1, group=other, kinds=(Broadcast,)), waits=True)
    each = "rank 0 for AllReduce 1 of bucket 0 in step 2; rank 1 for Broadcast 1 of bucket 1 in step 2"
    assert told_behind(0, several(first, second)) == f"the ranks wait for each other: {each}"


def test_the_words_are_few_however_many_ranks_there_are():
    answers = {rank: at(*[task(b) for b in range(rank + 1)], ended=rank) for rank in range(64)}
    for asks in range(64):
        assert len(told_behind(asks, answers)) < 500
    late = {rank: at(told=f"has been in the hook's code for {rank}.0 s", waits=False) for rank in range(64)}
    late[7] = HERE
    assert len(told_behind(7, late)) < 500
    assert len(told_left(dict.fromkeys(range(64), "has exited: " + 50 * "x"))) < 500


def test_an_answer_of_words_alone_is_understood():
    assert Doing.read("connects its groups").told == "connects its groups"
    closed = Doing.read("has closed its registration")
    assert told_behind(0, several(HERE, closed)) == "rank 1 has closed its registration"


def test_who_awaits_no_collective_names_who_does_not_wait():
    mine = at(told="waits for a peer's answer", waits=False)
    idle = at(told="asks for nothing at present", waits=False)
    assert told_behind(0, several(mine, HERE, idle)) == "rank 2 asks for nothing at present"
    assert told_behind(0, several(mine, HERE, HERE)) == "every rank answers, and waits too"


def test_what_was_given_up_is_awaited_no_more():
    progress = Progress()
    progress.comes_to(FIRST)
    assert progress.place() == "AllReduce 1 of bucket 0 in step 2"
    progress.forget()
    assert progress.place() == ""
    assert Doing.read(progress.said("waits", waits=True)).awaits == frozenset()


@pytest.mark.parametrize(
    ("topic", "words"),
    [("average among 0, 1 (1)", "1 of bucket 0 in the average of step 2"), ("sum", "of commhub's own in step 2")],
)
def test_what_is_no_bucket_of_a_step_is_told_by_its_topic(topic, words):
    assert at(task(topic=topic, kinds=(AllReduce, Broadcast))).at == f"AllReduce, Broadcast {words}"
