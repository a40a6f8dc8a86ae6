"""The README says what is there: its tree, its commands, its words."""

import re
import subprocess
from pathlib import Path

import pytest

from fedsim.cli import parser as fedsim_parser
from fedsim.experiment import load_experiments, with_settings


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def tree() -> set[str]:
    """The files that docs/architecture.md names."""
    block = ARCHITECTURE.partition("## Every file")[2]
    found, folders = set(), {0: ""}
    for line in block.splitlines():
        match = re.match(r"( {4,})((?:\S+, )*\S+)(?:  +|$)", line)
        if not match:
            continue
        depth = len(match[1])
        folder = "".join(path for level, path in sorted(folders.items()) if level < depth)
        for name in match[2].split(", "):
            if name.endswith("/"):
                folders = {level: path for level, path in folders.items() if level < depth} | {depth: name}
            else:
                found.add(folder + name)
    return found


def test_tree_is_the_files_there_are():
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    tracked = {path for path in listing.splitlines() if not path.startswith("tests/")}
    named = tree() | {"README.md", "LICENSE", ".gitignore"}
    assert named | {path for path in tracked if path.endswith("/__init__.py")} == tracked and not named - tracked


def test_the_readme_names_every_room():
    block = README.partition("## Where things are")[2].partition("##")[0]
    rooms = {path.parent.name for path in (ROOT / "fedsim").glob("*/__init__.py")}
    assert rooms | {"fedsim", "fedgrow_algo", "baselines", "benchmarks", "docs", "tests"} == {
        match[1] for match in re.finditer(r"^ +(\w+)/ ", block, re.M)
    }


def test_every_module_of_the_tree_has_a_docstring():
    for path in tree():
        text = (ROOT / path).read_text()
        assert not path.endswith(".py") or not text.strip() or text.startswith('"""'), path


def commands(text: str, program: str) -> list[list[str]]:
    """Lines that call a program, comments left out."""
    lines = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith(f"    {program} ")]
    return [words[1:] for words in lines]


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_its_fedsim_commands_are_understood(page: str):
    found = commands((ROOT / page).read_text(), "fedsim")
    assert len(found) >= 4
    for words in found:
        options = fedsim_parser().parse_args(words)
        for experiment in load_experiments(options.target) if getattr(options, "target", None) else []:
            with_settings(experiment, options.settings)


def test_its_first_lines_of_python_run_as_printed(tiny_experiment, tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 12
    monkeypatch.setattr("benchmarks.suites.tiny", lambda: tiny_experiment)  # the same, smaller
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "fedgrow (paper)" in said and "difference=Interval(" in said
    assert (tmp_path / "results" / "first.svg").exists()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_its_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"    make {target}" in README and re.search(rf"^{target}:", makefile, re.M)
