"""Functions for DDP's own ``register_comm_hook`` that pass their buckets on: they register in the first backward."""

import copy
import datetime
import gc
import logging
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, batches, bitwise_equal

EVERY = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
ONE, MANY = 25, 0.0005  # bucket caps in MiB


@commhub.comm_hook
def plain(model, state):
    """Registers the plain average."""
    commhub.register(model, "allreduce", process_group=state)


@commhub.comm_hook
def chosen(model, state):
    commhub.register(model, state)


def layers():
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])


def trained(model, steps=4, first=0):
    """The gradients after each of some steps."""
    make, rank, gradients = batches(8), dist.get_rank(), []
    for number in range(first, first + steps):
        model.zero_grad()
        model(make(rank, number)[0]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.1 * p.grad
    return gradients


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(bitwise_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def as_without_a_hook(modes, make, count=1):
    reference = trained(DistributedDataParallel(make(), **modes))
    for _ in range(count):
        model = DistributedDataParallel(make(), **modes)
        model.register_comm_hook(None, plain)
        assert equal(trained(model), reference)
        registration = commhub.registration(model)
        assert (str(registration), registration.step) == ("allreduce", 4)
        registration.close()


MODES = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
def test_it_is_bit_equal_to_no_hook_from_the_first_step_on(ranks, modes):
    ranks(as_without_a_hook, 2, {**modes, "bucket_cap_mb": MANY}, layers)


class Sees:
    """Averages, and notes which parameters this rank's backward has reached."""

    def __init__(self):
        self.seen = []

    def reduce(self, bucket):
        self.seen += [(bucket.step, name, used) for name, used in zip(bucket.names, bucket.used, strict=True)]
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def which_were_reached(modes):
    """In the first step as in the second, where a hook watches."""
    model, rank = DistributedDataParallel(Branches(8), **modes), dist.get_rank()
    sees = Sees()
    model.register_comm_hook(sees, chosen)
    for number in range(3):
        model.zero_grad()
        model(batches(8)(rank, number)[0]).square().mean().backward()
    steps = [{name: used for step, name, used in sees.seen if step == number} for number in range(3)]
    assert steps[0] == steps[2]
    assert set(steps[0].values()) == {True, False}


@pytest.mark.parametrize("modes", [{"find_unused_parameters": True}, {"static_graph": True}], ids=["unused", "static"])
def test_the_first_step_knows_which_parameters_backward_has_reached(ranks, modes):
    ranks(which_were_reached, 2, modes)


def in_any_order(kind):
    reference = trained(DistributedDataParallel(layers()))
    model = DistributedDataParallel(layers())
    model.register_comm_hook(None, plain)
    if kind == "no_sync":
        with model.no_sync():
            model(batches(8)(dist.get_rank(), 9)[0]).square().mean().backward()
        assert commhub.registration(model) is None
    elif kind == "registered before":
        commhub.register(model, "allreduce(wire=bf16)")
        commhub.register(model, "allreduce")
    gradients = trained(model)
    assert equal(gradients, reference)
    registration = commhub.registration(model)
    registration.swap("fp16")
    assert not equal(trained(model), trained(DistributedDataParallel(copy.deepcopy(model.module))))
    registration.remove()
    other = DistributedDataParallel(copy.deepcopy(model.module))
    assert equal(trained(model), trained(other))


@pytest.mark.parametrize("kind", ["", "no_sync", "registered before"])
def test_it_registers_at_the_end_of_the_first_synchronised_backward(ranks, kind):
    ranks(in_any_order, 2, kind)


def uneven(divides):
    """A rank without any input of its own begins with another's."""
    gradients = []
    for hook in (None, plain):
        model = DistributedDataParallel(layers(), bucket_cap_mb=MANY)
        if hook is not None:
            model.register_comm_hook(None, hook)
        with model.join(divide_by_initial_world_size=divides):
            for number in range(3 * dist.get_rank()):
                model(batches(8)(dist.get_rank(), number)[0]).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert equal(gradients[:1], gradients[1:])


@pytest.mark.parametrize("divides", [True, False])
def test_it_registers_among_ranks_that_have_joined(ranks, divides):
    ranks(uneven, 2, divides)


def the_ranks_differ(modes):
    model = DistributedDataParallel(layers(), bucket_cap_mb=MANY, **modes)
    model.register_comm_hook(("allreduce", "fp16")[dist.get_rank()], chosen)
    for _ in range(2):  # the next backward tries again
        with pytest.raises(commhub.HookMismatchError, match="fp16"):
            trained(model, 1)
        assert commhub.registration(model) is None
    commhub.register(model, "allreduce")
    assert equal(trained(model, 2), trained(DistributedDataParallel(copy.deepcopy(layers())), 2))


@pytest.mark.parametrize("modes", [{}, {"static_graph": True}], ids=["plain", "static"])
def test_ranks_that_differ_all_hear_of_it_when_their_first_backward_has_ended(ranks, modes):
    ranks(the_ranks_differ, 2, modes)


def one_fails():
    model = DistributedDataParallel(layers())
    model.register_comm_hook("allreduce" if dist.get_rank() else "no such hook", chosen)
    with pytest.raises(commhub.CommhubError, match="no such hook"):
        trained(model, 1)


def test_what_one_rank_cannot_register_all_hear_of(ranks):
    ranks(one_fails, 2)


@commhub.comm_hook
def idle(model, state):
    """Registers nothing."""


def nothing_registered():
    model = DistributedDataParallel(layers())
    model.register_comm_hook(None, idle)
    with pytest.raises(commhub.RegistrationError, match="idle has registered no hook"):
        trained(model, 1)


def test_a_function_that_registers_nothing_is_told_so(ranks):
    ranks(nothing_registered, 1)


def which_model():
    net = layers()
    models = [DistributedDataParallel(net) for _ in range(2)]
    for model, state in zip(models, ("allreduce", "fp16"), strict=True):
        model.register_comm_hook(state, chosen)
    for model, name in zip(models, ("allreduce", "fp16"), strict=True):
        trained(model, 2)
        assert commhub.registration(model).name == name  # the state tells them apart
    twins = [DistributedDataParallel(layers()) for _ in range(2)]
    twins.append(DistributedDataParallel(twins[0].module))
    for model in twins:
        model.register_comm_hook(None, plain)
    trained(twins[1], 1)
    assert commhub.registration(twins[1]).name == "allreduce"
    with pytest.raises(commhub.RegistrationError, match="2 DDP models hold the parameters"):
        trained(twins[0], 1)
    del twins[2], model
    gc.collect()
    trained(twins[0], 1)
    assert commhub.registration(twins[0]).name == "allreduce"


def test_models_that_share_parameters_are_told_apart_by_their_state(ranks):
    ranks(which_model, 1)


def own_function(state, bucket):
    return plain(state, bucket).then(lambda future: future.value() * 2)


def called_by_another():
    model, other = (DistributedDataParallel(layers(), bucket_cap_mb=MANY) for _ in range(2))
    model.register_comm_hook(None, own_function)
    for doubled, once in zip(trained(model, 1), trained(other, 1), strict=True):
        assert all(torch.equal(doubled[name], 2 * once[name]) for name in once)
    registration = commhub.registration(model)
    fresh = DistributedDataParallel(layers())
    fresh.register_comm_hook(None, own_function)
    with pytest.raises(commhub.RegistrationError, match="own_function"):  # nobody knows yet what it calls
        commhub.register(fresh, "allreduce")
    registration.remove()


def test_a_function_of_the_user_s_own_may_call_it(ranks):
    ranks(called_by_another, 2)


def log_and_memory():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("commhub")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = DistributedDataParallel(layers())
    model.register_comm_hook(None, plain)
    trained(model, 3)
    logger.removeHandler(handler)
    said = [record for record in records if "register_comm_hook" in record.getMessage()]
    assert len(said) == (dist.get_rank() == 0)
    assert model._get_ddp_logging_data()["comm_hook"] == "allreduce"
    kept = weakref.ref(model), weakref.ref(commhub.registration(model))
    del model, said
    records.clear()  # they hold what they tell of
    gc.collect()
    assert [one() for one in kept] == [None, None]


def test_one_line_in_the_log_says_how_it_came_and_the_model_is_freed(ranks):
    ranks(log_and_memory, 2)


def saved():
    model = DistributedDataParallel(layers())
    model.register_comm_hook(None, plain)
    trained(model, 1)
    with pytest.raises(commhub.RegistrationError, match="cannot be copied or pickled"):
        pickle.dumps(model)
    commhub.registration(model).remove()
    assert pickle.loads(pickle.dumps(plain)) is plain


def test_the_function_can_be_saved_and_a_model_with_a_hook_cannot(ranks):
    ranks(saved, 1)


def test_it_has_the_name_and_the_text_of_what_registers():
    assert (plain.__name__, plain.__qualname__, plain.__doc__) == ("plain", "plain", "Registers the plain average.")
    with pytest.raises(commhub.HookOptionError, match="give a function"):
        commhub.comm_hook("allreduce")


def with_buffers():
    """Buffers that DDP sends in every forward, and parameters that no rank uses."""
    torch.manual_seed(1)
    net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8))])
    net.register_parameter("idle", nn.Parameter(torch.ones(3)))
    return net


@pytest.mark.skipif(not EVERY, reason="COMMHUB_EVERY_CHECK")
@pytest.mark.parametrize("nproc", [2, 3, 4])
@pytest.mark.parametrize(
    ("modes", "make"),
    [
        ({"bucket_cap_mb": ONE}, layers),
        ({"bucket_cap_mb": MANY}, layers),
        ({"bucket_cap_mb": MANY, "find_unused_parameters": True}, with_buffers),
        ({"bucket_cap_mb": MANY, "static_graph": True}, with_buffers),
    ],
    ids=["one bucket", "twelve buckets", "buffers and unused", "buffers and static"],
)
def test_it_is_so_every_time(ranks, nproc, modes, make):
    ranks(as_without_a_hook, nproc, modes, make, 5, timeout=400)


def only_some():
    """Nobody can tell the ranks; but the wait ends with the process group's timeout, on all of them."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    model = DistributedDataParallel(layers(), process_group=group)
    if dist.get_rank() == 0:
        model.register_comm_hook(None, plain)
    with pytest.raises(commhub.CommhubError if dist.get_rank() == 0 else RuntimeError):
        trained(model, 1)


@pytest.mark.skipif(not EVERY, reason="COMMHUB_EVERY_CHECK")
def test_where_only_some_ranks_have_a_hook_the_wait_ends(ranks):
    ranks(only_some, 2)


def in_a_compiled_step():
    model, other = DistributedDataParallel(layers()), DistributedDataParallel(layers())
    model.register_comm_hook(None, plain)
    compiled = torch.compile(model, backend="eager")
    make, rank = batches(8), dist.get_rank()
    for number in range(3):
        compiled(make(rank, number)[0]).square().mean().backward()
        other(make(rank, number)[0]).square().mean().backward()
    assert equal([{n: p.grad for n, p in model.named_parameters()}], [{n: p.grad for n, p in other.named_parameters()}])
    assert commhub.registration(compiled).step == 3


def test_a_compiled_model_registers_too(ranks):
    ranks(in_a_compiled_step, 2, timeout=120)
