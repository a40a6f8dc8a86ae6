"""Code that the user names: found where the command is typed, and blamed by file and line."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.core.modules import called, check_shadowed, module_named
from fedsim.experiment import load_experiments
from fedsim.runtime import Choice


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a command is typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_a_module_here_is_found_and_is_looked_for_last(here: Path) -> None:
    (here / "only_here_1.py").write_text("VALUE = 3\n")
    assert module_named("only_here_1", "x").VALUE == 3
    assert sys.path[-1] == str(here) and sys.path[0] != str(here)


@pytest.mark.parametrize("name", ["random", "torch", "datasets", "sys", "benchmarks"])
def test_a_module_here_with_the_name_of_another_is_refused(name: str, here: Path) -> None:
    (here / f"{name}.py").write_text("raise AssertionError('must not be imported')\n")
    with pytest.raises(ValueError, match=f"^it: .*{name}.py has the name of .*: rename it"):
        module_named(f"{name}.x", "it")


@pytest.mark.parametrize("name", ["random.py", "torch/__init__.py"])
def test_a_folder_in_which_workers_would_find_another_module_is_refused(name: str, here: Path) -> None:
    (here / "study.py").write_text("")
    (here / "numpy").mkdir()  # a folder of results, say
    check_shadowed()
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text("raise AssertionError('must not be imported')\n")
    with pytest.raises(ValueError, match=f"^{here / name} has the name of .*: rename it"):
        Choice("ray")()


@pytest.mark.parametrize(
    "text, words",
    [
        ("1 / 0\n", ["ZeroDivisionError: division by zero", "line 1"]),
        ("\ndef x(:\n", ["SyntaxError", "line 2"]),
        ("import no_such_module_2\n", ["No module named 'no_such_module_2'"]),
        ("from json import no_such_name\n", ["no_such_name", "line 1"]),
        ("import sys\n\nsys.exit('bye')\n", ["ends the process", "bye", "line 3"]),
        ("def f(): return f()\nf()\n", ["RecursionError"]),
        ("raise MemoryError\n", ["MemoryError"]),
    ],
)
def test_what_goes_wrong_in_it_is_said_with_its_line(text: str, words: list[str], here: Path) -> None:
    name = f"wrong_{abs(hash(text))}"
    (here / f"{name}.py").write_text(text)
    with pytest.raises(ValueError, match=f"^--x='{name}': ") as refusal:
        module_named(name, f"--x={name!r}")
    for word in words:
        assert word in str(refusal.value)
    assert "No module" in words[0] or f"{name}.py" in str(refusal.value)


def test_an_interrupt_is_no_fault_of_the_module() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called(interrupted, "x")


def test_a_function_is_blamed_with_what_it_returns(here: Path) -> None:
    (here / "returns_3.py").write_text("def number():\n    return 3\n\n\ndef fails():\n    raise ValueError('a\\nb')\n")
    with pytest.raises(ValueError, match=r"returns_3:number.*an Experiment or a list of them, not 3"):
        load_experiments("returns_3:number")
    with pytest.raises(ValueError, match=r"(?s)returns_3:fails': a\nb \(.*returns_3.py, line 6\)"):
        load_experiments("returns_3:fails")


def test_libraries_are_not_taken_from_the_folder_where_python_m_fedsim_is_typed(tmp_path: Path) -> None:
    for name in ("argparse", "random", "torch", "rich", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('the wrong one')\n")
    (tmp_path / "mine.py").write_text("from benchmarks.suites import tiny as mine\n")
    command = [sys.executable, "-m", "fedsim", "inspect", "mine:mine", "--set", "rounds=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: rounds=0: must be at least 1\n")
