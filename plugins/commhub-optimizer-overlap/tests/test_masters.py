"""16-bit parameters with float32 masters, against a reference that keeps masters by hand; reductions in any dtype."""

import copy

import pytest
import torch
import torch.distributed as dist
from commhub_optimizer_overlap import OptimizerOverlap
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce, HookOptionError
from commhub.testing import assert_equal_across_ranks, bitwise_equal

MANY = 1e-6
KINDS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


class Low(nn.Module):
    """Most in 16 bits, one transposed; one in float32, which needs no master; one that may be left out."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape):
            return torch.empty(shape).normal_(0, 0.4, generator=generator)

        self.first = nn.Parameter(drawn(8, 8).to(dtype).t())
        self.norm = nn.Parameter(drawn(8))
        self.last = nn.Parameter(drawn(8, 4).to(dtype))
        self.side = nn.Parameter(drawn(8, 4).to(dtype))

    def forward(self, x, with_side):
        x = x.to(self.first.dtype)
        y = (torch.tanh(x @ self.first).float() * self.norm).to(x.dtype) @ self.last
        return ((y + x @ self.side) if with_side else y).float().square().mean()


def batch(step):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(4, 8, generator=generator)


def mean(gradient, dtype):
    """Both ranks' mean, summed in `dtype` and given in float32."""
    mine = gradient.detach().to(dtype).mul_(1 / dist.get_world_size()).contiguous()
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return sum(every[1:], every[0].clone()).float()


class ByHand:
    """The reference: float32 parameters of an optimizer of their own, rounded after each of its steps."""

    def __init__(self, module, make, dtype):
        self.module, self.dtype = module, dtype
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in module.named_parameters()}
        self.optimizer = make(self.masters.values())

    def step(self, x, with_side):
        for p in self.module.parameters():
            p.grad = None
        self.module(x, with_side).backward()
        for name, p in self.module.named_parameters():
            used = with_side or name != "side"
            low = self.dtype or p.dtype
            self.masters[name].grad = mean(p.grad, low).view(p.shape) if used else None
        self.optimizer.step()
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p.copy_(self.masters[name])


def hooked(make, hook, dtype=torch.bfloat16, **options):
    model = DistributedDataParallel(Low(dtype), bucket_cap_mb=MANY, find_unused_parameters=True)
    optimizer = make(model.parameters())
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, timeout=30, **options)


def step(model, optimizer, number, with_side=True):
    optimizer.zero_grad()
    model(batch(number), with_side).backward()
    optimizer.step()


def same_as(reference, model, optimizer, registration):
    shared = registration.state_dict()["shared"]
    for name, p in model.module.named_parameters():
        master = reference.masters[name]
        assert bitwise_equal(p.detach(), dict(reference.module.named_parameters())[name].detach()), name
        if p.dtype != torch.float32:
            assert bitwise_equal(shared[name]["master"], master.detach()), name
        for key, value in reference.optimizer.state[master].items():
            assert bitwise_equal(optimizer.state[p][key], value), (name, key)
    assert "master" not in shared.get("norm", {})


def against_the_reference(dtype, reduced):
    names = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for make in KINDS.values():
        reference = ByHand(Low(dtype), make, names[reduced])
        model, optimizer, registration = hooked(
            make, "optimizer_overlap", dtype, master=True, **({"reduce_dtype": reduced} if reduced else {})
        )
        for number in range(10):
            with_side = number % 3 != 1
            reference.step(batch(number), with_side)
            step(model, optimizer, number, with_side)
            same_as(reference, model, optimizer, registration)
        assert_equal_across_ranks([p.detach() for p in model.parameters()])


@pytest.mark.parametrize(
    ("dtype", "reduced"),
    [(torch.bfloat16, "fp32"), (torch.bfloat16, None), (torch.float16, "bf16")],
)
def test_masters_are_stepped_in_float32_and_rounded(ranks, dtype, reduced):
    ranks(against_the_reference, 2, dtype, reduced)


def small_updates():
    """What bfloat16 alone rounds away adds up in a master; with no master nothing moves."""
    moved = []
    for hook in ("optimizer_overlap", "optimizer_overlap(master=true, reduce_dtype=fp32)"):
        model, optimizer, _ = hooked(lambda p: torch.optim.SGD(p, lr=1e-5), hook)
        with torch.no_grad():
            model.module.last.fill_(1.0)
        for _ in range(30):
            optimizer.zero_grad()
            (model(batch(0), True) * 0 + model.module.last.float().sum() * 30).backward()
            optimizer.step()
        moved.append(float((1 - model.module.last).abs().max()))
    return moved


def test_small_updates_are_not_lost(ranks):
    for without, with_master in ranks(small_updates, 2):
        assert without == 0
        assert 0.004 < with_master < 0.012


def resumed():
    hook = "optimizer_overlap(master=true, reduce_dtype=fp32)"
    make = KINDS["Adam"]
    model, optimizer, registration = hooked(make, hook)
    for number in range(6):
        if number == 3:
            saved = copy.deepcopy([model.module.state_dict(), optimizer.state_dict(), registration.state_dict()])
        step(model, optimizer, number)
    for order in ((0, 1, 2), (2, 1, 0)):
        other, mine, again = hooked(make, hook)
        step(other, mine, 11)
        for part in order:
            (other.module, mine, again)[part].load_state_dict(copy.deepcopy(saved[part]))
        assert mine.state[other.module.first]["exp_avg"].dtype == torch.float32
        for number in range(3, 6):
            step(other, mine, number)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert bitwise_equal(a.detach(), b.detach()), order
            assert bitwise_equal(optimizer.state[a]["exp_avg_sq"], mine.state[b]["exp_avg_sq"]), order
    # Parameters that were set by hand are what training goes on from.
    with torch.no_grad():
        model.module.last.zero_()
    step(model, optimizer, 6)
    assert model.module.last.abs().max() < 0.1
    registration.swap("allreduce")  # state in the parameters' dtype, as PyTorch's own step() needs it
    assert optimizer.state[model.module.first]["exp_avg"].dtype == torch.bfloat16
    step(model, optimizer, 7)
    registration.swap(hook)
    step(model, optimizer, 8)
    assert optimizer.state[model.module.first]["exp_avg"].dtype == torch.float32
    assert (len(optimizer._optimizer_load_state_dict_pre_hooks), len(optimizer.state)) == (1, 4)
    registration.remove()
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 0


def test_masters_and_their_state_are_saved_loaded_and_taken_away(ranks):
    ranks(resumed, 2)


@torch.no_grad()
def in_place(p, value):
    p.copy_(value)


def through_data(p, value):
    p.data.copy_(value)


def in_its_stead(p, value):
    p.data = value


def set_after_registration():
    """However parameters are set before the first step, their masters are of these; later, unless through ``.data``."""
    drawn = [p.detach() * 3 for p in Low().parameters()]
    for way, late in ((in_place, True), (through_data, False), (in_its_stead, True)):
        model, optimizer, registration = hooked(KINDS["SGD"], "optimizer_overlap", master=True, reduce_dtype="fp32")
        for steps in (range(3), range(3, 6)) if late else (range(3),):
            for p, value in zip(model.parameters(), drawn, strict=True):
                way(p, value.clone())
            optimizer.state.clear()
            reference = ByHand(copy.deepcopy(model.module), KINDS["SGD"], torch.float32)
            for number in steps:
                reference.step(batch(number), True)
                step(model, optimizer, number)
                same_as(reference, model, optimizer, registration)


def test_masters_are_of_the_parameters_that_were_set_after_registration(ranks):
    ranks(set_after_registration, 2)


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer, _ = hooked(KINDS["Adam"], "optimizer_overlap", master=True, reduce_dtype="fp32", scaler=scaler)
    for number in range(4):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        loss = model(batch(number), True)
        scaler.scale(loss * (float("nan") if number == 2 else 1)).backward()
        assert all(map(bitwise_equal, before, [p.detach() for p in model.parameters()]))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(before[1], model.module.norm)
        assert moved == (number != 2)
        assert optimizer.state[model.module.first]["exp_avg"].dtype == torch.float32
    assert_equal_across_ranks([p.detach() for p in model.parameters()])


def test_with_a_loss_scaler_masters_are_stepped_in_step(ranks):
    ranks(scaled, 2)


class Seen:
    """The plain average; keeps the dtypes that it is told of and given."""

    def prepare(self, setup):
        self.told, self.given = setup.dtypes, set()

    def reduce(self, bucket):
        self.given.add(bucket.flat.dtype)
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def reduced_elsewhere():
    inner = Seen()
    model, _, _ = hooked(KINDS["SGD"], OptimizerOverlap(inner=inner, reduce_dtype="fp32"))
    model(batch(0), True).backward()
    assert set(inner.told) == inner.given == {torch.float32}
    for p in model.parameters():
        assert p.grad.dtype == p.dtype
    with pytest.raises(HookOptionError, match="reduce_dtype is 'int8'"):
        commhub.register(model, "optimizer_overlap", reduce_dtype="int8", optimizer=torch.optim.SGD(model.parameters()))


def test_the_inner_hook_works_in_the_dtype_asked_for(ranks):
    ranks(reduced_elsewhere, 2)
