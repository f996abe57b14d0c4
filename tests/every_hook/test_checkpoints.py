"""What a hook remembers: through a distributed checkpoint, on another number of ranks, and under a loss scaler."""

import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import commhub
from commhub.checkpoint import HookState
from commhub.testing import assert_equal_across_ranks, bitwise_equal

from .matrix import (
    AS_ONE,
    EVERYTHING,
    HOOKS,
    MANY,
    ONE,
    build,
    drawn,
    feeds_back,
    give_all,
    local_state,
    register,
    results,
    spec_of,
    state_of,
)

FORMS = (
    "powersgd(alternating=true, start_step=0, min_compression_rate=0.5)",
    "quantize_per_tensor(bits=4, dense_small=false)",
    "quantize_per_channel(bits=4, dense_small=false, group_size=16)",
)
"""Options with which hooks of the table remember something, or something else."""
ON = (2, 4) if EVERYTHING else (2,)


@pytest.fixture(scope="module")
def remembering():
    """The hooks of which each rank keeps something of its own. Found once, in the parent."""
    gradients = [list(drawn(rank, 0).values()) for rank in range(2)]
    made = {hook: commhub.simulate(hook, gradients).states for hook in (*HOOKS, *FORMS)}
    return tuple(hook for hook, states in made.items() if all(state.export("local") for state in states))


def by_bucket(hook):
    """Whether it keeps something that belongs to a bucket, and starts afresh where buckets change."""
    return spec_of(hook).factory in {spec_of(other).factory for other in AS_ONE}


def build_all(hooks, cap):
    models, registrations = zip(*(build(hook, cap) for hook in hooks), strict=True)
    return models, dict(zip(hooks, registrations, strict=True))


def steps(models, hooks, numbers):
    """Per step, {hook: {name: gradient}}, which all ranks have alike."""
    taken = []
    for number in numbers:
        found = dict(zip(hooks, give_all(models, drawn(dist.get_rank(), number)), strict=True))
        for hook, gradients in found.items():
            assert_equal_across_ranks({f"{hook}, step {number}: {name}": g for name, g in gradients.items()})
            assert all(gradient.isfinite().all() for gradient in gradients.values()), hook
        taken.append(found)
    return taken


def states_of(registrations):
    return {hook: registration.state_dict() for hook, registration in registrations.items()}


def tensors_of(registrations):
    return {hook: state_of(registration) for hook, registration in registrations.items()}


def assert_same(found, expected, where):
    assert found.keys() == expected.keys(), where
    for key, tensor in expected.items():
        assert bitwise_equal(found[key], tensor), f"{where}: {key}"


def test_hooks_that_remember_are_found(remembering):
    assert set(FORMS) < set(remembering)
    assert {hook for hook in HOOKS if feeds_back(hook)} < set(remembering)


# A distributed checkpoint.


def save(path, hooks, cap):
    models, registrations = build_all(hooks, cap)
    steps(models, hooks, range(4))
    stateful = {hook: HookState(registration) for hook, registration in registrations.items()}
    dcp.save(stateful, checkpoint_id=path)
    return tensors_of(registrations), steps(models, hooks, range(4, 6))


def load(path, hooks, cap):
    models, registrations = build_all(hooks, cap)
    stateful = {hook: HookState(registration) for hook, registration in registrations.items()}
    dcp.load(stateful, checkpoint_id=path)
    assert all(registration.step == 4 for registration in registrations.values())
    for hook, state in states_of(registrations).items():
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
        assert plain(state), hook
    return tensors_of(registrations), steps(models, hooks, range(4, 6))


def plain(state):
    if type(state) is dict:
        return all(type(key) is str and plain(value) for key, value in state.items())
    return type(state) in (torch.Tensor, int, str)


@pytest.mark.parametrize("nproc", ON)
def test_a_distributed_checkpoint_goes_on_in_new_processes_with_other_buckets(ranks, remembering, tmp_path, nproc):
    saved = ranks(save, nproc, str(tmp_path), remembering, MANY, fresh=True)
    loaded = ranks(load, nproc, str(tmp_path), remembering, ONE, fresh=True)
    for (before, went_on), (after, resumed) in zip(saved, loaded, strict=True):
        for hook in remembering:
            assert any(t.any() for key, t in before[hook].items() if key.startswith("local")), hook
            assert_same(after[hook], before[hook], hook)
            # More than two summands are added in another order where other buckets hold them.
            if nproc == 2 and not by_bucket(hook):
                for number, (whole, half) in enumerate(zip(went_on, resumed, strict=True)):
                    assert_same(half[hook], whole[hook], f"{hook}, step {number} after loading")


# Another number of ranks.


def first_world(hooks, cap):
    models, registrations = build_all(hooks, cap)
    steps(models, hooks, range(4))
    return states_of(registrations)


def next_world(hooks, cap, former):
    """What is there after loading all former ranks' states, and after two steps more."""
    models, registrations = build_all(hooks, cap)
    for hook, registration in registrations.items():
        states = [state[hook] for state in former]
        before = state_of(registration)
        with pytest.raises(ValueError, match=f"all {len(states)} former ranks"):
            registration.load_state_dict(states[dist.get_rank() % len(states)])
        assert registration.step == 0
        assert_same(state_of(registration), before, hook)
        registration.load_state_dict(states)
        assert registration.step == states[0]["step"]
    loaded, step = states_of(registrations), former[0][hooks[0]]["step"]
    steps(models, hooks, range(step, step + 2))
    return loaded, states_of(registrations)


def mean_of_locals(states):
    tables = [table for state in states for table in state["local"].values()]
    assert len(tables) == len(states) == states[0]["world_size"]
    return {
        f"{key} of {name}": sum(table[name][key].double() for table in tables) / len(tables)
        for name, kept in tables[0].items()
        for key in kept
    }


def test_another_number_of_ranks_keeps_the_mean_of_the_residuals_and_one_state_alone_is_refused(ranks, remembering):
    two = ranks(first_world, 2, remembering, MANY)
    four, four_later = zip(*ranks(next_world, 4, remembering, ONE, two), strict=True)
    three, _ = zip(*ranks(next_world, 3, remembering, MANY, four_later), strict=True)
    for before, after in ((two, four), (four_later, three)):
        for hook in remembering:
            old, new = [state[hook] for state in before], [state[hook] for state in after]
            expected, found = mean_of_locals(old), mean_of_locals(new)
            assert found.keys() == expected.keys()
            assert any(value.any() for value in expected.values()), hook
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{hook}: {key}")
            for state in new:
                for name, table in old[0]["shared"].items():
                    assert_same(state["shared"][name], table, f"{hook}: {name}")


# A loss scaler.

SPOILT = 3


class Scaled:
    """A model whose loss a scaler of its own scales, beside one without, whose optimizer steps alike."""

    def __init__(self, hook, cap):
        self.plain, self.reference = build(hook, cap, find_unused_parameters=True)
        self.model, _ = build(None, cap, find_unused_parameters=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.registration = register(self.model, hook, scaler=self.scaler, timeout=30)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.optimizer.zero_grad()

    def loss(self, gradients, without):
        self.plain.zero_grad()
        self.optimizer.zero_grad()
        return self.scaler.scale(self.model(gradients)) + self.plain(without)

    def step(self):
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def scaled(hooks, caps, count):
    """All of them in one backward per step. In some steps each rank lacks a parameter; in one, one brings an Inf."""
    rank = dist.get_rank()
    every = {f"{hook}, bucket_cap_mb {cap}": Scaled(hook, cap) for hook in hooks for cap in caps}
    for number in range(count):
        spoilt = number == SPOILT
        gradients = drawn(rank, number)
        if number % 2:
            del gradients["wide" if rank % 2 else "square"]
        without = dict(gradients)
        if spoilt:  # no bucket of the model without a scaler is to learn from this step
            without = {name: torch.full_like(gradient, torch.inf) for name, gradient in gradients.items()}
        if spoilt and rank == 1:
            gradients["tall"][2, 3] = torch.inf
        before = {where: (state_of(one.registration), parameters(one)) for where, one in every.items()}
        sum(one.loss(gradients, without) for one in every.values()).backward()
        for where, one in every.items():
            one.step()
            told = f"{where}, step {number}"
            remembered, weights = before[where]
            assert one.scaler.get_scale() == (512.0 if number >= SPOILT else 1024.0), told
            assert_same(state_of(one.registration), state_of(one.reference), told)
            if spoilt:
                assert not results(one.model)["tall"].isfinite().all(), told
                assert_same(state_of(one.registration), remembered, told)
                assert_same(parameters(one), weights, told)
            else:
                assert_same(results(one.model), results(one.plain), told)
                assert any(not bitwise_equal(p, weights[name]) for name, p in parameters(one).items()), told
                kept = [t for table in local_state(one.registration).values() for t in table.values()]
                assert any(t.any() for t in kept), told
                moved = [key for key, t in state_of(one.registration).items() if not bitwise_equal(t, remembered[key])]
                assert any(key.startswith("local") for key in moved), told


def parameters(one):
    return {name: p.detach().clone() for name, p in one.model.module.named_parameters()}


@pytest.mark.parametrize("nproc", ON)
def test_residuals_are_kept_unscaled_and_a_step_that_the_scaler_skips_changes_nothing(ranks, remembering, nproc):
    """A scale that is a power of two changes no digit."""
    ranks(scaled, nproc, remembering, (ONE, MANY), SPOILT + 3, timeout=120)
