"""Plugins that behave badly: nothing that one does reaches the terminal, the answer, or another plugin's row."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import commhub
from commhub._printable import visible
from commhub.cli import main
from commhub.registry import _probe

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\x9b31m\r\b\u202egnp\u200b\u2066\u2028\x85\ufe0f\U000e0041\udc80"
SPEC = """
from commhub import HookSpec, Option, hookimpl
@hookimpl
def commhub_hooks():
    return [HookSpec(name={name!r}, summary={summary}, factory='a:b', {fields})]
"""


def spec(name, summary="'A test plugin.'", fields=""):
    return SPEC.format(name=name, summary=summary, fields=fields)


def run(*args):
    return CliRunner().invoke(main, args, catch_exceptions=False)


def is_clean(text):
    return visible(text, keep="\n\t") == text


# What is printed


def test_what_a_plugin_says_is_printed_escaped_and_aligned(site):
    site.add("a-dist", "first", source=spec("first", repr(HOSTILE)))
    site.add("b-dist", "second", source=f"raise RuntimeError({HOSTILE!r})")
    site.add("c-dist", "third")
    listed = run("list").output
    assert is_clean(listed)
    assert r"\x1b[2J" in listed
    assert r"\u202egnp\u200b" in listed
    assert len(listed.splitlines()) == 4
    assert is_clean(run("doctor").output)


def test_json_has_the_true_text(site):
    site.add("a-dist", "first", source=spec("first", repr(HOSTILE)))
    output = run("list", "--json").output
    assert output.isascii()
    assert json.loads(output)[0]["summary"] == HOSTILE
    assert json.loads(run("doctor", "--json").output)[0]["summary"] == HOSTILE


def test_info_escapes_each_field(site):
    text = repr(HOSTILE)
    fields = (
        f"options=[Option(name='mode', type=str, default={text}, choices=[{text}, 'b'], help={text}),"
        f" Option(name='map', type=dict, default={{{text}: {text}}})],"
        f"reference={text}, sent_bytes={text}, needs=[{text}], devices=[{text}], example={{'mode': {text}}}"
    )
    site.add("a-dist", "first", source=spec("first", text, fields))
    output = run("info", "first").output
    assert is_clean(output)
    for title in ("needs", "devices", "sends", "reference"):
        assert re.search(rf"^{title} +\\x1b\[2J", output, re.MULTILINE)
    (row,) = json.loads(run("info", "first", "--json").output)
    assert (row["reference"], row["options"][0]["help"]) == (HOSTILE, HOSTILE)


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_hostile_metadata_is_escaped_and_harms_nobody(site, file):
    site.add("a-dist", "first")
    site.add("c-dist", "third")
    hostile = HOSTILE.encode("utf-8", "surrogatepass").decode("utf-8", "replace").replace("\r", "").replace("\x85", "")
    path = site.path / "a_dist-1.0.dist-info" / file
    path.write_text(path.read_text().replace("1.0", hostile).replace("first =", f"first{hostile} ="))
    commhub.registry._registry.refresh()
    assert is_clean(run("list").output)
    assert is_clean(run("doctor").output)
    assert is_clean(run("info", f"first{hostile}").stderr)
    assert [row.name for row in commhub.installed() if row.status == "ok"] == ["third"]


def test_columns_stay_aligned_after_wide_characters(site):
    site.add(
        "a-dist",
        "first",
        averagers=["often"],
        fields="sent_bytes='x', options=[Option(name='n', type=str, "
        "default='宽', help='one.'), Option(name='m', type=str, default='ab', help='two.')]",
    )
    lines = run("info", "first").output.splitlines()
    one, two = (next(line for line in lines if line.endswith(end)) for end in ("one.", "two."))
    assert one.index("one.") + 1 == two.index("two.")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_cannot_show_is_escaped_too(site, encoding):
    site.add("a-dist", "first", source=spec("first", "'10 € für 宽'"))
    for command in (["list"], ["info", "first"], ["list", "--json"]):
        done = in_process(site, command, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        assert b"u20ac" in done.stdout


def test_the_generated_module_holds_names_alone(site, tmp_path):
    hostile = '"; import os; os._exit(9)  #'
    site.add("a-dist", "some", source="raise SystemExit", announce=["some", hostile, "_sunder_", "été", "__x__"])
    path = tmp_path / "names.py"
    assert run("enum", "--write", str(path)).exit_code == 0
    assert "os._exit" not in path.read_text()
    assert [member.value for member in commhub.HookType] == ["some"]
    shell = ShellComplete(main, {}, "commhub", "_COMMHUB_COMPLETE")
    assert [item.value for item in shell.get_completions(["info"], "")] == ["some"]


# What cannot be printed, compared or called

EVIL = """
class Evil:
    def __repr__(self): raise RuntimeError("no repr")
    __str__ = __hash__ = __eq__ = __lt__ = __iter__ = __len__ = __bool__ = __repr__
class Text(str):
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __hash__ = __len__ = isascii = strip = split = isprintable = encode = __format__ = __str__
class Number(int):
    def __repr__(self): raise RuntimeError("no number")
class Meta(type):
    @property
    def __name__(cls): raise RuntimeError("no name")
    def __repr__(cls): raise RuntimeError("no repr")
"""
BROKEN = {
    "str raises": "class E(Exception):\n    def __str__(self): raise ValueError('x')\nraise E",
    "str exits": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    "str returns a number": "class E(Exception):\n    def __str__(self): return 3\nraise E",
    "str returns hostile text": EVIL + "class E(Exception):\n    def __str__(self): return Text('x')\nraise E",
    "enormous message": "raise RuntimeError('x' * 10**8)",
    "class without a name": EVIL + "class E(Exception, metaclass=Meta): pass\nraise E",
    "class with a hostile name": f"raise type({HOSTILE[:4]!r}, (Exception,), {{}})('x')",
    "GeneratorExit": "raise GeneratorExit",
    "MemoryError": "raise MemoryError",
    "endless recursion": "def f(): f()\nf()",
    "a hostile answer": EVIL + "from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(): return Evil()",
    "hostile specs": EVIL + "from commhub import hookimpl\n@hookimpl\ndef commhub_hooks(): return [Evil()]",
    "a generator that raises": "from commhub import hookimpl\n@hookimpl\ndef commhub_hooks():\n    yield 1 / 0",
    "a hostile summary": EVIL + spec("bad", "Evil()"),
    "a hostile default": EVIL + spec("bad", fields="options=[Option(name='o', type=dict, default={'a': Evil()})]"),
    "a hostile key": EVIL + spec("bad", fields="options=[Option(name='o', type=dict, choices=[{Number(1): Evil()}])]"),
    "a number without end": spec("bad", fields="options=[Option(name='o', type=int, default=10**5000)]"),
    "no number": spec("bad", fields="options=[Option(name='o', type=float, default=float('nan'))]"),
    "a subclass that raises": "from commhub import HookSpec, hookimpl\nclass S(HookSpec):\n    @property\n"
    "    def summary(self): raise RuntimeError('no')\n    @summary.setter\n    def summary(self, value): pass\n"
    "@hookimpl\ndef commhub_hooks(): return [S(name='bad', summary='x', factory='a:b')]",
    "a spec that was changed": spec("bad").replace("return", "x =") + "    object.__setattr__(x[0], 'summary', 3)\n"
    "    return x",
    "a spec without fields": "from commhub import HookSpec, hookimpl\n@hookimpl\n"
    "def commhub_hooks(): return [HookSpec.__new__(HookSpec)]",
    "the same spec twice": spec("bad")
    + "_f = commhub_hooks\n".replace("_f", "first")
    + "@hookimpl\ndef commhub_hooks(): return first() * 2",
    "100,000 specs": spec("bad").replace("return [", "return 100_000 * ["),
    "attributes that raise": "def __getattr__(name): raise RuntimeError('no')\ndef __dir__(): raise RuntimeError('no')",
}
FINE = {
    "texts that raise": EVIL
    + spec(
        "bad",
        "Text('fine')",
        "reference=Text('fine'), needs=[Text('x')], "
        "options=[Option(name='o', type=int, default=Number(3), help=Text('h'))]",
    ),
    "prints": "print('x')\nimport os; os.write(2, b'x')\n" + spec("bad"),
    "warns": "import warnings; warnings.warn('x')\n" + spec("bad"),
    "forgets sys.path": "import sys; sys.path[:] = []\n" + spec("bad"),
    "another sys.path": "import sys; sys.path = ['/nowhere', None]\n" + spec("bad"),
    "goes elsewhere": "import os; os.chdir('/')\n" + spec("bad"),
    "replaces stdout": "import io, sys; sys.stdout = io.StringIO(); sys.stderr = None\n" + spec("bad"),
    "keys that JSON lacks": spec(
        "bad",
        fields="options=[Option(name='o', type=dict, default={(1, 2): 1e999}), "
        "Option(name='p', type=float, default=1e999)]",
    ),
}


@pytest.mark.filterwarnings("ignore:x:UserWarning")
@pytest.mark.parametrize("what", [*BROKEN, *FINE])
def test_a_bad_plugin_is_one_row(site, what, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = {**BROKEN, **FINE}[what]
    site.add("bad-dist", "bad", source=source)
    site.add("some-dist", "some")
    here = os.getcwd()
    listed = run("list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["name", "bad", "some"]
    assert max(map(len, listed)) < 30_000
    rows = json.loads(run("list", "--json").stdout)
    assert [row["status"] for row in rows] == ["broken" if what in BROKEN else "ok", "ok"]
    assert run("info", "bad").exit_code == (1 if what in BROKEN else 0)
    json.loads(run("info", "bad", "--json").output, parse_constant=pytest.fail)
    assert "some" in commhub.hooks()
    assert os.getcwd() == here


def test_doctor_says_of_each_what_list_says(site, monkeypatch):
    monkeypatch.setattr(_probe, "_LIMIT", 20)
    more = {
        "ends": "import os; os._exit(0)",
        "crashes": "import os; os.kill(os.getpid(), 11)",
        "interrupts": "raise KeyboardInterrupt",
        "closes": "import os; os.closerange(0, 999); 1 / 0",
    }
    sources = {name: BROKEN[name] for name in ("str raises", "enormous message")} | more
    for index, source in enumerate(sources.values()):
        site.add(f"bad-{index}", f"bad_{index}", source=source)
    site.add("some-dist", "some")
    rows = json.loads(run("doctor", "--json").output)
    assert [row["status"] for row in rows] == ["broken"] * len(sources) + ["ok"]


LINGERS = {
    "a process that keeps the pipe": "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n",
    "a thread without end": "import threading, time\nthreading.Thread(target=time.sleep, args=(30,)).start()\n",
    "an exit handler without end": "import atexit, time\natexit.register(time.sleep, 30)\n",
    "closed descriptors": "import os; os.closerange(0, 999)\n",
}


def test_doctor_waits_for_nobody_that_a_plugin_left(site, monkeypatch):
    monkeypatch.setattr(_probe, "_LIMIT", 20)
    for index, source in enumerate(LINGERS.values()):
        site.add(f"lasting-{index}", f"lasting_{index}", source=source + spec(f"lasting_{index}"))
    assert [row["status"] for row in json.loads(run("doctor", "--json").output)] == ["ok"] * len(LINGERS)


@pytest.mark.parametrize(
    "damage",
    [
        "METADATA missing",
        "METADATA a folder",
        "not UTF-8",
        "no version",
        "no name",
        "entry points not UTF-8",
        "entry points a folder",
        "entry points a sentence",
    ],
)
def test_damaged_files_harm_nobody(site, damage):
    site.add("bad-dist", "bad")
    site.add("some-dist", "some")
    folder = site.path / "bad_dist-1.0.dist-info"
    file = folder / ("entry_points.txt" if "entry" in damage else "METADATA")
    text = file.read_text()
    file.unlink()
    if "folder" in damage:
        file.mkdir()
    elif "missing" not in damage:
        file.write_bytes(
            {
                "no version": text.replace("Version: 1.0\n", "").encode(),
                "no name": text.replace("Name: bad-dist\n", "").encode(),
                "entry points a sentence": b"[commhub.hooks.v1]\nno equals sign",
            }.get(damage, b"\xff" + text.encode())
        )
    commhub.registry._registry.refresh()
    rows = json.loads(run("list", "--json").output)
    assert rows[-1]["status"] == "ok"
    assert run("list").exit_code == 0
    expected = [] if "entry" in damage else ["incompatible"]
    assert [row["status"] for row in rows[:-1]] == expected
    if expected:
        with pytest.raises(commhub.PluginError, match="its metadata"):
            commhub.info("bad")


# Descriptor 1

WRITES = """
import atexit, os, subprocess, sys, threading, time
print("a print"); os.write(1, b"a write"); subprocess.run(["echo", "a process"])
sys.__stdout__.write("the original stdout"); sys.__stdout__.flush()
atexit.register(print, "at exit"); atexit.register(os.write, 1, b"at exit")
def busy():
    while True:
        os.write(1, b"a thread ")
        time.sleep(0.001)
threading.Thread(target=busy, daemon=True).start()
"""


def in_process(site, command, code=None, **environment):
    path = os.pathsep.join([str(site.path), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *(["-m", "commhub", *command] if code is None else ["-c", code])],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
    )


@pytest.mark.parametrize("command", [["list", "--json"], ["info", "bad", "--json"]])
def test_stdout_holds_the_answer_alone(site, command):
    site.add("bad-dist", "bad", source=WRITES + spec("bad"))
    done = in_process(site, command)
    assert "bad" in [row["name"] for row in json.loads(done.stdout)]
    for text in (b"a print", b"a write", b"a process", b"the original", b"at exit", b"a thread"):
        assert text in done.stderr


def test_a_call_gives_stdout_back(site):
    site.add("bad-dist", "bad", source="import os; os.write(1, b'noise')\n" + spec("bad"))
    code = (
        "import os; from commhub.cli import main; main(['list', 'bad'], standalone_mode=False); os.write(1, b'after')"
    )
    done = in_process(site, [], code)
    assert done.stdout.splitlines()[1:] == [b"bad   hook  bad-dist  1.0      ok      A test plugin.", b"after"]
    assert done.stderr == b"noise"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_closed_stream_is_no_error(site, closed):
    site.add("bad-dist", "bad", source="import os; os.write(1, b'noise')\n" + spec("bad"))
    shell = f"exec {sys.executable} -m commhub list {closed}"
    assert in_process(site, [], f"import os; os.execlp('sh', 'sh', '-c', {shell!r})").returncode == 0
