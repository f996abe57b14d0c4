"""post_local_sgd on real ranks: compared with the same training of all ranks in one process."""

import copy
import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commhub_post_local_sgd import PostLocalSGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, assert_equal_across_ranks, batches, bitwise_equal, mlp, train

WIDTH, LR = 8, 0.1
DEEP = [WIDTH] * 13  # twelve layers
ONE, MANY = 25, 1 / 4096  # bucket_cap_mb: one bucket; one for each layer


def layered(widths=DEEP):
    return mlp(widths)


def registered(hook, hosts=None, module=None, make=None, **ddp):
    """A model, its optimizer and its registration; `hosts` says for each rank on which host it is to be."""
    hosts = range(dist.get_world_size()) if hosts is None else hosts
    model = DistributedDataParallel(layered([WIDTH, 6, 4]) if module is None else module, **ddp)
    optimizer = make(model.parameters()) if make else torch.optim.SGD(model.parameters(), lr=LR)
    with patch.dict(os.environ, COMMHUB_HOST=f"host{hosts[dist.get_rank()]}"):
        return model, optimizer, commhub.register(model, hook, optimizer=optimizer, timeout=30)


def step(model, optimizer, number):
    optimizer.zero_grad()
    model(*batches(WIDTH)(dist.get_rank(), number)).square().mean().backward()
    optimizer.step()


def parameters(model):
    module = getattr(model, "module", model)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(bitwise_equal(a[name], b[name]) for name in a)


def equal_everywhere(tensors):
    try:
        assert_equal_across_ranks(tensors)
    except AssertionError:
        return False
    return True


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], 1e-5, 1e-6) for n in a)


def mean_into(tensors):
    """Put the mean, taken in float64, into each of several equal tensors."""
    mean = torch.stack([t.double() for t in tensors]).mean(0)
    for tensor in tensors:
        tensor.copy_(mean)


def reference(module, hosts, steps, start, due):
    """Per step, {name: tensor} of each rank: post-local SGD of all ranks, one after another, here.

    `due(step)` is the list of groups of ranks that average parameters after a step.
    """
    models = [copy.deepcopy(module) for _ in hosts]
    everyone = range(len(hosts))
    for number in range(steps):
        for rank, model in enumerate(models):
            model.zero_grad()
            model(*batches(WIDTH)(rank, number)).square().mean().backward()
        with torch.no_grad():
            local = [everyone] if number < start else [[r for r in everyone if hosts[r] == h] for h in set(hosts)]
            for ranks in local:
                for p in zip(*(models[r].parameters() for r in ranks), strict=True):
                    mean_into([q.grad for q in p])
            for model in models:
                for p in model.parameters():
                    p -= LR * p.grad
            for ranks in due(number):
                for p in zip(*(models[r].parameters() for r in ranks), strict=True):
                    mean_into([q.data for q in p])
        yield [parameters(model) for model in models]


def every(period, start, p):
    return lambda s: [range(p)] if s >= start and (s - start) % period == 0 else []


class Seen:
    """Which groups of ranks a hook's collectives name, by step. `with` it, the class reports here."""

    def __init__(self):
        self.by_step, whole = {}, PostLocalSGD.reduce

        def reporting(hook, bucket):
            exchange, answer = whole(hook, bucket), None
            while True:
                try:
                    request = exchange.send(answer)
                except StopIteration:
                    return
                ranks = range(bucket.world_size) if request.group is None else request.group.ranks
                self.by_step.setdefault(bucket.step, []).append(list(ranks))
                answer = yield request

        self._patch = patch.object(PostLocalSGD, "reduce", reporting)

    def __enter__(self):
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


START, PERIOD, STEPS = 2, 3, 10


def as_published(hosts, cap, subgroup=None):
    """`hosts` says who averages gradients; with subgroups of a size the ranks are said to be on one host."""
    p, rank = dist.get_world_size(), dist.get_rank()
    hook = f"post_local_sgd(start_step={START}, period={PERIOD}, subgroup={subgroup})"
    mates = [r for r in range(p) if hosts[r] == hosts[rank]]
    h = len(mates)
    with Seen() as seen:
        model, optimizer, registration = registered(hook, [0] * p if subgroup else hosts, layered(), bucket_cap_mb=cap)
        size = sum(q.nbytes for q in model.parameters())
        for number, expected in enumerate(reference(layered(), hosts, STEPS, START, every(PERIOD, START, p))):
            step(model, optimizer, number)
            mine = parameters(model)
            assert close(mine, expected[rank]), number
            averaged = number >= START and (number - START) % PERIOD == 0
            together = number <= START or averaged
            assert equal_everywhere(mine) == (together or len(set(hosts)) == 1), number
            everyone = [None] * p
            dist.all_gather_object(everyone, mine)
            assert all(equal(everyone[mate], mine) for mate in mates), number
            # Bytes: over all ranks before the start, then within the host, and for each average over all.
            local = 2 * (h - 1) / h * size
            over_all = 2 * (p - 1) / p * size
            sent = over_all if number < START else local + over_all * averaged
            assert registration.stats.last.sent_bytes == pytest.approx(sent), number
    assert {len(asked) for number, asked in seen.by_step.items() if number} == ({1} if cap == ONE else {12})
    for number, asked in seen.by_step.items():
        assert all(ranks == (list(range(p)) if number < START else mates) for ranks in asked), number
    assert set(seen.by_step) == set(range(START if len(set(hosts)) == p else STEPS))
    return registration.step


HOSTS = [((0, 1), MANY), ((0, 0, 1, 1), ONE), ((0, 0, 0, 1), MANY)]
if os.environ.get("COMMHUB_EVERY_CHECK"):
    HOSTS = [(hosts, cap) for hosts, _ in HOSTS for cap in (ONE, MANY)]


@pytest.mark.parametrize(("hosts", "cap"), HOSTS, ids=str)
def test_gradients_stay_on_the_host_and_parameters_meet_every_period(ranks, hosts, cap):
    assert ranks(as_published, len(hosts), hosts, cap) == [STEPS] * len(hosts)


def test_gradients_stay_in_subgroups_of_a_given_size(ranks):
    assert ranks(as_published, 4, (0, 0, 1, 1), MANY, 2) == [STEPS] * 4


def test_subgroups_divide_the_ranks_and_all_in_one_save_nothing(caplog):
    gradients = [[torch.tensor([float(rank)])] for rank in range(4)]
    for size, told in ((1, 0), (2, 0), (4, 1)):
        caplog.clear()
        run = commhub.simulate(f"post_local_sgd(start_step=0, subgroup={size})", gradients, hosts=(0, 1, 2, 3))
        assert len([r for r in caplog.records if "all ranks are in one subgroup" in r.getMessage()]) == told
        means = [sum(range(r - r % size, r - r % size + size)) / size for r in range(4)]
        assert [float(mine[0]) for mine in run.gradients] == means
        assert run.sent_bytes == (2 * (size - 1) / size * 4,) * 4
    with pytest.raises(commhub.HookOptionError, match="4 ranks are not made of groups of 3"):
        commhub.simulate("post_local_sgd(subgroup=3)", gradients)


def by_hierarchy():
    """Its warm-up is start_step; the averager decides who meets; without local gradients only it communicates."""
    everyone = range(4)

    def due(number):
        since = number - START
        if since < 0 or since % 2:
            return []
        return [everyone] if since % 4 == 0 else [[0, 1], [2, 3]]

    averager = "hierarchical(periods={2: 2, 4: 4})"
    model, optimizer, registration = registered(
        f"post_local_sgd(averager={averager}, start_step={START}, local_gradients=false)", (0, 0, 1, 1)
    )
    initial = copy.deepcopy(model.module)
    for number, expected in enumerate(reference(initial, (0, 1, 2, 3), 8, START, due)):
        step(model, optimizer, number)
        assert close(parameters(model), expected[dist.get_rank()]), number
        assert equal_everywhere(parameters(model)) == (number <= START or (number - START) % 4 == 0), number
    return str(registration)


def test_another_averager_by_name_decides_who_meets(ranks):
    text = ranks(by_hierarchy, 4)[0]
    assert text == "post_local_sgd(averager=hierarchical(periods={2: 2, 4: 4}), local_gradients=False, start_step=2)"


def test_an_averager_s_warm_up_follows_start_step_unless_it_says_otherwise():
    def steps_due(hook):
        prepared = commhub.simulate(hook, [[torch.zeros(1)]] * 2).hooks[0]
        return [s for s in range(9) if prepared._averager.due(s) is not None]

    assert steps_due("post_local_sgd(averager=periodic(period=3), start_step=2)") == [2, 5, 8]
    assert steps_due("post_local_sgd(averager=periodic(period=3, warmup_steps=4), start_step=2)") == [4, 7]
    assert steps_due("post_local_sgd(averager=periodic(period=3, warmup_steps=0), start_step=2)") == [0, 3, 6]
    assert steps_due("post_local_sgd(start_step=0)") == [0, 8]


WRONG = {
    "post_local_sgd(start_step=-1)": "start_step is -1",
    "post_local_sgd(period=0)": "period is 0",
    "post_local_sgd(subgroup=0)": "subgroup is 0",
    "post_local_sgd(subgroup=2, local_gradients=false)": "subgroup is given beside",
    "post_local_sgd(period=8, averager=periodic(period=2))": "period is given beside",
    "post_local_sgd(buffers=true, averager=periodic(period=2))": "buffers is given beside",
    "post_local_sgd(optimizer_state=true, averager=periodic(period=2))": "optimizer_state is given beside",
    "post_local_sgd(averager=periodic(period=0))": "period is 0",
    "post_local_sgd(averager=periodic(perio=2))": "perio",
    "post_local_sgd(averager=allreduce)": "averages gradients",
}


@pytest.mark.parametrize(("hook", "told"), WRONG.items())
def test_an_option_that_makes_no_sense_is_refused(hook, told):
    with pytest.raises(commhub.HookOptionError, match=told):
        commhub.create(hook)


def test_an_averager_that_nobody_offers_is_not_found():
    with pytest.raises(commhub.UnknownHookError, match="perodic"):
        commhub.create("post_local_sgd(averager=perodic(period=2))")


def at_registration():
    model = DistributedDataParallel(mlp())
    with pytest.raises(commhub.RegistrationError, match="needs optimizer="):
        commhub.register(model, "post_local_sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(commhub.HookMismatchError, match="start_step"):
        commhub.register(model, "post_local_sgd", start_step=dist.get_rank(), optimizer=optimizer)
    hook = PostLocalSGD(period=2)
    commhub.register(model, hook, optimizer=optimizer)
    with pytest.raises(commhub.RegistrationError, match="at work already"):
        commhub.register(DistributedDataParallel(mlp()), hook, optimizer=optimizer)


def test_what_cannot_work_is_said_at_registration_on_all_ranks(ranks):
    ranks(at_registration, 2)


def test_ranks_of_one_host_are_told_that_it_saves_nothing(caplog):
    gradients = [[torch.tensor([float(rank)])] for rank in range(4)]
    for hosts, told in (((0, 0, 0, 0), 1), ((0, 0, 1, 1), 0), ((0, 1, 2, 3), 0)):
        caplog.clear()
        run = commhub.simulate("post_local_sgd(start_step=0)", gradients, hosts=hosts)
        assert len([r for r in caplog.records if "one host" in r.getMessage()]) == told
        groups = [[r for r in range(4) if hosts[r] == host] for host in hosts]
        assert [float(mine[0]) for mine in run.gradients] == [sum(group) / len(group) for group in groups]
        assert run.sent_bytes == tuple(2 * (len(group) - 1) / len(group) * 4 for group in groups)


BOTH = "post_local_sgd(start_step=1, period=2, local_gradients=false)"


def with_scheduler():
    model, optimizer, _ = registered(BOTH, make=lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9))
    plain = copy.deepcopy(model.module)
    mirror = torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.9)
    both = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1) for o in (optimizer, mirror)]
    for number in range(7):
        step(model, optimizer, number)
        mirror.zero_grad()
        plain(*batches(WIDTH)(dist.get_rank(), number)).square().mean().backward()
        if number < 1:
            for p in plain.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        mirror.step()
        if number % 2:
            for p in plain.parameters():
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()
        for scheduler in both:
            scheduler.step()
        assert close(parameters(model), parameters(plain)), number
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR * 1e-3)


def with_closure():
    model, optimizer, _ = registered(BOTH)
    for number in range(6):

        def closure(number=number):
            optimizer.zero_grad()
            loss = model(*batches(WIDTH)(dist.get_rank(), number)).square().mean()
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) > 0
        assert equal_everywhere(parameters(model)) == (number % 2 == 1 or number < 1)


def accumulating():
    """Two backwards to a step; the first communicates nothing and counts for nothing."""
    model, optimizer, registration = registered(BOTH)
    for number in range(6):
        optimizer.zero_grad()
        with model.no_sync():
            model(*batches(WIDTH)(dist.get_rank(), 2 * number)).square().mean().backward()
        model(*batches(WIDTH)(dist.get_rank(), 2 * number + 1)).square().mean().backward()
        optimizer.step()
        assert registration.step == number + 1
        assert equal_everywhere(parameters(model)) == (number % 2 == 1 or number < 1)


def unused_parameters():
    """Rank 1 alone leaves a branch out, also while gradients are its own; parameters are all averaged."""
    rank = dist.get_rank()
    model, optimizer, _ = registered(BOTH, module=Branches(WIDTH), find_unused_parameters=True)
    for number in range(6):
        optimizer.zero_grad()
        output = model(*batches(WIDTH)(rank, number), both=rank != 1 or number == 3)
        output.square().mean().backward()
        if number % 2 == 0 and rank == 1:
            optimizer.zero_grad()  # nothing to step on, and nothing that the average could be made of
        optimizer.step()
        assert equal_everywhere(parameters(model)) == (number % 2 == 1), number


def cleared_before_the_step():
    """PyTorch's averagers fail on parameters without gradients."""
    model, optimizer, _ = registered("post_local_sgd(start_step=0, period=1)")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(float(dist.get_rank()))
    model(*batches(WIDTH)(dist.get_rank(), 0)).sum().backward()
    optimizer.zero_grad()
    assert not equal_everywhere(parameters(model))
    optimizer.step()
    assert equal_everywhere(parameters(model))


def every_way_of_training():
    for way in (with_scheduler, with_closure, accumulating, unused_parameters, cleared_before_the_step):
        way()


@pytest.mark.parametrize("nproc", [2, 4])
def test_schedulers_closures_accumulation_and_unused_parameters(ranks, nproc):
    ranks(every_way_of_training, nproc)


def under_scaler(momentum):
    """An Inf on rank 1 alone, in steps that average and in others; the scaler skips there and nowhere else."""
    hook = "post_local_sgd(start_step=1, period=2, optimizer_state=true)"
    model, optimizer, registration = registered(hook, make=lambda p: torch.optim.SGD(p, lr=LR, momentum=momentum))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rank, skipped = dist.get_rank(), 0
    for number in range(8):
        optimizer.zero_grad()
        loss = model(*batches(WIDTH)(rank, number)).square().mean()
        if rank == 1 and number in (0, 3, 4, 7):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    registration.finish()
    assert equal_everywhere(parameters(model))
    assert all(p.isfinite().all() for p in model.parameters())
    if momentum:
        assert equal_everywhere({str(i): s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())})
    return registration.step, registration.stats.steps, skipped


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loss_scaler_that_skips_on_one_rank_stops_nobody(ranks, nproc, momentum):
    # Step 0 is averaged over all, so that all ranks skip it.
    expected = [(8, 8, 4 if rank == 1 else 1) for rank in range(nproc)]
    assert ranks(under_scaler, nproc, momentum) == expected


HALFWAY, END = 5, 10


def first_half(directory):
    rank = dist.get_rank()
    model, optimizer, registration = registered("post_local_sgd(start_step=2, period=4)", (0, 0, 1, 1), make=adam)
    for number in range(HALFWAY):
        step(model, optimizer, number)
    saved = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved | {"hook": registration.state_dict()}, f"{directory}/rank{rank}.pt")
    for number in range(HALFWAY, END):
        step(model, optimizer, number)
    return parameters(model), registration.step


def second_half(directory):
    model, optimizer, registration = registered("post_local_sgd(start_step=2, period=4)", (0, 0, 1, 1), make=adam)
    saved = torch.load(f"{directory}/rank{dist.get_rank()}.pt", weights_only=True)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    registration.load_state_dict(saved["hook"])
    assert registration.step == HALFWAY
    for number in range(HALFWAY, END):
        step(model, optimizer, number)
    return parameters(model), registration.step


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def test_it_resumes_bit_by_bit_in_new_processes(ranks, tmp_path):
    """Saved between two averages, when the hosts differ."""
    whole = ranks(first_half, 4, str(tmp_path), fresh=True)
    again = ranks(second_half, 4, str(tmp_path), fresh=True)
    for (expected, steps), (found, resumed) in zip(whole, again, strict=True):
        assert equal(found, expected)
        assert steps == resumed == END
    assert equal(whole[0][0], whole[1][0])
    assert not equal(whole[0][0], whole[2][0])


def in_subgroups():
    """Two models of two ranks each: the model's own group averages, never the world."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model, optimizer, registration = registered(BOTH, process_group=groups[rank // 2])
    for number in range(4):
        step(model, optimizer, number)
    assert registration.stats.sent_bytes == pytest.approx(3 * sum(p.nbytes for p in model.parameters()))
    return parameters(model)


def test_a_model_of_a_subgroup_averages_within_it(ranks):
    first, second, third, fourth = ranks(in_subgroups, 4)
    assert equal(first, second)
    assert equal(third, fourth)
    assert not equal(first, third)


def alone():
    model, optimizer, registration = registered("post_local_sgd(start_step=1, period=2)")
    plain = copy.deepcopy(model.module)
    run = train(plain, 4, lr=LR)
    found = train(model, 4, optimizer=optimizer)
    assert equal(found.parameters, run.parameters)
    registration.load_state_dict(registration.state_dict())
    return registration.step, registration.stats.sent_bytes


def test_a_single_rank_just_trains(ranks):
    assert ranks(alone, 1) == [(4, 0.0)]


def in_and_out():
    model, optimizer, registration = registered("allreduce")
    hook = "post_local_sgd(start_step=0, period=4, local_gradients=false)"
    step(model, optimizer, 0)
    registration.swap(hook)
    for number in range(1, 4):
        step(model, optimizer, number)
        assert not equal_everywhere(parameters(model))  # the count goes on: the next average is after step 4
    registration.schedule({6: "allreduce"})
    for number in range(4, 8):
        step(model, optimizer, number)
        assert equal_everywhere(parameters(model)) == (number != 6 - 1 or registration.name == "allreduce")
    assert registration.name == "allreduce"
    registration.schedule({9: hook})
    step(model, optimizer, 8)
    assert registration.name == "post_local_sgd"
    step(model, optimizer, 9)
    assert not equal_everywhere(parameters(model))
    registration.remove()
    assert equal_everywhere(parameters(model))
    step(model, optimizer, 10)
    assert equal_everywhere(parameters(model))


@pytest.mark.parametrize("nproc", [2, 4])
def test_it_takes_turns_with_other_hooks(ranks, nproc):
    ranks(in_and_out, nproc)


def by_hand():
    """On a bare module: gradients in average(), parameters after the optimizer's step."""
    module = layered([WIDTH, 6, 4])
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    registration = commhub.manual(module, BOTH, optimizer=optimizer, timeout=30)
    p, rank = dist.get_world_size(), dist.get_rank()
    for number, expected in enumerate(reference(layered([WIDTH, 6, 4]), range(p), 6, 1, every(2, 1, p))):
        optimizer.zero_grad()
        module(*batches(WIDTH)(rank, number)).square().mean().backward()
        registration.average()
        optimizer.step()
        assert close(parameters(module), expected[rank]), number


def test_a_bare_module_trains_alike(ranks):
    ranks(by_hand, 2)


def uneven_inputs(initial):
    """Each rank has two batches more than the one before it."""
    model, optimizer, registration = registered("post_local_sgd(start_step=1, period=3)", (0, 0, 1, 1))
    for _ in range(2):
        with model.join(divide_by_initial_world_size=initial):
            for number in range(2 + 2 * dist.get_rank()):
                step(model, optimizer, number)
    registration.remove()
    assert equal_everywhere(parameters(model))
    return registration.step


@pytest.mark.parametrize("initial", [True, False])
def test_ranks_may_run_out_of_inputs(ranks, initial):
    assert ranks(uneven_inputs, 4, initial) == [2 * 8] * 4


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.fill_(0.1 * (number + 1))


def with_buffers(buffers):
    hook = f"post_local_sgd(start_step=0, period=1, buffers={buffers})"
    model, optimizer, _ = registered(hook, module=Normed(), broadcast_buffers=False)
    step(model, optimizer, 0)
    assert equal_everywhere({"mean": model.module[1].running_mean}) == buffers


def buffers_and_not():
    with_buffers(True)
    with_buffers(False)


def test_buffers_are_averaged_on_request(ranks):
    ranks(buffers_and_not, 2)
