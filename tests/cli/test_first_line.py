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
from fedsim.cli import main
main()
"""


@pytest.mark.parametrize("runtime, line", [("inline", "importing torch"), ("ray", "starting Ray, importing torch")])
@pytest.mark.parametrize("words", [["run", "benchmarks.suites:tiny"], ["sweep", "--suite", "tiny"]])
def test_the_first_line_comes_before_torch_is_imported(
    tmp_path: Path, runtime: str, line: str, words: list[str]
) -> None:
    program = [sys.executable, "-c", PROGRAM, *words, "--runtime", runtime, "--out", str(tmp_path)]
    said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    assert said == f"{line}\ntorch is imported\n"
