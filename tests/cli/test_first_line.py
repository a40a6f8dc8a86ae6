"""What a command does is said before it takes long."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
COMMAND
"""
FEDSIM = "from fedsim.cli import main; main()"
SWEEP = "import runpy; runpy.run_path('benchmarks/sweep.py', run_name='__main__')"


@pytest.mark.parametrize("runtime, line", [("inline", "importing torch"), ("ray", "starting Ray, importing torch")])
@pytest.mark.parametrize(
    "command, words",
    [(FEDSIM, ["run", "benchmarks.suites:tiny"]), (FEDSIM, ["sweep", "--suite", "tiny"]), (SWEEP, [])],
)
def test_the_first_line_comes_before_torch_is_imported(
    tmp_path: Path, runtime: str, line: str, command: str, words: list[str]
) -> None:
    program = [
        sys.executable,
        "-c",
        PROGRAM.replace("COMMAND", command),
        *words,
        "--runtime",
        runtime,
        "--out",
        str(tmp_path),
    ]
    said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    assert said == f"{line}\ntorch is imported\n"
