"""What can be found out without ranks: names, arguments, and what is said where the framework is not there."""

import pickle
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
from commhub_lightning import _framework
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import commhub

ROOT = Path(__file__).parents[1]
PACKAGES = ["lightning", "pytorch_lightning"]


@pytest.fixture(params=PACKAGES)
def package(request):
    if util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed here")
    return request.param


@pytest.fixture
def ours(package):
    from commhub_lightning._classes import classes, register_names

    register_names(package)
    return classes(package)


def test_every_installed_hook_has_a_name_after_the_import(package, ours):
    registry = _framework.load(package).registry
    names = {name.removeprefix("ddp_commhub_") for name in registry if name.startswith("ddp_commhub_")}
    assert names == set(commhub.hooks())
    assert isinstance(registry.get("ddp_commhub_powersgd_rank2"), ours["CommHubDDPStrategy"])


def test_the_import_registers_and_loads_no_hook():
    if util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed here")
    code = (
        "import sys, commhub_lightning; from lightning.pytorch.strategies import StrategyRegistry as r; "
        "print('ddp_commhub_fp16' in r, 'commhub_powersgd._hook' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("name", ["CommHubDDPStrategy", "CommHubCallback"])
@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (("powersdg",), commhub.UnknownHookError, "Did you mean 'powersgd'"),
        (("powersgd(rnak=2)",), commhub.HookOptionError, "rnak"),
        (("powersgd", {"rank": 0}), commhub.HookOptionError, "at least 1"),
        (("powersgd(rank=2)", {"rank": 3}), commhub.HookOptionError, "Give it once"),
        (("fp16", {"wire": "int8"}), commhub.HookOptionError, "wire is 'int8'"),
        (("fp16", {"optimizer": None}), commhub.HookOptionError, "passes optimizer= by itself"),
        (("fp16", {"timeout": -1}), commhub.RegistrationError, "timeout is -1"),
        (("fp16", "rank=4"), commhub.HookOptionError, "hook_options is 'rank=4'"),
        (("fp16", {4: 4}), commhub.HookOptionError, "hook_options is {4: 4}"),
        ((7,), commhub.HookOptionError, "is no hook"),
    ],
)
def test_a_hook_that_cannot_be_had_is_refused_where_it_is_written(ours, name, arguments, error, told):
    with pytest.raises(error, match=told):
        ours[name](*arguments)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ddp_comm_hook": print}, "takes no ddp_comm_hook="),
        ({"ddp_comm_state": 1}, "takes no ddp_comm_state="),
        ({"model_averaging_period": 4}, "takes no model_averaging_period="),
        ({"find_unused_parameter": True}, "Did you mean find_unused_parameters="),
        ({"hook_option": {}}, "Did you mean hook_options="),
        ({"rank": 4}, "Options of the hook belong in hook_options"),
        ({"schedule": "fp16"}, "schedule is 'fp16'"),
        ({"schedule": {4: "powersgd(rank=0)"}}, "at least 1"),
    ],
)
def test_an_argument_that_nobody_takes_is_refused_where_it_is_written(ours, given, told):
    with pytest.raises(commhub.HookOptionError, match=told):
        ours["CommHubDDPStrategy"]("fp16", **given)


def test_the_arguments_of_lightning_and_of_ddp_are_taken(ours):
    ours["CommHubDDPStrategy"]("fp16", find_unused_parameters=True, bucket_cap_mb=5, process_group_backend="gloo")
    ours["CommHubDDPStrategy"](hook=commhub.HookType.POWERSGD, hook_options={"rank": 4, "wire": "bf16", "timeout": 9})
    assert ours["CommHubCallback"](commhub.create("fp16")).registration is None


@pytest.mark.parametrize("name", ["CommHubDDPStrategy", "CommHubCallback"])
def test_they_can_be_pickled_for_a_launcher_that_starts_processes(ours, name):
    made = ours[name]("powersgd", {"rank": 4})
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made) is ours[name]
    assert (again._commhub.name, again._commhub.options) == ("powersgd", {"rank": 4})


def test_a_checkpoint_is_written_after_a_fit_in_processes_that_a_launcher_started(package, ours, tmp_path):
    home = pytest.importorskip(_framework._HOMES[package])
    strategy = ours["CommHubDDPStrategy"]("fp16", start_method="spawn")
    strategy.connect(home.LightningModule())
    strategy.save_checkpoint({"optimizer_states": [], "state_dict": {}}, tmp_path / "after.ckpt")
    assert (tmp_path / "after.ckpt").exists()


def test_they_are_the_package_s_own_kinds(package, ours):
    framework = _framework.load(package)
    assert issubclass(ours["CommHubDDPStrategy"], framework.ddp)
    assert issubclass(ours["CommHubCallback"], framework.callback)


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(_framework.util, "find_spec", lambda name: None)
    with pytest.raises(commhub.PluginError, match=r"pip install 'commhub-lightning\[pytorch-lightning\]'"):
        _framework.load("pytorch_lightning")


def test_a_version_out_of_bounds_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(_framework.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_framework.metadata, "version", lambda name: "2.7.0")
    with pytest.raises(commhub.PluginError, match=r"lightning >=2\.6,<2\.7, and 2\.7\.0 is installed"):
        _framework.load("lightning")


def test_a_package_that_cannot_be_imported_is_named_with_its_error(monkeypatch):
    def broken(name):
        raise OSError("no such library")

    monkeypatch.setattr(_framework.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_framework.metadata, "version", lambda name: "2.6.6")
    monkeypatch.setattr(_framework, "import_module", broken)
    with pytest.raises(commhub.PluginError, match="OSError: no such library"):
        _framework.load("lightning")


def test_without_the_framework_the_package_imports_and_its_classes_say_what_to_install():
    code = (
        "import importlib.util as u, sys; u.find_spec = lambda name, package=None: None\n"
        "import commhub_lightning as c\n"
        "assert not {'lightning', 'torch.nn.lightning'} & set(sys.modules)\n"
        "try: c.CommHubCallback\n"
        "except ImportError as error: print(error)\n"
        "try: import commhub_lightning.pytorch_lightning\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one, other = done.stdout.splitlines()
    assert "pip install 'commhub-lightning[lightning]'" in one
    assert "pip install 'commhub-lightning[pytorch-lightning]'" in other


def test_the_extras_are_the_bounds_that_are_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: Requirement(line) for name, [line] in project["optional-dependencies"].items()}
    assert {name: extra.name for name, extra in extras.items()} == {name: name for name in extras}
    assert {name.replace("-", "_") for name in extras} == set(PACKAGES)
    assert {extra.specifier for extra in extras.values()} == {SpecifierSet(_framework.SUPPORTED)}


def test_the_installed_package_is_within_the_bounds(package):
    version = metadata.version(package.replace("_", "-"))
    assert version in SpecifierSet(_framework.SUPPORTED)
