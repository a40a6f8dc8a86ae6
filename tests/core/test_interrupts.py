"""Ctrl-C ends a command with one line, whatever it is at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
HEAD = "from fedsim.core import interrupts; interrupts.install(); import os, sys, time; "
LINE = "interrupted: every finished round is on disk; go on with: python -c run x --resume"


def interrupted(body: str, number: int = signal.SIGINT, times: int = 1) -> tuple[int, str, float]:
    """Run a program until it prints a line, and send it signals. **Returns:** its status, what it said, and seconds."""
    program = [sys.executable, "-c", HEAD + body, "run", "x"]
    with subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.05)
        said = process.stdout.read()
        return process.wait(60), said, time.monotonic() - began


WAITS = "print('begun', flush=True); time.sleep(60)"
IN_ORDER = "\nwith interrupts.in_order():\n  "


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "body",
    [
        WAITS,
        IN_ORDER + WAITS,
        f"{IN_ORDER}try:\n    {WAITS}\n  except BaseException: raise ImportError('a half-made module')",
        f"{IN_ORDER}try:\n    {WAITS}\n  except BaseException: time.sleep(60)",
        f"\nclass Late:\n  def __del__(self): {WAITS}\nwith interrupts.in_order(): Late()\ntime.sleep(60)",
    ],
    ids=["at once", "in order", "another error", "swallowed", "in a destructor"],
)
def test_one_line_and_the_status_of_the_signal(body: str, number: int, times: int) -> None:
    status, said, seconds = interrupted(body, number, times)
    assert status == 128 + number
    assert said == f"{LINE}\n"
    assert seconds < 5


def test_what_is_held_is_let_go_of() -> None:
    body = f"{IN_ORDER}try:\n    {WAITS}\n  finally: print('let go', flush=True)"
    assert interrupted(body)[1] == f"let go\n{LINE}\n"


def test_what_has_an_end_of_its_own_is_left_to_it() -> None:
    body = f"interrupts.give_back()\ntry:\n  {WAITS}\nexcept KeyboardInterrupt: print('mine'); sys.exit(3)"
    assert interrupted(body)[:2] == (3, "mine\n")


@pytest.mark.parametrize(
    "typed, line",
    [
        (["/usr/bin/fedsim", "run", "a:b", "--out", "my dir"], "fedsim run a:b --out 'my dir' --resume"),
        (["/x/fedsim/__main__.py", "run", "a:b", "--resume"], "fedsim run a:b --resume"),
        (["fedsim", "sweep", "--suite", "quick"], "fedsim sweep --suite quick"),
        (["benchmarks/sweep.py", "--jobs", "2"], "python benchmarks/sweep.py --jobs 2"),
        (["fedsim", "report", "out"], None),
        (["fedsim"], None),
    ],
)
def test_the_line_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, typed: list[str], line: str | None) -> None:
    from fedsim.core import interrupts

    monkeypatch.setattr(sys, "argv", typed)
    start = "interrupted: every finished round is on disk; go on with: "
    assert interrupts.said() == ("interrupted" if line is None else start + line)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["ray", "inline"])
def test_a_command_at_any_moment(tmp_path: Path, runtime: str) -> None:
    """From its first line to its rounds; after a while nothing of it is left."""
    for number, moment in enumerate((0.05, 0.3, 0.8, 1.5, 4.0, 9.0)):
        mark = f"{os.getpid()}-{runtime}-{number}"
        words = ["run", "tests.support.disturbed:small", "--set", "rounds=5000", "--runtime", runtime]
        with subprocess.Popen(
            [sys.executable, "-m", "fedsim", *words, "--out", str(tmp_path / str(number))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "FEDSIM_TEST": mark},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            wait_until_python_is_up(process.pid)
            time.sleep(moment)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 130 and time.monotonic() - began < 5, said
        assert [line for line in said if line.startswith("interrupted")] == said[-1:], said
        assert not [line for line in said if "Traceback" in line or "Error" in line]
        while started_with(mark):
            assert time.monotonic() - began < 10, started_with(mark)
            time.sleep(0.1)


def wait_until_python_is_up(pid: int) -> None:
    """Python itself answers a signal with a traceback until the command's first line."""
    while not caught(pid):
        time.sleep(0.005)


def caught(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, which Python has none for."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
    return False


def started_with(mark: str) -> list[str]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FEDSIM_TEST={mark}\0".encode() in environ.read_bytes():
                found.append((environ.parent / "cmdline").read_text())
        except OSError:
            continue
    return found
