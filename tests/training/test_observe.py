"""Observers see every collective that a hook asks for and its results, whatever hook runs."""

import contextlib
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, HookError, ReduceScatter, RegistrationError
from commhub.testing import batches, mlp


class TwoStages:
    """A mean in two stages, the first of two collectives."""

    def reduce(self, bucket):
        pad = -bucket.flat.numel() % bucket.world_size
        whole = torch.cat([bucket.flat, bucket.flat.new_zeros(pad)])
        mine, _ = yield ReduceScatter(whole), AllGather(torch.zeros(3))
        bucket.flat.copy_((yield AllGather(mine))[: bucket.flat.numel()])


class Each:
    """Averages parameters after every second step, and nothing of the gradients."""

    def prepare(self, setup):
        self._everyone = setup.partition([range(setup.world_size)])

    def due(self, step):
        return self._everyone if step % 2 else None

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def observed(registration):
    """What an observer has seen so far; what ends it."""
    seen = []

    def before(bucket, requests):
        told = [(type(r), r.tensor.numel()) for r in requests]
        seen.append(("before", bucket.step, bucket.index, told, threading.current_thread().name))

    def after(bucket, requests, results):
        told = [(type(r), result.numel()) for r, result in zip(requests, results, strict=True)]
        seen.append(("after", bucket.step, bucket.index, told, threading.current_thread().name))

    return seen, registration.observe(before, after)


def step(model, number):
    model.zero_grad()
    model(*batches(8)(dist.get_rank(), number)).square().mean().backward()


def of_two_stages():
    net = mlp()
    model = DistributedDataParallel(net)
    registration = commhub.register(model, TwoStages())
    seen, _ = observed(registration)
    step(model, 0)
    elements = sum(p.numel() for p in net.parameters())
    return seen, elements + elements % 2, registration.stats.sent_bytes


def test_each_stage_is_seen_as_it_is_asked_for_and_as_it_is_answered(ranks):
    for seen, elements, counted in ranks(of_two_stages, 2):
        asked, given = (
            [(ReduceScatter, elements), (AllGather, 3)],
            [(ReduceScatter, elements // 2), (AllGather, 6)],
        )
        assert [event[:4] for event in seen] == [
            ("before", 0, 0, asked),
            ("after", 0, 0, given),
            ("before", 0, 0, [(AllGather, elements // 2)]),
            ("after", 0, 0, [(AllGather, elements)]),
        ]
        assert {event[4] for event in seen} == {"commhub"}  # the driver's thread, as the docstring says
        requests = [request for kind, *_, told, _ in seen if kind == "before" for request in told]
        assert counted == sum(kind.sent_bytes(4 * n, 2) for kind, n in requests)  # and nothing else is sent


def over_changes(folder):
    model = DistributedDataParallel(mlp(), bucket_cap_mb=1e-6)
    registration = commhub.register(model, "allreduce")
    seen, end = observed(registration)

    def kinds(number):
        del seen[:]
        step(model, number)
        return {(kind, told[0][0]) for kind, _, _, told, _ in seen}

    found = [kinds(0)]
    registration.swap(TwoStages())
    found.append(kinds(1))
    registration.save(folder)
    registration.schedule({registration.step: "allreduce", registration.step + 9: "fp16"})
    found.append(kinds(2))
    commhub.register(model, TwoStages()).remove()  # another registration ends it
    found.append(kinds(3))
    registration = commhub.register(model, TwoStages())
    seen, end = observed(registration)
    registration.load(folder)
    found.append(kinds(4))
    end()
    end()
    found.append(kinds(5))
    observed(registration)
    registration.remove()
    found.append(kinds(6))
    with pytest.raises(RegistrationError, match="removed"):
        registration.observe()
    return found


def test_observers_stay_over_every_change_of_the_hook_until_they_or_the_registration_end(ranks, tmp_path):
    both = {"before", "after"}
    mean = {(when, AllReduce) for when in both}
    stages = {(when, kind) for when in both for kind in (ReduceScatter, AllGather)}
    assert ranks(over_changes, 2, tmp_path / "hook") == [[mean, stages, mean, set(), stages, set(), set()]] * 2


def of_averages():
    module = mlp()
    registration = commhub.manual(module, Each())
    seen, _ = observed(registration)
    for _ in range(4):
        registration.average()
    pickle.loads(pickle.dumps(module))  # without its observers, which could not be
    return [event[:4] for event in seen], sum(p.numel() for p in module.parameters())


def test_averages_of_parameters_are_seen_and_what_the_core_asks_is_not(ranks):
    for seen, elements in ranks(of_averages, 2):
        whole = [(AllReduce, elements)]
        assert seen == [(when, at, 0, whole) for at in (1, 3) for when in ("before", "after")]


def raising(when):
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce", timeout=20)

    def planned(bucket, *_):
        if bucket.step == 1 and bucket.rank == 1:
            raise ValueError("planned")

    registration.observe(**{when: planned})
    step(model, 0)
    with pytest.raises(HookError) as told:
        step(model, 1)
    failed = registration.step
    registration.swap("allreduce")
    registration.observe()  # neither is needed
    with pytest.raises(HookError):
        step(model, 2)  # the number of the step that failed: it observes the next hook too
    return str(told.value), failed, getattr(told.value.__cause__, "__notes__", [])


def test_an_observer_that_raises_ends_its_step_on_all_ranks(ranks):
    for when in ("before", "after"):
        for rank, (text, steps, notes) in enumerate(ranks(raising, 2, when)):
            assert f"allreduce (commhub-allreduce 0.1.0), bucket 0, step 1, rank {rank}: " in text
            assert "an observer raised ValueError: planned" in text
            assert ("rank 1 failed" in text) == (rank == 0)
            assert steps == 1
            assert rank == 0 or "in planned" in notes[0]  # where it was raised can still be read


class Nonsense:
    def reduce(self, bucket):
        yield bucket


def blamed():
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, Nonsense(), timeout=20)
    seen, _ = observed(registration)
    with pytest.raises(HookError) as told:
        step(model, 0)
    return str(told.value), seen


def test_a_hook_that_yields_no_collective_is_to_blame_itself(ranks):
    for text, seen in ranks(blamed, 2):
        assert "observer" not in text
        assert seen == []


def looking_at(model, *, fails=False):
    def look(*_):
        if fails:
            raise ValueError(f"planned {model.training}")

    return look


def freed(sort):
    if sort == "manual":
        model = mlp()
        registration = commhub.manual(model, "allreduce")
    else:
        model = DistributedDataParallel(mlp())
        registration = commhub.register(model, "allreduce", timeout=20)
    end = registration.observe(looking_at(model), looking_at(model, fails=sort == "failing"))
    with pytest.raises(HookError) if sort == "failing" else contextlib.nullcontext():
        step(model, 0)
        if sort == "manual":
            registration.average()
    gone = weakref.ref(model.module if sort != "manual" else model)
    del model, registration
    for _ in range(3):
        gc.collect()
    end()
    return gone() is None


def all_freed():
    return {sort: freed(sort) for sort in ("ddp", "manual", "failing")}


def test_an_observer_that_refers_to_the_model_does_not_keep_it_alive(ranks):
    assert ranks(all_freed, 2) == [{"ddp": True, "manual": True, "failing": True}] * 2


def refused():
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    registration = commhub.register(model, "allreduce")
    told = []
    for wrong in ((3,), (print, "after")):
        with pytest.raises(RegistrationError, match="give functions") as error:
            registration.observe(*wrong)
        told.append(str(error.value))
    del model
    gc.collect()
    with pytest.raises(RegistrationError, match="is gone"):
        registration.observe(print)
    registration.close()
    return told


def test_what_cannot_observe_and_what_has_nothing_to_observe_is_refused_at_once(ranks):
    assert len(set(ranks(refused, 1)[0])) == 2
