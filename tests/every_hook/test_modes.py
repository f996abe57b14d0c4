"""What DDP can be asked for: unused parameters, accumulation without synchronisation, uneven inputs."""

import itertools

import torch
import torch.distributed as dist

from commhub.testing import assert_equal_across_ranks, bitwise_equal

from .matrix import AS_ONE, BUCKETS, agrees, assert_mean, build, drawn, feeds_back, give, local_state, on_ranks, results

LEFT_OUT = ("tall", "vector")


def unused(hook):
    """In turn everybody uses everything, only the first rank does, nobody uses what is left out."""
    rank = dist.get_rank()
    for buckets, cap in BUCKETS.items():
        model, registration = build(hook, cap, find_unused_parameters=True)
        for step in range(6):
            users = (range(dist.get_world_size()), (0,), ())[step % 3]
            where = f"{hook}, {buckets}, step {step}, used by {list(users)}"
            gradients = drawn(rank, step)
            given = {name: g for name, g in gradients.items() if name not in LEFT_OUT or rank in users}
            before = local_state(registration)
            found = give(model, given)
            own = {name: given.get(name, torch.zeros_like(g)) for name, g in gradients.items()}
            if not users:
                assert not any(name in found for name in LEFT_OUT), f"{where}: nobody used it, and it has a gradient"
                own = given
            assert found.keys() == own.keys(), where
            if agrees(hook):
                assert_mean(hook, registration, found, own, where)
                assert_equal_across_ranks({f"{where}: {name}": g for name, g in found.items()})
            else:
                assert all(bitwise_equal(found[name], g) for name, g in own.items()), where
            for name, table in local_state(registration).items():
                waits = name.removeprefix("weights.") not in given
                if waits and users and hook in AS_ONE:
                    continue  # it contributes to what is approximated as one, and keeps account of that
                for key, tensor in table.items():
                    same = bitwise_equal(tensor, before[name][key])
                    assert same or not waits, f"{where}: {key} of {name} moved"
                    assert not same or waits or not tensor.any(), f"{where}: {key} of {name} stood still"


@on_ranks()
def test_a_parameter_unused_by_some_ranks_or_all_is_averaged_and_its_residual_waits(ranks, hook, nproc):
    ranks(unused, nproc, hook)


def accumulated(hook):
    rank = dist.get_rank()
    for buckets, cap in BUCKETS.items():
        (model, registration), (twin, _) = build(hook, cap), build(hook, cap)
        for step in range(3):
            parts = [drawn(rank, 10 * step + part) for part in range(3)]
            model.zero_grad()
            with model.no_sync():
                model(parts[0]).backward()
                model(parts[1]).backward()
                assert bitwise_equal(results(model)["tall"], parts[0]["tall"] + parts[1]["tall"])
            model(parts[2]).backward()
            whole = give(twin, {name: parts[0][name] + parts[1][name] + parts[2][name] for name in parts[0]})
            for name, found in results(model).items():
                assert bitwise_equal(found, whole[name]), f"{hook}, {buckets}, step {step}: {name}"
            assert registration.step == registration.stats.steps == step + 1, f"{hook}, {buckets}"


@on_ranks()
def test_gradients_accumulated_under_no_sync_are_averaged_once_as_if_they_came_at_once(ranks, hook, nproc):
    ranks(accumulated, nproc, hook)


def joined(hook):
    """Each rank has one batch more than the one before it. What each had of every step is compared afterwards."""
    rank, p = dist.get_rank(), dist.get_world_size()
    for (buckets, cap), initial in itertools.product(BUCKETS.items(), (True, False)):
        model, registration = build(hook, cap)
        seen, kept = [], None
        with model.join(divide_by_initial_world_size=initial):
            for step in range(2 + rank):
                seen.append(give(model, drawn(rank, step)))
            kept = local_state(registration)
        where = f"{hook}, {buckets}, divided by {'all' if initial else 'the active'}"
        assert registration.step == p + 1, where
        for name, table in local_state(registration).items():
            assert all(bitwise_equal(t, kept[name][key]) for key, t in table.items()), f"{where}: {name} moved"
        if not agrees(hook):
            continue
        everyone = [None] * p
        dist.all_gather_object(everyone, seen)
        for step in range(p + 1):
            active = [r for r in range(p) if step < 2 + r]
            found = everyone[active[0]][step]
            for other in active:
                for name, g in everyone[other][step].items():
                    assert bitwise_equal(g, found[name]), f"{where}, step {step}: {name} on rank {other}"
            own = {name: g if rank in active else torch.zeros_like(g) for name, g in drawn(rank, step).items()}
            divisor = p if initial else len(active)
            assert_mean(hook, registration, found, own, f"{where}, step {step}", divisor)


@on_ranks()
def test_ranks_with_uneven_inputs_join_and_the_others_go_on(ranks, hook, nproc):
    ranks(joined, nproc, hook)


def test_some_hook_feeds_back_so_that_waiting_residuals_are_seen():
    from .matrix import HOOKS

    assert any(feeds_back(hook) for hook in HOOKS)
