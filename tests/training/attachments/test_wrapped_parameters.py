"""What DDP averages was fixed when it wrapped the model; freezing, adding and replacing since then change nothing."""

import contextlib
import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal


class Net(nn.Module):
    """Three layers, and a tensor that stands in the module itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.extra = nn.Identity()

    def forward(self, x):
        return self.extra(self.last(self.middle(self.first(x).relu()).relu()) * self.scale)


class Tables(Net):
    """With a sparse embedding, a complex tensor and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8, sparse=True)
        self.waves = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.again = nn.Linear(16, 16)
        self.again.weight = self.middle.weight

    def forward(self, x):
        wide = self.again(self.middle(self.first(self.table((x[:, :1] > 0).long())[:, 0] + x).relu()))
        return self.extra(self.last(wide) * self.scale * self.waves.abs())


def freeze(module):
    module.middle.requires_grad_(False)


def unfreeze(module):
    module.middle.requires_grad_(True)


def add(module):
    torch.manual_seed(1)
    module.extra = nn.Linear(4, 4)


def replace(module):
    torch.manual_seed(1)
    module.middle = nn.Linear(16, 16)


def ignore(module):
    module._ddp_params_and_buffers_to_ignore = ["scale", "first.bias"]


def nothing(module):
    pass


UNUSED = {"find_unused_parameters": True}
CASES = {
    # what is done before wrapping, before registering, before the third step, before the fifth, and how DDP is built
    "frozen, wrapped, unfrozen, registered": (freeze, unfreeze, nothing, nothing, {}),
    "the same in a static graph": (freeze, unfreeze, nothing, nothing, {"static_graph": True}),
    "wrapped, frozen, registered": (nothing, freeze, nothing, nothing, UNUSED),
    "wrapped, frozen, registered, static graph": (nothing, freeze, nothing, nothing, {"static_graph": True}),
    "wrapped, frozen, registered, unfrozen": (nothing, freeze, unfreeze, freeze, UNUSED),
    "wrapped, layer added, registered": (nothing, add, nothing, nothing, {}),
    "wrapped, layer replaced, registered": (nothing, replace, nothing, nothing, UNUSED),
    "registered, frozen, unfrozen": (nothing, nothing, freeze, unfreeze, UNUSED),
    "frozen, wrapped, registered, unfrozen, frozen": (freeze, nothing, unfreeze, freeze, UNUSED),
    "registered, layer replaced, added": (nothing, nothing, replace, add, UNUSED),
    "some ignored by DDP": (ignore, nothing, freeze, nothing, UNUSED),
}


def gradients(model):
    return {
        name: None if p.grad is None else (p.grad.to_dense() if p.grad.is_sparse else p.grad).clone()
        for name, p in model.module.named_parameters()
    }


def backward(model, number):
    model.zero_grad()
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    model(torch.randn(4, 8, generator=generator)).square().mean().backward()
    return gradients(model)


def same(a, b):
    return a is b or (a is not None and b is not None and bitwise_equal(a, b))


def as_ddp_does(kind, case, hook):
    before_wrapping, before_registering, third, fifth, options = CASES[case]
    models = []
    for _ in range(2):
        module = kind()
        before_wrapping(module)
        models.append(DistributedDataParallel(module, bucket_cap_mb=1 / 1024, **options))
        before_registering(module)
    bare, hooked = models
    registration = commhub.register(hooked, hook, timeout=20)
    for number in range(6):
        for change in {2: (third,), 4: (fifth,)}.get(number, ()):
            change(bare.module)
            change(hooked.module)
        wanted, got = backward(bare, number), backward(hooked, number)
        assert wanted.keys() == got.keys()
        for name in wanted:
            if hook == "allreduce":
                assert same(wanted[name], got[name]), (case, number, name)
            elif wanted[name] is None:
                assert got[name] is None, (case, number, name)
            else:
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-2, atol=1e-3)
        assert registration.step == number + 1, case
    registration.remove()
    for name, gradient in backward(bare, 9).items():
        assert same(gradient, backward(hooked, 9)[name])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_ddp_without_a_hook_and_every_step_ends(ranks, case):
    ranks(as_ddp_does, 2, Net, case, "allreduce")


def several_as_ddp_does():
    for case in ("frozen, wrapped, unfrozen, registered", "wrapped, frozen, registered, unfrozen"):
        as_ddp_does(Tables, case, "allreduce")
        as_ddp_does(Net, case, "powersgd(start_step=100)")
        as_ddp_does(Net, case, "fp16")


def test_so_are_sparse_complex_and_shared_ones_and_those_of_other_hooks(ranks):
    ranks(several_as_ddp_does, 2)


def local_gradients(model, number):
    """This rank's gradients, by name, from a copy of the module."""
    copied = copy.deepcopy(model.module)
    copied.zero_grad()
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    copied(torch.randn(4, 8, generator=generator)).square().mean().backward()
    return {name: p.grad for name, p in copied.named_parameters()}


def means_in_float64():
    for case in ("frozen, wrapped, unfrozen, registered", "wrapped, frozen, registered, unfrozen"):
        before_wrapping, before_registering, third, _, options = CASES[case]
        module = Net()
        before_wrapping(module)
        model = DistributedDataParallel(module, bucket_cap_mb=1 / 1024, **options)
        reduced = {name for name, p in module.named_parameters() if p.requires_grad}
        before_registering(module)
        commhub.register(model, "quantize_per_tensor(bits=8)", timeout=20)
        for number in range(3):
            if number == 2:
                third(module)
            mine = local_gradients(model, number)
            got = backward(model, number)
            for name, gradient in got.items():
                if gradient is None:
                    assert mine[name] is None
                elif name in reduced:
                    wide = mine[name].double()
                    dist.all_reduce(wide)
                    torch.testing.assert_close(gradient.double(), wide / 2, rtol=0.05, atol=0.01)
                else:
                    assert bitwise_equal(gradient, mine[name])


def test_a_lossy_hook_gives_the_mean_of_what_was_wrapped(ranks):
    ranks(means_in_float64, 2)


def goes_on(case):
    before_wrapping, before_registering, *_, options = CASES[case]
    module = Net()
    before_wrapping(module)
    model = DistributedDataParallel(module, **options)
    before_registering(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    registration = commhub.register(model, "periodic(period=2)", optimizer=optimizer, timeout=20)
    for number in range(3):
        backward(model, number)
        optimizer.step()
    for name, parameter in module.named_parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, 0)
        assert bitwise_equal(other, parameter.detach()), name
    registration.schedule({4: "powersgd(start_step=6)", 5: "fp16"})
    names = []
    for number in range(3, 6):
        backward(model, number)
        optimizer.step()
        backward_name = registration.name
        names.append(backward_name)
    assert names == ["powersgd", "fp16", "fp16"], names
    assert registration.step == 6


@pytest.mark.parametrize(
    "case",
    [
        "frozen, wrapped, unfrozen, registered",
        "wrapped, frozen, registered",
        "wrapped, layer added, registered",
        "wrapped, layer replaced, registered",
    ],
)
def test_averages_and_schedules_go_on(ranks, case):
    ranks(goes_on, 2, case)


@contextlib.contextmanager
def told():
    """What the logger ``commhub`` says at WARNING."""
    texts = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("commhub").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("commhub").removeHandler(handler)


def what_is_said(case, hook="allreduce"):
    before_wrapping, before_registering, *_, options = CASES[case]
    module = Net()
    before_wrapping(module)
    model = DistributedDataParallel(module, **options)
    before_registering(module)
    with told() as texts:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        registration = commhub.register(model, hook, optimizer=optimizer, timeout=20)
        backward(model, 0)
        registration.swap("fp16")
        backward(model, 1)
    return texts


def each_is_said():
    unfrozen = what_is_said("frozen, wrapped, unfrozen, registered")
    frozen = what_is_said("wrapped, frozen, registered")
    replaced = what_is_said("wrapped, layer replaced, registered")
    fine = what_is_said("registered, frozen, unfrozen") + what_is_said("some ignored by DDP")
    local = what_is_said("frozen, wrapped, unfrozen, registered", "periodic")
    return unfrozen, frozen, replaced, fine, local


def test_what_lies_outside_is_named_once_at_registration_on_rank_0(ranks):
    (unfrozen, frozen, replaced, fine, local), *others = ranks(each_is_said, 2)
    assert others == [([], [], [], [], [])]
    (text,) = unfrozen
    assert "'middle.weight', 'middle.bias'" in text
    assert "does not average" in text
    assert "rap it again" in text
    (text,) = frozen
    assert "'middle.weight', 'middle.bias'" in text
    assert "frozen" in text
    (text,) = replaced
    assert "no longer holds 2 of" in text
    assert "'middle.weight', 'middle.bias'" in text
    assert fine == []
    assert local == []  # gradients play no part, and parameters are averaged, whoever wrapped them


def all_frozen_by_now():
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    model.module.requires_grad_(False)
    with told() as texts:
        registration = commhub.register(model, "allreduce", timeout=20)
    assert ["no backward counts as a step" in text for text in texts] == [True] * (dist.get_rank() == 0)
    model.module.last.requires_grad_(True)
    got = backward(model, 0)
    assert registration.step == 1
    assert [name for name, gradient in got.items() if gradient is not None] == ["last.weight", "last.bias"]


def test_a_model_that_is_frozen_as_a_whole_can_be_registered_and_unfrozen(ranks):
    ranks(all_frozen_by_now, 2)


def used_flags():
    seen = []

    class Looks:
        def reduce(self, bucket):
            seen.extend(name for name, used in zip(bucket.names, bucket.used, strict=True) if used)
            bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))

    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    freeze(model.module)
    commhub.register(model, Looks(), timeout=20)
    backward(model, 0)
    before = set(seen)
    assert not any(p.requires_grad for p in model.module.middle.parameters())
    unfreeze(model.module)
    backward(model, 1)
    return sorted(set(seen) - before)


def test_a_parameter_that_was_frozen_at_registration_counts_as_used_once_backward_reaches_it(ranks):
    assert ranks(used_flags, 2) == [["middle.bias", "middle.weight"]] * 2


def zero_overlaps():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    results = []
    for hook in (None, "zero_overlap", "zero_overlap(mode=stepwise)"):
        module = Net()
        freeze(module)
        model = DistributedDataParallel(module, bucket_cap_mb=1 / 1024)
        unfreeze(module)
        trained = [p for name, p in module.named_parameters() if not name.startswith("middle")]
        zero = ZeroRedundancyOptimizer(trained, torch.optim.SGD, lr=0.1)
        if hook:
            commhub.register(model, hook, optimizer=zero, timeout=20)
        for number in range(3):
            backward(model, number)
            zero.step()
        results.append([p.detach().clone() for p in trained])
    for plain, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(plain, other)


def test_hooks_that_count_parameters_know_how_many_come(ranks):
    ranks(zero_overlaps, 2)
