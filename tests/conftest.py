"""What tests are given: plugins, which are real distributions on disk, and machines, which are network namespaces."""

import contextlib
import importlib
import shutil
import subprocess
import sys
import textwrap
import uuid

import pytest

from commhub.registry import _index, _registry

HOOK = """
from commhub import AveragerSpec, HookSpec, Option, hookimpl

@hookimpl
def commhub_hooks():
    return [{hooks}]

@hookimpl
def commhub_averagers():
    return [{averagers}]
"""


class Site:
    """A directory of distributions, the only one that the index sees while a test runs."""

    def __init__(self, path):
        self.path = path

    def add(
        self,
        distribution,
        *hooks,
        averagers=(),
        version="1.0",
        requires=("commhub>=0.1,<1",),
        source=None,
        announce=None,
        fields="",
        where="",
        models=None,
    ):
        """Install a distribution; `source` replaces its spec module, `announce` its entry points' names.

        `models` are the packages whose models its module `MODULE_models` knows, and that module's source.
        """
        root = self.path / where
        module = f"{distribution.replace('-', '_')}_specs".lower()
        if source is None:
            listed = ", ".join(_spec("HookSpec", name, module, fields) for name in hooks)
            means = ", ".join(_spec("AveragerSpec", name, module, fields) for name in averagers)
            source = HOOK.format(hooks=listed, averagers=means)
        info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(textwrap.dedent(source))
        needed = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needed}")
        points = "".join(f"{name} = {module}\n" for name in (hooks if announce is None else announce))
        means = "".join(f"{name} = {module}\n" for name in averagers)
        held = ""
        if models is not None:
            packages, text = models
            self.module(f"{module}_models", text)
            held = "".join(f"{package} = {module}_models\n" for package in packages)
        (info / "entry_points.txt").write_text(
            f"[commhub.hooks.v1]\n{points}\n[commhub.averagers.v1]\n{means}\n[commhub.models.v1]\n{held}"
        )
        _registry.refresh()
        return module

    def module(self, name, source):
        """Write one more module beside the plugins."""
        (self.path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()


def _spec(kind, name, module, fields):
    return f"{kind}(name={name!r}, summary='A test plugin.', factory='{module}_factory:Made', {fields})"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site: no plugin is installed but those that the test adds."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_index, "_search_path", lambda: [str(tmp_path), str(tmp_path / "second")])
    monkeypatch.delenv("COMMHUB_DISABLE", raising=False)
    _registry.refresh()
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    _registry.refresh()


class Machines:
    """Two network namespaces, joined by one link; as a context they are there until it ends.

    Attributes:
        names: of the machines.
        addresses: of each on the link, whose device is ``eth0`` on both.
    """

    def __init__(self):
        self.names = [f"ch{uuid.uuid4().hex[:8]}" for _ in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def start(self, machine, *command, **options):
        """A process of this command on one of them."""
        return subprocess.Popen(["ip", "netns", "exec", self.names[machine], *map(str, command)], **options)

    def __enter__(self):
        first, second = self.names
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines():
    """Two machines with addresses, routes and a link of their own; skips where there can be none."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed here")
    made = Machines()
    try:
        made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    with contextlib.ExitStack() as stack:
        stack.push(made.__exit__)
        yield made
