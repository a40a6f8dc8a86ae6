"""Requests that are mostly wrong: a valid one of some command, of which a few words are changed for nasty ones."""

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.suites import tiny
from fedsim.cli import parser
from fedsim.experiment import Experiment, with_settings
from tests.fuzz import experiments
from tests.support.disturbed import TINY_SETTINGS
from tests.support.every_field import fields_of
from tests.support.inline_runs import inline


TINY = "benchmarks.suites:tiny"
LONG = "x" * 5000
BOMB = "[" * 20_000 + "]" * 20_000
NUMBERS = (
    *("0", "-1", "1", "2", "1.5", "1e-300", "-1e-300", "1e300", "-1e300", "nan", "inf", "-inf", "1e400", "3j", "1_0"),
    *(
        str(sign * size)
        for sign in (1, -1)
        for size in (999, 4096, 65536, 10**5, 10**6, 2**31, 2**53, 2**63, 10**20, 10**400)
    ),
)
TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\t",
        "x",
        "wrong",
        "None",
        "True",
        "ünï",
        "\u202eabc",
        "\x1b[31mred",
        "\udcff",
        "a\0b",
        "~",
        "../",
    ),
    *("[", "]", "[1", "[]", "()", "{}", "{1: 2}", "[[1]]", "(1, 2)", "['a']", "b'x'", "lambda: 1", "__import__('os')"),
    *(
        LONG,
        BOMB,
        "-" * 5000 + "1",
        "9" * 5000,
        "1+1j",
        "[" + "1," * 3000 + "]",
        "'a'*3",
        "...",
        "0x" + "f" * 5000,
        "--set",
        "=",
        "a=b",
    ),
)
PATHS = (
    *("", " ", ".", "/", "~", "~nobody/x", "~/x", "../x", "missing/x", "file.txt", "file.txt/x", "empty", "loop"),
    *("results", "damaged", "halved", "locked", "a\0b", LONG, "/dev/null", "/dev/null/x", "/proc/self/mem", "ünï"),
    *("\udcff", "s3://", "s3:///x", "gs://", "http://x/y", "s3://user:secret@bucket/x", "file://x", "-x", "x.html"),
)
TARGETS = (
    *(TINY, "benchmarks.suites:quick", *(f"tests.fuzz.experiments:{name}" for name in experiments.TARGETS)),
    *("", ":", "x", "x:", ":x", "a:b:c", ".x:y", "..", "benchmarks.suites:tinny", "benchmarks.suites:__doc__"),
    *("benchmarks.suites:tiny.x", "no_such:x", "os:getcwd", "sys:exit", "builtins:list", "benchmarks:suites", "a b:c"),
    *("mine:raises", "mine:leaves", "mine:nothing", "mine:mixed", "mine:prints", "mine:asks", "mine:interrupts"),
    *("mine:forever", "mine:empty", "broken:x", "needs:x", "leaving:x", "file.txt:x", "./mine.py:raises", "mine.py:x"),
    *("a\0b:c", f"{LONG}:x", f"mine:{LONG}", "\udcff:x", "ünï:x", "mine:ünï", "__main__:x", "fedsim.cli:main"),
)
NOWHERE = (
    *("tiers.9.num_gpus", "tiers.-1.share", "tiers.x.share", "tiers.0.0", "rounds.x", "algorithm.lr.x", "algorithm."),
    *(
        "",
        ".",
        "..",
        ".rounds",
        "rounds.",
        "run_id",
        "algorithm.__class__",
        "task.data.name.x",
        "roundz",
        "ünï",
        "a\0b",
    ),
    *(LONG, ".".join("a" * 2000), "task.settings.0", "task.settings.vocab_size", "tiers.0.device.flops"),
    *("tiers.0.checkpoint.path", "tiers.0.checkpoint", "conditions.x", "target.form.width", "Experiment.rounds"),
)
MINE = """
import sys
from benchmarks.suites import tiny
def raises(): raise ZeroDivisionError("two\\nlines")
def leaves(): sys.exit(7)
def nothing(): return None
def mixed(): return [tiny(), 3]
def prints():
    print("hello")
    return tiny()
def asks(needed): return tiny()
def interrupts(): raise MemoryError
def forever(): return forever()
def empty(): return []
"""


@dataclass(frozen=True)
class Request:
    """`words`: what is typed. `names`: the options and fields that were changed, of which a refusal must name one."""

    words: tuple[str, ...]
    names: tuple[str, ...]


def workspace(folder: Path, experiment: Experiment) -> None:
    """What `PATHS` and `TARGETS` lead to: a folder in which requests are made."""
    inline(experiment, folder / "results")
    for name in ("damaged", "halved"):
        shutil.copytree(folder / "results", folder / name)
    (run,) = (folder / "damaged" / "runs").iterdir()
    run.write_bytes(run.read_bytes()[:100])
    shutil.rmtree(folder / "halved" / "checkpoints")
    (folder / "empty").mkdir()
    (folder / "home").mkdir()
    (folder / "file.txt").write_text("a file")
    (folder / "loop").symlink_to("loop")
    (folder / "locked").mkdir(mode=0o500)
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("def x(:\n")
    (folder / "needs.py").write_text("import no_such_module_anywhere\n")
    (folder / "leaving.py").write_text("import sys\nsys.exit('bye')\n")


def every_field() -> dict[str, tuple[str, ...]]:
    """Target -> the dotted paths of its experiment's fields."""
    found = {TINY: with_settings(tiny(), TINY_SETTINGS)}
    found |= {f"tests.fuzz.experiments:{name}": getattr(experiments, name)() for name in experiments.TARGETS}
    return {target: tuple(path for path, _ in fields_of(experiment)) for target, experiment in found.items()}


FIELDS = every_field()
ALIASES = {"limit": ("examples",)}  # what a message may call a field that decides it
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(PATHS), st.text(max_size=8))


@st.composite
def settings(draw: st.DrawFn, target: str) -> Request:
    """One `--set`."""
    path = draw(st.one_of(*[st.sampled_from(FIELDS.get(target, FIELDS[TINY]))] * 6, st.sampled_from(NOWHERE)))
    setting = f"{path}={draw(VALUES)}" if draw(st.integers(0, 30)) else draw(st.sampled_from(TEXTS))
    path, equals, _ = setting.partition("=")
    if not equals or not path:
        return Request(("--set", setting), ("--set",))
    parts = path.split(".")
    last = next((part for part in reversed(parts) if not part.isdigit()), path)
    nowhere = [f"--set {'.'.join(parts[: end + 1])}:" for end in range(len(parts))]
    return Request(("--set", setting), (last, *ALIASES.get(last, ()), *nowhere))


def _option_value(action: argparse.Action) -> st.SearchStrategy[str]:
    if action.type in (int, float):
        return st.one_of(*[st.sampled_from(NUMBERS)] * 3, st.sampled_from(TEXTS))
    if str(action.metavar).startswith(("DIR", "FILE", "FOLDER")):
        return st.one_of(*[st.sampled_from(PATHS)] * 3, st.sampled_from(TEXTS))
    if "MODULE" in str(action.metavar):
        return st.sampled_from(TARGETS)
    return st.one_of(st.sampled_from(TEXTS), st.sampled_from(PATHS), st.sampled_from(NUMBERS))


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


COMMANDS = commands()
LEFT_OUT = ("--help", "--set", "--open", "--detach")  # what opens a browser, or is changed elsewhere
VALID = {
    "run": ("--runtime", "inline", "--out", "out", "--set", *TINY_SETTINGS),
    "sweep": ("--runtime", "inline", "--out", "out"),
    "report": ("results",),
    "inspect": (),
    "submit": ("--address", "http://127.0.0.1:9", "--out", "/tmp/out"),
    "doctor": (),
    "export": ("results", "--participant", "0", "--to", "model"),
    "clean": ("halved",),
}
WITH_TARGET = ("run", "sweep", "inspect", "submit")


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request of any command, one or two words of which are likely to be wrong."""
    name = draw(st.sampled_from([*WITH_TARGET, *VALID, "run", "run", "inspect"]))
    target = draw(st.sampled_from([*FIELDS])) if draw(st.booleans()) else TINY
    if not draw(st.integers(0, 20)):
        return Request((draw(st.sampled_from(TEXTS)),), ("COMMAND",))
    base, extra, names = list(VALID[name]), list[str](), list[str]()
    names += ["http://127.0.0.1:9: no job server"] if name == "submit" else []  # which ends all that is sent there
    changes = draw(st.integers(1, 2))
    for _ in range(changes):
        kind = draw(st.sampled_from(["set", "set", "option", "target"] if name in WITH_TARGET else ["option", "place"]))
        if kind == "set":
            change = draw(settings(target))
            extra, names = [*extra, *change.words], [*names, *change.names]
        elif kind == "target":
            target, names = draw(st.sampled_from(TARGETS)), [*names, "MODULE:FUNCTION"]
        elif kind == "place" and name != "doctor":
            base[0] = draw(st.sampled_from([path for path in PATHS if (name, path) != ("clean", "results")]))
            names += ["DIR", os.path.expanduser(base[0]) or "DIR"]
        else:
            actions = [each for each in COMMANDS[name]._actions if each.option_strings[:1]]
            actions = [each for each in actions if each.option_strings[-1] not in LEFT_OUT]
            action = draw(st.sampled_from(actions))
            option = action.option_strings[-1]
            values = [] if action.nargs == 0 else [draw(_option_value(action))]
            joined = len(values) == 1 and action.nargs is None and draw(st.booleans())
            extra += [f"{option}={values[0]}"] if joined else [option, *values]
            names += [option, f"{option[2:]}=", *(value for value in values if value in PATHS and len(value) > 2)]
    if target != TINY and "--set" in base:
        base = base[: base.index("--set")]
    words = [name, *([target] if name in WITH_TARGET else []), *base, *extra]
    return Request(tuple(words), tuple(dict.fromkeys(names)))


def encodable(request: Request) -> bool:
    """Whether a shell could pass it on: no NUL."""
    return not any("\0" in word for word in map(os.fspath, request.words))
