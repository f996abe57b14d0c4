"""``replicate()`` makes its DDP model in the first forward: a hook registered before works from the start."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, steps=3, first=0):
    """Steps on batches of this rank's own; the gradients of the last, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(first, first + steps):
        optimizer.zero_grad()
        model(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        optimizer.step()
    return gradients(model)


def bare():
    torch.manual_seed(3)
    return mlp()


def same(one, other):
    assert one.keys() == other.keys()
    assert all(bitwise_equal(one[name], other[name]) for name in one)


def bit_equal(early, options):
    plain, model = replicate(bare(), **options), replicate(bare(), **options)
    if not early:
        train(plain, 1)
        train(model, 1)
    registration = commhub.register(model, "allreduce", timeout=20)
    assert commhub.registration(model) is registration
    same(train(model), train(plain))
    assert commhub.registration(model) is registration
    assert registration.step == registration.stats.steps == 3
    assert registration.stats.sent_bytes > 0
    same(dict(model.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": 0.001},
        {"device_id": torch.device("cpu")},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_allreduce_gives_what_replicate_gives(ranks, nproc, early, options):
    ranks(bit_equal, nproc, early, options)


def remembered(registration):
    return {k: v for k, v in flat(registration.state_dict()).items() if isinstance(v, torch.Tensor)}


def flat(held, where=""):
    if isinstance(held, dict):
        return {k: v for key, value in held.items() for k, v in flat(value, f"{where}/{key}").items()}
    return {where: held}


def named_as_in_ddp(early):
    ddp, model = DistributedDataParallel(bare()), replicate(bare())
    if not early:
        train(ddp, 2)
        train(model, 2)
    hook = "powersgd(rank=2, start_step=1, min_compression_rate=1)"
    other, registration = commhub.register(ddp, hook, timeout=20), commhub.register(model, hook, timeout=20)
    train(ddp, 4)
    train(model, 4)
    state = remembered(registration)
    assert any("0.weight" in key for key in state), sorted(state)
    same(state, remembered(other))
    same(dict(model.named_parameters()), dict(ddp.module.named_parameters()))
    registration.load_state_dict(other.state_dict())


@pytest.mark.parametrize("early", [True, False])
def test_state_is_named_and_is_as_that_of_a_ddp_model(ranks, early):
    ranks(named_as_in_ddp, 2, early)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.own, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.own(self.body(x)))


def with_ignored(early):
    torch.manual_seed(1)
    net = Net()
    model = replicate(net, ignored_modules=[net.own])
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    if not early:
        model(inputs).sum().backward()
        model.zero_grad()
    registration = commhub.register(model, "powersgd_rank2", start_step=0, min_compression_rate=1, timeout=20)
    model(inputs).sum().backward()
    assert_equal_across_ranks([p.grad for p in (*model.body.parameters(), *model.head.parameters())])
    everyone = [None, None]
    dist.all_gather_object(everyone, model.own.weight.grad)
    assert not torch.equal(*everyone)
    assert not [key for key in flat(registration.state_dict()) if "own" in key]
    assert [key for key in remembered(registration) if "head.weight" in key]


@pytest.mark.parametrize("early", [True, False])
def test_ignored_modules_are_left_alone(ranks, early):
    ranks(with_ignored, 2, early)


def on_a_part(early, whole):
    torch.manual_seed(1)
    net = Net()
    replicate(net.body)
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    if not early:
        net(inputs).sum().backward()
        net.zero_grad()
    registration = commhub.register(net if whole else net.body, "allreduce", timeout=20)
    assert commhub.registration(net) is commhub.registration(net.body) is registration
    names = []
    registration.observe(lambda bucket, requests: names.extend(bucket.names))
    net(inputs).sum().backward()
    assert_equal_across_ranks([net.body.weight.grad])
    assert sorted(names) == ["bias", "weight"]
    replicate(net.own)
    with pytest.raises(commhub.RegistrationError, match="holds 2"):
        commhub.register(net, "allreduce")


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_part_of_a_model(ranks, early, whole):
    ranks(on_a_part, 2, early, whole)


def local_steps(early):
    ddp, model = DistributedDataParallel(bare()), replicate(bare())
    if not early:
        train(ddp, 1)
        train(model, 1)
    for one in (ddp, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        registration = commhub.register(one, "periodic(period=2)", optimizer=optimizer, timeout=20)
        for number in range(4):
            optimizer.zero_grad()
            one(*batches(8)(dist.get_rank(), number)).square().mean().backward()
            optimizer.step()
        assert registration.step == 4
    same(dict(model.named_parameters()), dict(ddp.module.named_parameters()))
    everyone = [None, None]
    dist.all_gather_object(everyone, next(iter(model.parameters())).detach())
    assert not torch.equal(*everyone)
    registration.remove()
    assert_equal_across_ranks([p.data for p in model.parameters()])


@pytest.mark.parametrize("early", [True, False])
def test_averagers_work(ranks, early):
    ranks(local_steps, 2, early)


def own_hook():
    def users(state, bucket):
        raise AssertionError("never called")

    model = replicate(bare())
    model.register_comm_hook(None, users)
    with pytest.raises(commhub.RegistrationError, match=r"already has the communication hook '.*users'"):
        commhub.register(model, "allreduce", timeout=20)

    @commhub.comm_hook
    def half(model, state):
        commhub.register(model, "fp16", timeout=20)

    other = replicate(bare())
    other.register_comm_hook(None, half)
    names = set()
    train(other, 1)
    registration = commhub.registration(other)
    assert str(registration) == "fp16"
    registration.observe(lambda bucket, requests: names.update(bucket.names))
    train(other, 1)
    assert names == {name for name, _ in other.named_parameters()}
    third = replicate(bare())
    third.register_comm_hook(None, half)
    registration = commhub.register(third, "allreduce", timeout=20)
    train(third, 2)
    assert (str(registration), registration.step) == ("allreduce", 2)


def test_hooks_given_to_replicate_itself(ranks):
    ranks(own_hook, 2)


def in_a_group():
    mine = dist.new_group([0, 1]), dist.new_group([2])
    group = mine[dist.get_rank() == 2]
    model = replicate(bare(), process_group=group)
    registration = commhub.register(model, "allreduce", timeout=20)
    plain = replicate(bare(), process_group=group)
    same(train(model), train(plain))
    assert registration.step == 3


def test_the_group_is_the_one_that_replicate_was_given(ranks):
    ranks(in_a_group, 3)


def manual_refused():
    for model in (replicate(bare()), nn.Sequential(replicate(bare()))):
        with pytest.raises(commhub.RegistrationError, match=r"replicate\(\).*commhub\.register"):
            commhub.manual(model, "allreduce", timeout=20)
    model = replicate(nn.Linear(2, 2, device="meta"))
    with pytest.raises(commhub.RegistrationError, match="meta"):
        commhub.register(model, "allreduce", timeout=20)


def test_manual_says_that_it_averages_by_itself(ranks):
    ranks(manual_refused, 2)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.own = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.own(self.body(x))


def means_of_buffers(early):
    net = Normed()
    model = replicate(net, ignored_modules=[net.own])
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if not early:
        model(inputs)
    commhub.register(model, "periodic(period=1, buffers=true)", optimizer=optimizer, timeout=20)
    model(inputs).square().sum().backward()
    optimizer.step()
    assert_equal_across_ranks([model.body.running_mean, model.body.weight.data])
    everyone = [None, None]
    dist.all_gather_object(everyone, (model.own.running_mean, model.own.weight.detach()))
    assert not torch.equal(everyone[0][0], everyone[1][0])
    assert not torch.equal(everyone[0][1], everyone[1][1])


@pytest.mark.parametrize("early", [True, False])
def test_averagers_leave_the_buffers_of_ignored_modules_alone(ranks, early):
    ranks(means_of_buffers, 2, early)
