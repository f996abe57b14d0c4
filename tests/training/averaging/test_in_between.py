"""Averages that are due while parameters are not where training has them: moved, swapped, or their step not taken."""

import copy
import functools
import logging
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import commhub
from commhub.testing import assert_equal_across_ranks, batches, mlp

LR, RHO = 0.1, 0.5


def wrapped(hook, *, given=True, timeout=10, make=torch.optim.SGD, **ddp):
    model = DistributedDataParallel(mlp(), **ddp)
    optimizer = make(model.parameters(), lr=LR)
    more = {"optimizer": optimizer} if given else {}
    return model, optimizer, commhub.register(model, hook, timeout=timeout, **more)


def loss_of(module, rank, number):
    (batch,) = batches(8)(rank, number)
    return module(batch.to(next(module.parameters()).dtype)).square().mean()


def backward(model, number):
    loss = loss_of(model, dist.get_rank(), number)
    loss.backward()
    return loss


def step(model, optimizer, number):
    optimizer.zero_grad()
    backward(model, number)
    optimizer.step()


def are_equal(model):
    try:
        assert_equal_across_ranks({name: p.detach() for name, p in model.named_parameters()})
    except AssertionError:
        return False
    return True


class Everyone:
    """All ranks' models, trained here in float64, with averages written out."""

    def __init__(self):
        self.models = [mlp().double() for _ in range(dist.get_world_size())]

    def gradients(self, rank, number, *, keep=False):
        if not keep:
            self.models[rank].zero_grad()
        loss_of(self.models[rank], rank, number).backward()
        return [p.grad.clone() for p in self.models[rank].parameters()]

    @torch.no_grad()
    def move(self, rank, by, scale):
        for p, d in zip(self.models[rank].parameters(), by, strict=True):
            p.add_(d, alpha=scale)

    def step(self, number, skip=()):
        for rank in range(len(self.models)):
            gradients = self.gradients(rank, number)
            self.move(rank, gradients, 0.0 if rank in skip else -LR)

    @torch.no_grad()
    def average(self):
        for same in zip(*(model.parameters() for model in self.models), strict=True):
            mean = torch.stack([p.detach() for p in same]).mean(0)
            for p in same:
                p.copy_(mean)

    def assert_like(self, model):
        mine = self.models[dist.get_rank()]
        for (name, p), q in zip(model.module.named_parameters(), mine.parameters(), strict=True):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6, msg=name)


# Parameters that are moved between two backward passes, and put back.


def moved(p, way, by):
    """Move a parameter, each way as implementations of sharpness-aware minimisation do; return how to put it back."""
    kept = p.data
    if way == "in place":
        p.add_(by)
        return lambda: p.sub_(by)
    if way == "through data":
        p.data.add_(by)
        return lambda: p.data.sub_(by)
    p.data = kept + by
    return lambda: setattr(p, "data", kept)


def sharpness_aware(model, optimizer, way, number):
    backward(model, number)
    with torch.no_grad():
        scale = RHO / torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        back = [moved(p, way, p.grad * scale) for p in model.parameters()]
    optimizer.zero_grad()
    backward(model, number)
    with torch.no_grad():
        for put in back:
            put()
    optimizer.step()
    optimizer.zero_grad()


def sharpness_aware_everywhere(everyone, number):
    for rank in range(len(everyone.models)):
        gradients = everyone.gradients(rank, number)
        scale = RHO / float(torch.stack([g.norm() for g in gradients]).norm())
        everyone.move(rank, gradients, scale)
        second = everyone.gradients(rank, number)
        everyone.move(rank, gradients, -scale)
        everyone.move(rank, second, -LR)


def sharpened(cases):
    for hook, period, first, way in cases:
        model, optimizer, registration = wrapped(hook)
        everyone = Everyone()
        for number in range(9):
            sharpness_aware(model, optimizer, way, number)
            sharpness_aware_everywhere(everyone, number)
            if any(step >= first and (step - first) % period == 0 for step in (2 * number, 2 * number + 1)):
                everyone.average()
                assert are_equal(model), (hook, way, number)
            everyone.assert_like(model)
        assert registration.step == 18


WAYS = ("in place", "through data", "in its stead")
SHARP = [
    *(("periodic(period=2)", 2, 0, way) for way in WAYS),
    *(("periodic(period=2, warmup_steps=1)", 2, 1, way) for way in WAYS),
    *(("periodic(period=8)", 8, 0, way) for way in WAYS[:2]),
    ("periodic(period=1)", 1, 0, "through data"),
    ("post_local_sgd(start_step=0, period=2, local_gradients=false)", 2, 0, "through data"),
]


def test_sharpness_aware_minimisation_averages_where_parameters_are_in_place(ranks):
    ranks(sharpened, 2, SHARP)


def sharp_pairs():
    """A pair is due after each second backward, before the average of all that the first made due has run."""
    model, optimizer, _ = wrapped("hierarchical(periods={1: 2, 2: 4})")
    for number in range(3):
        sharpness_aware(model, optimizer, "in place", number)
        assert are_equal(model)


def test_an_average_of_fewer_ranks_does_not_take_the_place_of_one_of_all(ranks):
    ranks(sharp_pairs, 4)


def accumulated_on_moved_parameters():
    """Two backward passes at each place, all synchronised: what falls due at the moved one waits for the step."""
    model, optimizer, _ = wrapped("periodic(period=4, warmup_steps=2)")
    everyone = Everyone()
    for number in range(4):
        backward(model, number)
        backward(model, number)
        with torch.no_grad():
            by = [p.grad.clone() for p in model.parameters()]
            for p, d in zip(model.parameters(), by, strict=True):
                p.add_(d)
        optimizer.zero_grad()
        backward(model, number)
        backward(model, number)
        with torch.no_grad():
            for p, d in zip(model.parameters(), by, strict=True):
                p.sub_(d)
        optimizer.step()
        optimizer.zero_grad()
        for rank in range(2):
            first = everyone.gradients(rank, number)
            everyone.move(rank, first, 2.0)
            second = everyone.gradients(rank, number)
            everyone.move(rank, first, -2.0)
            everyone.move(rank, second, -2 * LR)
        everyone.average()
        everyone.assert_like(model)
        assert are_equal(model)


def test_backward_passes_on_moved_parameters_average_nothing_in_between(ranks):
    ranks(accumulated_on_moved_parameters, 2)


# Evaluations.


def evaluated_with_others():
    """Other weights are in place during an evaluation, with what is due still to run: after a step left out, or at the
    next training forward."""
    for given in (True, False):
        model, optimizer, _ = wrapped("periodic(period=2)", given=given)
        everyone = Everyone()
        other = [torch.full_like(p, 3.0) for p in model.parameters()]
        for number in range(6):
            optimizer.zero_grad()
            backward(model, number)
            skipped = given and number % 2 == 0
            if not skipped:
                optimizer.step()
            everyone.step(number, skip=(0, 1) if skipped else ())
            kept = [p.detach().clone() for p in model.parameters()]
            for way in (torch.no_grad, torch.enable_grad):
                swap_data(model, other)
                model.eval()
                with way():
                    model(torch.ones(1, 8))
                swap_data(model, kept)
                model.train()
            assert not are_equal(model) or number == 0
            with torch.no_grad():
                model(torch.ones(1, 8))  # no training forward either
            everyone.assert_like(model)
            model(torch.ones(1, 8))
            if number % 2 == 0:
                everyone.average()
                assert are_equal(model)
            everyone.assert_like(model)


def swap_data(model, values):
    for p, value in zip(model.parameters(), values, strict=True):
        p.data.copy_(value)


def test_weights_that_are_swapped_in_for_an_evaluation_are_not_averaged(ranks):
    ranks(evaluated_with_others, 2)


def evaluated_alone():
    for given in (True, False):
        model, optimizer, registration = wrapped("periodic(period=1)", given=given, timeout=5)
        for number in range(3):
            optimizer.zero_grad()
            backward(model, number)
            if not given:
                optimizer.step()
            if dist.get_rank() == 0:
                with torch.no_grad():
                    model(torch.ones(1, 8))
                model.eval()
                with torch.enable_grad() if number > 1 else torch.no_grad():  # DDP itself meets in the second
                    model(torch.ones(1, 8))
                model.train()
            dist.barrier()
        registration.finish()
        assert are_equal(model)
        assert registration.step == 3


def test_rank_0_may_evaluate_alone_while_an_average_is_due(ranks):
    ranks(evaluated_alone, 2, timeout=30)


def mode_of_the_bare_module():
    """Only the bare module was put back in train mode: that is the mode which computes."""
    model, optimizer, _ = wrapped("periodic(period=1)", given=False)
    for number in range(2):
        model.eval()
        model.module.train()
        step(model, optimizer, number)
        assert not are_equal(model)
        model.train()
        model.module.eval()
        model(torch.ones(1, 8))
        assert not are_equal(model)
        model.eval()
        model.module.train()
        model(torch.ones(1, 8))
        assert are_equal(model)


def test_the_bare_module_says_whether_a_forward_is_training_s(ranks):
    ranks(mode_of_the_bare_module, 2)


# Steps that are left out, and gradients that are accumulated.


def infinite_on_one():
    """A scaler that commhub was not told of skips rank 1's step alone."""
    for period in (1, 2):
        model, optimizer, registration = wrapped(f"periodic(period={period})")
        everyone = Everyone()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in range(8):
            skips = number in (0, 3, 4, 6)
            optimizer.zero_grad()
            scale = float("inf") if skips and dist.get_rank() == 1 else 1.0
            loss = loss_of(model, dist.get_rank(), number)
            everyone.assert_like(model)  # once the forward has settled what was due
            scaler.scale(loss * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            everyone.step(number, skip=(1,) if skips else ())
            if number % period == 0:
                everyone.average()
        registration.finish()
        everyone.assert_like(model)
        assert registration.step == 8


def test_an_inf_on_one_rank_leaves_numbers_and_counters_as_if_it_had_stepped_by_nothing(ranks):
    ranks(infinite_on_one, 2)


def accumulating(synchronised):
    """Without no_sync, what is due after the first of two backward passes runs before the second's forward."""
    model, optimizer, registration = wrapped("periodic(period=2)")
    everyone = Everyone()
    for number in range(6):
        for part in range(2):
            with torch.enable_grad() if synchronised or part else model.no_sync():
                backward(model, 2 * number + part)
            for rank in range(2):
                everyone.gradients(rank, 2 * number + part, keep=part)
            if synchronised and part == 0:
                everyone.average()
        optimizer.step()
        optimizer.zero_grad()
        for rank in range(2):
            everyone.move(rank, [p.grad for p in everyone.models[rank].parameters()], -LR)
        if not synchronised and number % 2 == 0:
            everyone.average()
            assert are_equal(model)
        everyone.assert_like(model)
    assert registration.step == (12 if synchronised else 6)


@pytest.mark.parametrize("synchronised", [False, True])
def test_accumulated_gradients_are_averaged_where_their_parameters_are(ranks, synchronised):
    ranks(accumulating, 2, synchronised)


def one_of_two_steps():
    """The second optimizer steps every other time: what is due runs at the next forward, the first's step included."""
    model = DistributedDataParallel(mlp())
    first, *rest = model.parameters()
    optimizers = [torch.optim.SGD([first], lr=LR), torch.optim.SGD(rest, lr=LR)]
    commhub.register(model, "periodic(period=1)", optimizer=optimizers, timeout=10)
    for number in range(4):
        model.zero_grad()
        backward(model, number)
        optimizers[0].step()
        if number % 2:
            optimizers[1].step()
        else:
            assert not are_equal(model)
            model(torch.ones(1, 8))
        assert are_equal(model)


def test_an_optimizer_that_steps_more_rarely_holds_nothing_up(ranks):
    ranks(one_of_two_steps, 2)


def never_stepped():
    """The optimizer that was given is not the one that steps: it is said, in the log of every rank."""
    model, _, registration = wrapped("periodic(period=4)")
    other = torch.optim.SGD(model.parameters(), lr=LR)
    with Lines() as lines:
        for number in range(66):
            step(model, other, number)
    with pytest.raises(commhub.RegistrationError, match="moved since"):
        registration.state_dict()
    registration.remove()
    assert are_equal(model)
    return len([line for line in lines if "has not run" in line])


class Lines:
    """What the project's logger says within."""

    def __enter__(self):
        lines, self.logger = [], logging.getLogger("commhub")
        self.handler = logging.Handler()
        self.handler.emit = lambda record: lines.append(record.getMessage())
        self.logger.addHandler(self.handler)
        return lines

    def __exit__(self, *_):
        self.logger.removeHandler(self.handler)


def test_an_average_that_waits_for_ever_is_told_of_once(ranks):
    assert ranks(never_stepped, 2) == [1, 1]


def saved_meanwhile():
    """State is not saved while an average is due and parameters are moved; once they are back, it is."""
    model, optimizer, registration = wrapped("periodic(period=1)")
    step(model, optimizer, 0)
    backward(model, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(1.0)
    for call in (registration.state_dict, registration.finish):
        with pytest.raises(commhub.RegistrationError, match="moved since"):
            call()
    with torch.no_grad():
        for p in model.parameters():
            p.data.sub_(1.0)
    optimizer.step()
    assert registration.state_dict()["step"] == 2
    assert are_equal(model)


def test_saving_averages_no_moved_parameters(ranks):
    ranks(saved_meanwhile, 2)


def loaded_meanwhile():
    """What is due when a state is loaded is an average of what was; weights that were loaded before stay."""
    model, optimizer, registration = wrapped("periodic(period=1)", given=False)
    saved = registration.state_dict()
    step(model, optimizer, 0)
    mine = {name: torch.full_like(p, 1.0 + dist.get_rank()) for name, p in model.module.state_dict().items()}
    model.module.load_state_dict(mine)
    registration.load_state_dict(saved)
    assert all((p == 1.0 + dist.get_rank()).all() for p in model.parameters())
    model(torch.ones(1, 8))
    assert all((p == 1.0 + dist.get_rank()).all() for p in model.parameters())


def test_an_average_that_is_due_when_state_is_loaded_changes_no_loaded_weights(ranks):
    ranks(loaded_meanwhile, 2)


def told():
    """Which lines a registration logs about parameters that move."""
    found = []
    for given, hook in ((True, "periodic"), (False, "periodic"), (False, "allreduce")):
        with Lines() as lines:
            _, _, registration = wrapped(hook, given=given)
            registration.swap(hook)
        found.append(len([line for line in lines if "optimizer=" in line]))
    with Lines() as lines:
        commhub.manual(mlp(), "periodic", timeout=10)
    return [*found, len([line for line in lines if "optimizer=" in line])]


def test_registering_without_an_optimizer_says_once_that_moving_parameters_need_it(ranks):
    assert ranks(told, 2) == [[0, 1, 0, 0], [0, 0, 0, 0]]


# Closures, and users' hooks that raise.


def closed(module, optimizer, number):
    optimizer.zero_grad()
    return backward(module, number)


def in_closures(make, passes):
    """A closure's forward passes average nothing, though the step before has an average due and parameters moved."""
    plain = mlp()
    model, optimizer, registration = wrapped("periodic(period=1)", make=make)
    for number in range(3):
        swap_data(plain, [p.detach() for p in model.parameters()])
        mirror = make(plain.parameters(), lr=LR)
        mirror.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        mirror.step(functools.partial(closed, plain, mirror, number))
        assert optimizer.step(closure=functools.partial(closed, model, optimizer, number)) > 0
        assert are_equal(model)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            total = q.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(p.detach(), total / dist.get_world_size())
        assert registration.step == passes * (number + 1)


def with_closures():
    in_closures(torch.optim.SGD, 1)
    exact = {"max_iter": 3, "max_eval": 3, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    in_closures(functools.partial(torch.optim.LBFGS, **exact), 3)


def test_averages_wait_for_the_end_of_a_step_that_evaluates_a_closure(ranks):
    ranks(with_closures, 2)


class HalfWay(torch.optim.SGD):
    """A step that can be made to end in an exception after the first parameter."""

    breaks = False

    def step(self, closure=None):
        if self.breaks:
            with torch.no_grad():
                first = self.param_groups[0]["params"][0]
                first.add_(first.grad, alpha=-LR)
            raise Oops
        return super().step(closure)


class Oops(Exception):
    pass


def raising(*_):
    raise Oops


def struck(hook, where):
    """A user's hook raises on rank 1, in a step after which an average is due; the user goes on."""
    model, optimizer, registration = wrapped(hook, make=HalfWay, timeout=8)
    began = time.monotonic()
    for number in range(4):
        strikes = number == 1 and dist.get_rank() == 1
        handle = None
        if strikes and where == "half way":
            optimizer.breaks = True
        elif strikes:
            register = {
                "before": optimizer.register_step_pre_hook,
                "after": optimizer.register_step_post_hook,
                "before all": register_optimizer_step_pre_hook,
                "after all": register_optimizer_step_post_hook,
            }[where]
            handle = register(raising)
        try:
            optimizer.zero_grad()
            backward(model, number)
            optimizer.step()
            assert not strikes
        except Oops:
            assert strikes
        finally:
            optimizer.breaks = False
            if handle is not None:
                handle.remove()
    registration.finish()
    assert are_equal(model)
    assert time.monotonic() - began < 4
    return registration.step


STRUCK = ("after", "after all", "before", "before all", "half way")


def struck_in_turn(hook):
    return [struck(hook, where) for where in STRUCK]


@pytest.mark.parametrize(
    "hook", ["periodic(period=1)", "post_local_sgd(start_step=0, period=1, local_gradients=false)"]
)
def test_a_user_s_hook_that_raises_loses_no_average(ranks, hook):
    assert ranks(struck_in_turn, 2, hook) == [[4] * len(STRUCK)] * 2


def right_after():
    """The average comes before users' hooks after the step, whenever those were registered."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen = []

    def look(*_):
        seen.append(are_equal(model))

    handles = [optimizer.register_step_post_hook(look)]
    commhub.register(model, "periodic(period=1)", optimizer=optimizer, timeout=10)
    handles.append(optimizer.register_step_post_hook(look))
    step(model, optimizer, 0)
    for handle in handles:
        handle.remove()
    assert seen == [True, True]


def test_an_average_runs_before_the_user_s_hooks(ranks):
    ranks(right_after, 2)


def tried_again():
    """The step that did not happen is taken again at once: its average follows it, with the right numbers."""
    model, optimizer, _ = wrapped("periodic(period=1)")
    everyone = Everyone()
    for number in range(3):
        optimizer.zero_grad()
        backward(model, number)
        if dist.get_rank() == 1:
            handle = optimizer.register_step_pre_hook(raising)
            with pytest.raises(Oops):
                optimizer.step()
            handle.remove()
        optimizer.step()
        everyone.step(number)
        everyone.average()
        everyone.assert_like(model)
        assert are_equal(model)


def test_a_step_taken_again_after_a_hook_raised_is_averaged(ranks):
    ranks(tried_again, 2)


def scheduled_between():
    """A swap that falls due between the two backward passes of a step waits for that step, as the average does."""
    model, optimizer, registration = wrapped("periodic(period=100, warmup_steps=99)")
    everyone = Everyone()
    registration.schedule({3: "allreduce"})
    for number in range(2):
        sharpness_aware(model, optimizer, "through data", number)
        sharpness_aware_everywhere(everyone, number)
    everyone.average()
    everyone.assert_like(model)
    assert registration.name == "allreduce"


def test_a_scheduled_swap_leaves_moved_parameters_alone(ranks):
    ranks(scheduled_between, 2)


def called_at_once():
    """Rank 1 leaves its step out, and calls what needs all ranks while rank 0 waits in the average for it."""
    for call in ("schedule", "swap", "remove", "register"):
        model, optimizer, registration = wrapped("periodic(period=1)", timeout=5)
        for number in range(2):
            optimizer.zero_grad()
            backward(model, number)
            if dist.get_rank() == 0 or number == 0:
                optimizer.step()
        if call == "schedule":
            registration.schedule({100: "allreduce"})
        elif call == "swap":
            registration.swap("allreduce")
        elif call == "remove":
            registration.remove()
        else:
            commhub.register(model, "allreduce", timeout=5)
        assert are_equal(model)


def test_what_needs_all_ranks_runs_first_what_the_others_wait_for(ranks):
    ranks(called_at_once, 2)
