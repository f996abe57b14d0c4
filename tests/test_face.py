"""The public face: every name has a home, and none of it loads torch before it must."""

import importlib.util
import subprocess
import sys

import pytest

import commhub

CHECK = "; import sys; sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
WITHOUT_TORCH = [
    "import commhub",
    "import commhub; dir(commhub); commhub.__version__",
    "import commhub; commhub.HookSpec, commhub.Option, commhub.hookimpl, commhub.CommhubError, commhub.relay",
    "import commhub; commhub.installed(), commhub.hooks(), commhub.HookType",
    "import commhub.registry._hookstring, commhub.registry._enum, commhub.registry._documented_names",
    "from commhub.cli import main; main(['--help'], standalone_mode=False)",
    "from commhub.cli import main; main(['list'], standalone_mode=False)",
    "from commhub.cli import main; main(['list', '--json'], standalone_mode=False)",
    "from commhub.cli import main; main(['enum', '--write', '/dev/null'], standalone_mode=False)",
]


@pytest.mark.parametrize("code", WITHOUT_TORCH)
def test_no_torch_is_loaded(code):
    done = subprocess.run([sys.executable, "-c", code + CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_homes_is_the_public_face():
    assert sorted(commhub._HOMES) == sorted(commhub.__all__)
    assert set(commhub.__all__) <= set(dir(commhub))


@pytest.mark.parametrize("name", sorted(commhub._HOMES))
def test_every_public_name_is_found_at_its_home(name):
    if importlib.util.find_spec(commhub._HOMES[name]) is None:
        pytest.skip(f"{commhub._HOMES[name]} is not there yet")
    assert getattr(commhub, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = commhub.nothing
