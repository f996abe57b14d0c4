"""An averager at work on real ranks: when it runs, what it averages, and what it leaves alone."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, EveryKind, batches, bitwise_equal, mlp, train


class Now:
    """Averages every `period` steps, among all ranks or this rank's half of them."""

    def __init__(self, period=1, *, halves=False, **asks):
        self.period, self.halves, self.seen = period, halves, []
        for name, value in asks.items():
            setattr(self, name, value)

    def prepare(self, setup):
        half = setup.world_size // 2
        groups = [range(half), range(half, setup.world_size)] if self.halves else [range(setup.world_size)]
        self.group = setup.partition(groups)

    def due(self, step):
        return self.group if (step + 1) % self.period == 0 else None

    def reduce(self, bucket):
        self.seen.append((bucket.step, bucket.names, bucket.world_size, bucket.flat.dtype))
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def parameters(model):
    module = getattr(model, "module", model)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def average(tensors, ranks=None):
    """The mean over ranks in float64, in the tensors' dtypes. Collective."""
    found = {}
    for name, tensor in tensors.items():
        wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).contiguous()
        every = [torch.empty_like(wide) for _ in range(dist.get_world_size())]
        dist.all_gather(every, wide)
        chosen = every if ranks is None else [every[rank] for rank in ranks]
        found[name] = (sum(chosen) / len(chosen)).to(tensor.dtype)
    return found


def close(a, b, tolerance=2e-6):
    return a.keys() == b.keys() and all(
        torch.allclose(a[n].to(torch.complex128), b[n].to(torch.complex128), tolerance, tolerance) for n in a
    )


def equal(a, b):
    return a.keys() == b.keys() and all(bitwise_equal(a[name], b[name]) for name in a)


def equal_everywhere(tensors):
    return all(len({bytes(b) for b in gathered(t)}) == 1 for t in tensors.values())


def gathered(tensor):
    flat = tensor.detach().contiguous().view(-1)
    flat = (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return [e.tolist() for e in every]


def registered(averager, module=None, optimizer=torch.optim.SGD, make=None, **ddp):
    model = DistributedDataParallel(mlp() if module is None else module, **ddp)
    optimizer = make(model) if make else optimizer(model.parameters(), lr=0.1)
    return model, optimizer, commhub.register(model, averager, optimizer=optimizer, timeout=30)


def step(model, optimizer, number, width=8):
    optimizer.zero_grad()
    model(*batches(width)(dist.get_rank(), number)).square().mean().backward()
    optimizer.step()


def on_time(period):
    """Local steps of plain SGD, averaged after the due ones: computed alongside, by hand."""
    model, optimizer, registration = registered(Now(period))
    plain = mlp()
    mirror = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(7):
        step(model, optimizer, number)
        step(plain, mirror, number)
        if (number + 1) % period == 0:
            means = average(parameters(plain))
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    p.copy_(means[name])
            assert equal_everywhere(parameters(model)), number
        assert close(parameters(model), parameters(plain)), number
    assert registration.step == 7
    sent = 2 * (dist.get_world_size() - 1) / dist.get_world_size() * sum(p.nbytes for p in model.parameters())
    assert registration.stats.sent_bytes == pytest.approx(sent * (7 // period))


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("period", [1, 3])
def test_parameters_are_averaged_after_the_optimizers_step_when_due(ranks, nproc, period):
    ranks(on_time, nproc, period)


def in_halves():
    model, optimizer, _ = registered(Now(2, halves=True))
    mine = [0, 1] if dist.get_rank() < 2 else [2, 3]
    for number in range(4):
        step(model, optimizer, number)
    assert close(parameters(model), average(parameters(model), mine))
    assert not equal_everywhere(parameters(model))


def test_a_subgroup_averages_among_itself(ranks):
    ranks(in_halves, 4)


def in_place():
    averager = Now()
    model, optimizer, _ = registered(averager, EveryKind(), lambda p, lr: torch.optim.SGD(p, lr=lr))
    kept = {name: (p, p.data_ptr(), p.stride(), p.dtype, p.view_as(p)) for name, p in model.module.named_parameters()}
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.25 * (dist.get_rank() + number))
    means = average(parameters(model))
    optimizer.zero_grad()
    model(*EveryKind.batch(dist.get_rank(), 0)).backward()
    optimizer.zero_grad()  # nothing to step on: what the step leaves is the average
    optimizer.step()
    assert close(parameters(model), means, 1e-2)
    for name, p in model.module.named_parameters():
        other, pointer, stride, dtype, view = kept[name]
        assert p is other
        assert (p.data_ptr(), p.stride(), p.dtype) == (pointer, stride, dtype)
        assert bitwise_equal(view, p)
    dtypes = {dtype for *_, dtype in averager.seen}
    assert len(averager.seen) == len(dtypes)  # one bucket for each dtype here


def test_every_kind_of_parameter_is_averaged_in_place(ranks):
    ranks(in_place, 2)


def one_has_no_gradient():
    averager = Now()
    model, optimizer, _ = registered(averager, Branches(), find_unused_parameters=True)
    rank = dist.get_rank()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)
    means = average(parameters(model))
    optimizer.zero_grad()
    (model(*batches(8)(rank, 0), both=rank == 0).sum() * 0).backward()
    if rank == 1:
        for p in model.module.unused.parameters():
            p.grad = None
    optimizer.step()
    assert close(parameters(model), means)
    names = [name for name, _ in model.module.named_parameters()]
    assert [n for _, names, *_ in averager.seen for n in names] == names


def test_a_missing_gradient_on_one_rank_mixes_nothing(ranks):
    ranks(one_has_no_gradient, 2)


def small_chunks():
    """Many buckets, four at a time, and a parameter larger than a bucket."""
    import commhub.training.averaging._averaging as module

    module.CHUNK = 600
    averager = Now()
    try:
        model, optimizer, _ = registered(averager, mlp([8, 16, 16, 16, 16, 16, 16, 4]))
        for number in range(3):
            step(model, optimizer, number)
            assert equal_everywhere(parameters(model))
    finally:
        module.CHUNK = 8 * 2**20
    assert len(averager.seen) > 3 * 8


@pytest.mark.parametrize("nproc", [2, 4])
def test_parameters_travel_in_chunks(ranks, nproc):
    ranks(small_chunks, nproc)


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(0.1)


def asks_for_more(buffers, optimizer_state):
    averager = Now(buffers=buffers, optimizer_state=optimizer_state)

    def make(model):
        return torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer, _ = registered(averager, Normed(), make=make, broadcast_buffers=False)
    for number in range(3):
        step(model, optimizer, number)
    running = {"mean": model.module[1].running_mean, "var": model.module[1].running_var}
    momenta = {f"{i}{k}": s[k] for i, s in enumerate(optimizer.state.values()) for k in ("exp_avg", "exp_avg_sq")}
    assert equal_everywhere(parameters(model))
    assert equal_everywhere(running) == buffers
    assert equal_everywhere(momenta) == optimizer_state
    assert int(model.module[1].num_batches_tracked) == 3
    assert all(int(s["step"]) == 3 for s in optimizer.state.values())


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("optimizer_state", [False, True])
def test_buffers_and_optimizer_state_are_averaged_on_request(ranks, buffers, optimizer_state):
    ranks(asks_for_more, 2, buffers, optimizer_state)


def one_never_stepped():
    """A scaler skips one rank's first steps: it has no momentum yet, and the others' is left alone until it has."""
    averager = Now(optimizer_state=True)
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    commhub.register(model, averager, optimizer=optimizer, timeout=30)
    rank = dist.get_rank()
    for number in range(4):
        optimizer.zero_grad()
        model(*batches(8)(rank, number)).square().mean().backward()
        if rank != 1 or number >= 2:
            optimizer.step()
    momenta = {str(i): s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
    assert len(momenta) == len(list(model.parameters()))
    assert equal_everywhere(momenta)
    assert equal_everywhere(parameters(model))


@pytest.mark.parametrize("nproc", [2, 4])
def test_a_rank_whose_optimizer_has_not_stepped_yet_harms_nothing(ranks, nproc):
    ranks(one_never_stepped, nproc)


def skipped(finish):
    """The optimizer's step is left out on rank 1 alone, in every second step."""
    model, optimizer, registration = registered(Now())
    rank = dist.get_rank()
    for number in range(6):
        optimizer.zero_grad()
        model(*batches(8)(rank, number)).square().mean().backward()
        if rank != 1 or number % 2 == 0:
            optimizer.step()
    if finish == "forward":
        model(torch.zeros(1, 8))
    elif finish == "save":
        registration.state_dict()
    else:
        registration.finish()
    assert equal_everywhere(parameters(model))
    registration.finish()
    assert registration.step == 6


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("finish", ["forward", "save", "finish"])
def test_a_step_skipped_on_one_rank_hangs_nobody(ranks, nproc, finish):
    ranks(skipped, nproc, finish)


def under_scaler():
    """A loss scaler meets an Inf on rank 1 alone."""
    model, optimizer, registration = registered(Now(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rank = dist.get_rank()
    for number in range(6):
        optimizer.zero_grad()
        loss = model(*batches(8)(rank, number)).square().mean()
        if rank == 1 and number in (1, 2, 5):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    registration.finish()
    assert equal_everywhere(parameters(model))
    assert all(p.isfinite().all() for p in model.parameters())
    return registration.step


@pytest.mark.parametrize("nproc", [2, 4])
def test_a_loss_scaler_may_skip_on_one_rank(ranks, nproc):
    assert ranks(under_scaler, nproc) == [6] * nproc


def two_optimizers():
    model = DistributedDataParallel(mlp())
    first, *rest = model.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.Adam(rest, lr=0.01)]
    commhub.register(model, Now(), optimizer=optimizers, timeout=30)
    for number in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        optimizers[0].step()
        assert not equal_everywhere(parameters(model))
        optimizers[1].step()
        assert equal_everywhere(parameters(model))


def test_it_waits_for_the_last_of_several_optimizers(ranks):
    ranks(two_optimizers, 2)


def with_closure():
    model, optimizer, _ = registered(Now())
    for number in range(3):

        def closure(number=number):
            optimizer.zero_grad()
            loss = model(*batches(8)(dist.get_rank(), number)).square().mean()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        assert equal_everywhere(parameters(model))


def test_a_closure_is_averaged_after_its_step(ranks):
    ranks(with_closure, 2)


def accumulating():
    averager = Now(2)
    model, optimizer, registration = registered(averager)
    for number in range(8):
        with model.no_sync() if number % 2 == 0 else torch.enable_grad():
            model(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert registration.step == 4
    assert sorted({seen[0] for seen in averager.seen}) == [1, 3]
    assert equal_everywhere(parameters(model))


def test_accumulated_gradients_count_as_one_step(ranks):
    ranks(accumulating, 2)


def without_optimizer():
    model = DistributedDataParallel(mlp())
    commhub.register(model, Now(), timeout=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        step(model, optimizer, number)
        assert not equal_everywhere(parameters(model))
        model(torch.zeros(1, 8))
        assert equal_everywhere(parameters(model))


def test_without_an_optimizer_the_next_training_forward_averages(ranks):
    ranks(without_optimizer, 2)


def leaving(how):
    """What ends an averager's work leaves all ranks with the same parameters, and plain training goes on."""
    model, optimizer, registration = registered(Now(5))
    train(model, 3, optimizer=optimizer)
    assert not equal_everywhere(parameters(model))
    means = average(parameters(model))
    if how == "remove":
        registration.remove()
    elif how == "swap":
        registration.swap("fp16")
    else:
        registration = commhub.register(model, "allreduce")
    assert close(parameters(model), means)
    train(model, 2, optimizer=optimizer, first_step=3)
    assert equal_everywhere(parameters(model))
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("how", ["remove", "swap", "register"])
def test_whatever_ends_its_work_averages_a_last_time(ranks, how):
    ranks(leaving, 2, how)


class Fails(Now):
    def __init__(self, where, rank):
        super().__init__()
        self.where, self.rank = where, rank

    def due(self, step):
        if self.where == "due" and dist.get_rank() == self.rank and step == 1:
            raise ValueError("no timetable today")
        return super().due(step)

    def reduce(self, bucket):
        here = dist.get_rank() == self.rank and bucket.step == 1
        if here and self.where == "before":
            raise ValueError("no average today")
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))
        if here and self.where == "after":
            raise ValueError("no average today")


def failing(where):
    model, optimizer, registration = registered(Fails(where, 1))
    step(model, optimizer, 0)
    with pytest.raises(commhub.HookError, match=r"no (average|timetable) today"):
        step(model, optimizer, 1)
    registration.swap("allreduce")
    train(model, 2, optimizer=optimizer)


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_failure_on_one_rank_is_heard_on_all(ranks, nproc, where):
    ranks(failing, nproc, where)


class Halved:
    """Gradients within a half of the ranks, or nowhere; parameters among all, every fourth step."""

    def __init__(self, alone=False, fails_at=None):
        self.alone, self.fails_at = alone, fails_at

    def prepare(self, setup):
        half = setup.world_size // 2
        self.group = setup.partition([range(half), range(half, setup.world_size)])
        setup.average(Now(4))

    def reduce(self, bucket):
        if bucket.step == self.fails_at and bucket.rank == 1:
            raise ValueError("not this step")
        if not self.alone:
            bucket.flat.copy_((yield commhub.AllReduce(bucket.flat, group=self.group)))


def ahead(alone):
    """Half of the ranks take local steps while the others do not, which only an average needs."""
    model, optimizer, registration = registered(Halved(alone))
    first = dist.get_rank() < dist.get_world_size() / 2
    step(model, optimizer, 0)
    step(model, optimizer, 1)  # DDP itself agrees on its buckets here
    if not first:
        dist.barrier()
    step(model, optimizer, 2)
    if first:
        dist.barrier()
    assert not equal_everywhere(parameters(model))
    step(model, optimizer, 3)
    assert equal_everywhere(parameters(model))
    return registration.step


@pytest.mark.parametrize(("nproc", "alone"), [(2, True), (4, False), (4, True)])
def test_local_steps_wait_for_no_other_rank(ranks, nproc, alone):
    assert ranks(ahead, nproc, alone) == [4] * nproc


def local_failure(alone):
    """Rank 1 fails in a local step. Who meets it hears at once; all others with the next average."""
    model, optimizer, registration = registered(Halved(alone, fails_at=1))
    told = None
    for number in range(4):
        try:
            step(model, optimizer, number)
        except commhub.HookError as error:
            told = number, str(error)
            break
    registration.swap("allreduce")
    train(model, 2, optimizer=optimizer)
    assert equal_everywhere({name: p.grad for name, p in model.named_parameters()})
    return *told, registration.step


def test_a_failure_in_a_local_step_is_heard_by_all_at_the_next_average(ranks):
    for alone, heard in ((False, [1, 1, 3, 3]), (True, [3, 1, 3, 3])):
        found = ranks(local_failure, 4, alone, timeout=60)
        assert [number for number, *_ in found] == heard
        assert all(text.endswith("ValueError: not this step") and "rank 1" in text for _, text, _ in found)
        assert [steps for *_, steps in found] == [6] * 4  # whose step failed counts on with the others


def joined(initial, find_unused):
    model = DistributedDataParallel(mlp(), find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    registration = commhub.register(model, Now(2), optimizer=optimizer, timeout=30)
    rank = dist.get_rank()
    for _ in range(3):
        with model.join(divide_by_initial_world_size=initial):
            for number in range(4 + 3 * rank):
                step(model, optimizer, number)
    registration.finish()
    return registration.step


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("find_unused", [False, True])
def test_ranks_may_run_out_of_inputs(ranks, nproc, initial, find_unused):
    assert len(set(ranks(joined, nproc, initial, find_unused))) == 1


def resumed(directory, first):
    model, optimizer, registration = registered(Now(3))
    if first:
        train(model, 4, optimizer=optimizer)
        registration.save(directory)
        rank = dist.get_rank()
        torch.save(model.state_dict(), f"{directory}/model{rank}")
        run = train(model, 4, optimizer=optimizer, first_step=4)
    else:
        model.load_state_dict(torch.load(f"{directory}/model{dist.get_rank()}"))
        registration.load(directory)
        assert registration.step == 4
        run = train(model, 4, optimizer=optimizer, first_step=4)
    return run.parameters


def test_the_timetable_goes_on_where_it_was_saved(ranks, tmp_path):
    expected, found = ranks(resumed, 2, str(tmp_path), True), ranks(resumed, 2, str(tmp_path), False)
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))


def scheduled():
    """A hook that takes over averages the parameters first, after the last local step was made."""
    model, optimizer, registration = registered(Now(10))
    registration.schedule({3: "allreduce"})
    for number in range(5):
        step(model, optimizer, number)
        assert equal_everywhere(parameters(model)) == (number >= 2), number
    assert registration.name == "allreduce"


def test_a_scheduled_hook_takes_over_after_the_optimizers_step(ranks):
    ranks(scheduled, 2)


def in_manual():
    """An averager on a bare module counts steps and touches no gradient; what is not due communicates nothing."""
    module, averager = mlp(), Now(2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    registration = commhub.manual(module, averager, optimizer=optimizer, timeout=30)
    for number in range(4):
        optimizer.zero_grad()
        module(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        own = {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        assert not equal_everywhere(parameters(module))
        means = average(parameters(module)) if number % 2 else parameters(module)
        before = registration.stats.sent_bytes
        registration.average()
        assert close(parameters(module), means)
        assert equal({name: p.grad for name, p in module.named_parameters()}, own)
        assert (registration.stats.sent_bytes > before) == (number % 2 == 1)
        assert registration.step == registration.stats.steps == number + 1


@pytest.mark.parametrize("nproc", [2, 4])
def test_a_bare_module_is_averaged_when_told_to_and_due(ranks, nproc):
    ranks(in_manual, nproc)


class Told(Now):
    def prepare(self, setup):
        super().prepare(setup)
        self.steps = []
        setup.after_step(lambda step: self.steps.append((step, len(self.seen))))


def told_in_manual():
    averager = Told(2)
    registration = commhub.manual(mlp(), averager, timeout=30)
    for _ in range(3):
        registration.average()
    assert averager.steps == [(0, 0), (1, 0), (2, 1)]


def test_after_step_is_called_before_a_bare_module_s_average(ranks):
    ranks(told_in_manual, 1)


def local_steps_alone():
    """Rank 0 takes its steps while rank 1 does nothing: only an average needs both."""
    module = mlp()
    registration = commhub.manual(module, Now(5), timeout=30)
    if dist.get_rank() == 1:
        dist.barrier()
    for _ in range(4):
        registration.average()
    if dist.get_rank() == 0:
        dist.barrier()
    registration.average()
    assert equal_everywhere(parameters(module))


def test_a_step_that_averages_nothing_waits_for_nobody(ranks):
    ranks(local_steps_alone, 2)


def in_turn():
    """A schedule leads from an averager to a hook; `average()` then averages gradients."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    registration = commhub.manual(module, Now(10), timeout=30)
    registration.schedule({2: "allreduce"})
    for number in range(4):
        optimizer.zero_grad()
        module(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        if registration.name == "allreduce":
            registration.average()
            assert equal_everywhere({name: p.grad for name, p in module.named_parameters()})
            optimizer.step()
        else:
            optimizer.step()
            registration.average()
    assert (registration.name, registration.step) == ("allreduce", 4)
    assert equal_everywhere(parameters(module))


def test_a_bare_module_goes_from_an_averager_to_a_hook(ranks):
    ranks(in_turn, 2)


def compiled():
    model, optimizer, _ = registered(Now(2))
    compiled = torch.compile(model, backend="eager")
    for number in range(4):
        step(compiled, optimizer, number)
        assert equal_everywhere(parameters(model)) == (number % 2 == 1)


def test_a_compiled_model_is_averaged_on_time(ranks):
    ranks(compiled, 2)


def test_the_simulator_averages_when_due():
    tensors = [[torch.full((3,), float(rank))] for rank in range(4)]
    idle = commhub.simulate(Now(2), tensors, steps=1)
    assert [float(mine[0][0]) for mine in idle.gradients] == [0, 1, 2, 3]
    assert idle.sent_bytes == (0,) * 4
    due = commhub.simulate(Now(2), tensors, steps=2)
    assert [float(mine[0][0]) for mine in due.gradients] == [1.5] * 4
    halves = commhub.simulate(Now(1, halves=True), tensors)
    assert [float(mine[0][0]) for mine in halves.gradients] == [0.5, 0.5, 2.5, 2.5]
