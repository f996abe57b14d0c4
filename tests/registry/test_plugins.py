"""Whatever is wrong with a plugin becomes a PluginError of that plugin, from the original."""

import pytest

from commhub import PluginError
from commhub.registry import _index
from commhub.registry._loading import load_specs

BROKEN = {
    "import error": ("import no_such_module_at_all", ModuleNotFoundError),
    "syntax error": ("def broken(:\n", SyntaxError),
    "SystemExit": ("raise SystemExit(3)", SystemExit),
    "other BaseException": ("class Out(BaseException): pass\nraise Out('x')", BaseException),
    "no implementation": ("", LookupError),
    "spec of the wrong shape": (
        "from commhub import HookSpec, hookimpl\n"
        "@hookimpl\ndef commhub_hooks(): return [HookSpec(name='BAD', summary='x', factory='a:b')]",
        ValueError,
    ),
    "not a list": ("from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(): return 3", TypeError),
    "a generator": ("from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(): yield 3", TypeError),
    "list of names": (
        "from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(): return ['some']",
        TypeError,
    ),
    "averager among hooks": (
        "from commhub import AveragerSpec, hookimpl\n@hookimpl\n"
        "def commhub_hooks(): return [AveragerSpec(name='some', summary='x', factory='a:b')]",
        TypeError,
    ),
    "raises when asked": (
        "from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(): raise RuntimeError('x')",
        RuntimeError,
    ),
    "arguments that do not exist": (
        "from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(registry): return []",
        Exception,
    ),
    "unknown extension point": (
        "from commhub import HookSpec, hookimpl\n@hookimpl\ndef commhub_compressors(): return []\n"
        "@hookimpl\ndef commhub_hooks(): return [HookSpec(name='some', summary='x', factory='a:b')]",
        Exception,
    ),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_plugin_is_a_plugin_error_from_the_original(site, reason):
    source, original = BROKEN[reason]
    site.add("some-dist", "some", version="1.2", source=source)
    with pytest.raises(PluginError, match=r"some-dist 1\.2 cannot be used") as caught:
        load_specs(_index.claims())
    assert isinstance(caught.value.__cause__, original)
    assert "\n" not in str(caught.value)


def test_ctrl_c_is_not_swallowed(site):
    site.add("some-dist", "some", source="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_specs(_index.claims())


def test_specs_come_by_name_and_of_both_kinds(site):
    site.add("some-dist", "some", averagers=["often"])
    specs = load_specs(_index.claims())
    assert {name: spec.kind for name, spec in specs.items()} == {"some": "hook", "often": "averager"}


def test_one_implementation_is_enough(site):
    source = """
        from commhub import HookSpec, hookimpl
        @hookimpl
        def commhub_hooks():
            return (HookSpec(name="some", summary="x", factory="a:b"),)
    """
    site.add("some-dist", "some", source=source)
    assert list(load_specs(_index.claims())) == ["some"]


def test_an_announced_name_without_a_spec_is_broken(site):
    site.add("some-dist", "some", announce=["some", "ghost"])
    with pytest.raises(PluginError, match="announce hook ghost, the specs do not"):
        load_specs(_index.claims())


def test_a_spec_that_is_not_announced_is_broken(site):
    site.add("some-dist", "some", "hidden", announce=["some"])
    with pytest.raises(PluginError, match="declare hook hidden, the entry points do not"):
        load_specs(_index.claims())


def test_a_hook_announced_as_an_averager_is_broken(site):
    site.add("some-dist", averagers=["some"], announce=["some"])
    with pytest.raises(PluginError, match="announce hook some"):
        load_specs(_index.claims())


def test_a_name_announced_twice_is_broken(site):
    site.add("some-dist", "my_hook", announce=["my_hook", "my-hook"])
    with pytest.raises(PluginError, match="announce hook my_hook"):
        load_specs(_index.claims())


def test_an_entry_point_names_a_module(site):
    site.add("some-dist", "some", announce=[])
    points = site.path / "some_dist-1.0.dist-info" / "entry_points.txt"
    points.write_text("[commhub.hooks.v1]\nsome = some_dist_specs:Some\n")
    _index.refresh()
    with pytest.raises(PluginError, match="must name a module"):
        load_specs(_index.claims())
