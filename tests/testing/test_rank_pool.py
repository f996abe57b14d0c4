"""What a call on the pool's ranks gets, gives back, and leaves behind."""

import os
import random
import sys
import time
import warnings

import attrs
import pytest
import torch
import torch.distributed as dist

import commhub.testing
from commhub.testing import bitwise_equal

pytestmark = pytest.mark.filterwarnings("error")


@attrs.frozen
class Pair:
    a: torch.Tensor
    b: object


def identity():
    return dist.get_rank(), dist.get_world_size(), dist.get_backend()


@pytest.mark.parametrize("nproc", [1, 2, 3, 4])
def test_each_rank_has_its_number_in_a_gloo_group(ranks, nproc):
    assert ranks(identity, nproc) == [(rank, nproc, "gloo") for rank in range(nproc)]


def all_reduced(tensor):
    dist.all_reduce(tensor)
    return tensor


def test_the_ranks_communicate(ranks):
    assert all(t.tolist() == [3.0, 6.0] for t in ranks(all_reduced, 3, torch.tensor([1.0, 2.0])))


def test_sixty_calls_in_a_row_are_right(ranks):
    start = time.monotonic()
    for call in range(60):
        assert ranks(all_reduced, 2, torch.full((3,), float(call)))[1].tolist() == [2.0 * call] * 3
    print(f"{(time.monotonic() - start) / 60 * 1000:.0f} ms per call")


def echo(value):
    return value


def test_tensors_travel_by_value_with_dtype_strides_and_views(ranks):
    whole = torch.arange(12.0).reshape(3, 4)
    given = {
        "transposed": whole.t(),
        "nan": torch.tensor([float("nan"), -0.0]),
        "bf16": torch.ones((), dtype=torch.bfloat16),
        "sparse": torch.eye(3).to_sparse(),
        "needs grad": torch.ones(2, requires_grad=True) * 2,
    }
    back = ranks(echo, 2, given)[1]
    assert all(bitwise_equal(given[name], back[name]) for name in given)
    assert back["transposed"].stride() == (1, 4)


def test_classes_of_the_test_module_travel_both_ways(ranks):
    back = ranks(echo, 2, Pair(torch.ones(2), "x"))[0]
    assert isinstance(back, Pair)
    assert back.b == "x"


def test_keyword_arguments_arrive(ranks):
    assert ranks(echo, 1, value=3) == [3]


def test_functions_of_importable_modules_run_by_name(ranks):
    assert ranks(os.path.basename, 1, "a/b") == ["b"]


class Holder:
    @staticmethod
    def answer():
        return 42


def test_static_methods_run_by_qualified_name(ranks):
    assert ranks(Holder.answer, 1) == [42]


def test_what_no_other_process_can_find_is_refused_in_one_sentence(ranks):
    def inner():
        return 1

    for fn in (lambda: 1, inner, Holder().__init__):
        with pytest.raises(TypeError, match="defined at the top of a module"):
            ranks(fn, 1)


def test_a_changed_file_is_loaded_again(ranks, tmp_path, monkeypatch):
    path = tmp_path / "changing.py"
    path.write_text("def value():\n    return 1\n")
    spec = commhub.testing._transport.importlib.util.spec_from_file_location("changing", path)
    module = commhub.testing._transport.importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changing", module)
    spec.loader.exec_module(module)
    assert ranks(module.value, 1) == [1]
    path.write_text("def value():\n    return 2\n")
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
    assert ranks(module.value, 1) == [2]


def process_id():
    return os.getpid()


def test_processes_are_used_again(ranks):
    first = ranks(process_id, 2)
    assert ranks(process_id, 2) == first
    assert set(first) < set(ranks(process_id, 3))


def disturb():
    torch.manual_seed(dist.get_rank() + 7)
    random.seed(7)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    warnings.simplefilter("error")
    os.environ["COMMHUB_TESTING_LEFT"] = "behind"
    sys.path.insert(0, "left_behind")
    os.chdir("/")


def settings():
    return {
        "seed": torch.initial_seed(),
        "draw": (torch.rand(1).item(), random.random()),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": torch.get_default_device().type,
        "filters": len(warnings.filters),
        "environ": os.environ.get("COMMHUB_TESTING_LEFT"),
        "path": "left_behind" in sys.path,
        "folder": os.getcwd(),
    }


def test_a_call_sees_nothing_of_what_the_last_one_set(ranks):
    before = ranks(settings, 2)
    ranks(disturb, 2)
    assert ranks(settings, 2) == before
    assert before[0] == before[1]
    assert before[0]["threads"] == 1


def environment(name):
    return os.environ.get(name), sys.path[0]


def test_the_parents_environment_and_path_hold_in_the_ranks(ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("COMMHUB_TESTING", "here")
    monkeypatch.syspath_prepend(tmp_path)
    assert ranks(environment, 2, "COMMHUB_TESTING") == [("here", str(tmp_path))] * 2
    monkeypatch.undo()
    assert ranks(environment, 1, "COMMHUB_TESTING")[0][0] is None


def without_group():
    me = commhub.testing.current()
    me.store.set(f"from {me.rank}", str(me.rank))
    peer = (me.rank + 1) % me.world_size
    return dist.is_initialized(), int(me.store.get(f"from {peer}"))


def test_without_a_group_the_ranks_still_know_each_other_and_share_a_store(ranks):
    assert ranks(without_group, 3, init=False) == [(False, 1), (False, 2), (False, 0)]


def store_key():
    store = commhub.testing.current().store
    return store.check(["left"]) or store.set("left", "behind")


def test_each_call_has_a_store_of_its_own(ranks):
    assert ranks(store_key, 1, init=False) == [None]
    assert ranks(store_key, 1, init=False) == [None]


def test_current_outside_a_rank_says_where_it_belongs():
    with pytest.raises(RuntimeError, match="on a rank"):
        commhub.testing.current()


def speak():
    print("hello")


def test_what_a_rank_prints_is_shown_with_its_number(ranks, capsys):
    for _ in range(3):
        ranks(speak, 2)
        assert capsys.readouterr().out == "[rank 0] hello\n[rank 1] hello\n"


@pytest.mark.parametrize("nproc", [0, -1, 10**400, 2.0, True, None, "2"])
def test_what_is_no_number_of_ranks_is_refused(ranks, nproc):
    with pytest.raises(commhub.HookOptionError, match="from 1 to"):
        ranks(identity, nproc)


@pytest.mark.parametrize("function", [None, 3, lambda: None, "identity"])
def test_what_no_other_process_finds_is_refused(ranks, function):
    with pytest.raises(commhub.HookOptionError, match="at the top of a module"):
        ranks(function, 1)


def test_importing_the_harness_loads_neither_torch_nor_pytest():
    import subprocess

    code = "import commhub.testing, sys; assert not {'torch', 'pytest'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
