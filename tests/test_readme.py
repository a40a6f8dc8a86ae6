"""The README says what is there: its tree, its commands, its words."""

import ast
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.readme_figure import markdown
from fedsim.cli import main
from fedsim.cli import parser as fedsim_parser
from fedsim.data import DataConfig
from fedsim.experiment import load_experiments, with_settings
from fedsim.learning.objectives import TaskLoss
from fedsim.learning.task import Task, TaskConfig
from fedsim.learning.training import Training
from fedsim.models import Form
from fedsim.report.readings import by_setting
from fedsim.report.tables import cells


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
        text = (ROOT / path).read_text() if path.endswith(".py") else ""
        assert not text.strip() or text.startswith('"""'), path


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


def csv_and_images(folder: Path) -> None:
    """What the pages on data and on training say lies beside `my_study.py`."""
    rows = "".join(f'"Review ""{i}"", of a book",{i % 5 + 1}\n' for i in range(100))
    (folder / "reviews.csv").write_text("review,stars\n" + rows)
    for number, (split, name) in enumerate(itertools.product(("train", "test"), ("cat", "dog") * 30)):
        (folder / "animals" / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, 0, 9)).save(folder / "animals" / split / name / f"{number}.jpg")


@pytest.mark.parametrize(
    ("page", "function", "said"),
    [
        ("data", "reviews", "80 + 20 texts; 0.0 % reach 256 tokens, where they are cut"),
        ("data", "animals", "60 + 60 images, 40x30 colour -> 32x32 colour"),
        ("training", "animals", "60 + 60 images, 40x30 colour -> 32x32 colour"),
    ],
)
def test_a_page_begins_with_a_study_that_runs(
    page: str,
    function: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_study.py").write_text(program)
    csv_and_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_study", raising=False)
    for words in commands(text, "fedsim"):
        options = fedsim_parser().parse_args(words)
        for target in [options.target] if "target" in options else getattr(options, "targets", []):
            if target.startswith("my_study"):
                assert with_settings(load_experiments(target)[0], options.settings)
    assert main(["run", f"my_study:{function}", "--runtime", "inline", "--set", "rounds=1"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    monkeypatch.delitem(sys.modules, "my_study")


def test_the_page_on_data_has_every_field_and_its_default() -> None:
    found = {}
    for line in (ROOT / "docs" / "data.md").read_text().splitlines():
        names, defaults = (
            [cell.strip().strip("`") for cell in cells.split("`, `")] for cells in (line.split("|") * 3)[1:3]
        )
        if names[0] in {field.name for field in dataclasses.fields(DataConfig)}:
            found |= dict(zip(names, map(ast.literal_eval, defaults), strict=True))
    assert found == {field.name: field.default for field in dataclasses.fields(DataConfig)}


def test_the_worked_example_of_a_warm_up() -> None:
    asked = Training(
        TaskLoss(Task(TaskConfig()), Form(8, 1)),
        {},
        purpose="local",
        lr=1.0,
        epochs=2,
        batch_size=16,
        schedule="linear",
        lr_warmup=0.1,
    )
    factors = [asked.scheduled(step, 14) for step in range(14)]
    assert factors == pytest.approx([1 / 2, 1, *((12 - step) / 12 for step in range(12))])


def figures() -> dict[str, list[Any]]:
    """What `readme_figure.py` wrote of the demo's results, by setting."""
    return by_setting(json.loads((ROOT / "docs" / "quick.json").read_text()))


def test_its_tables_are_the_demos_results():
    found = re.findall(r"\*\*(quick: [^*]+)\*\*\n\n((?:\|[^\n]*\n)+)", README)
    assert [name for name, _ in found] == [*figures()]
    for name, table in found:
        assert table.strip() == markdown(cells(figures()[name]))


def test_it_says_no_more_than_its_tables():
    """Differences to the reference, with their intervals, and whether any is significant, are the numbers' own."""
    shown, _, hidden = README.partition("**What it shows.**")[2].partition("**What it does not show**")
    settings = dict(zip((", from " in name for name in figures()), figures().values(), strict=True))
    for text, rows in ((shown, settings[True]), (hidden.partition("## ")[0], settings[False])):
        said = re.findall(r"\(?`([^`]+)`\)? (?:is )?([+-]\d+\.\d) ± (\d+\.\d)", text)
        for method, mean, half in said:
            (row,) = [row for row in rows if row["method"] == method]
            assert f"{100 * row['accuracy_difference']:+.1f}" == mean, method
            assert f"{100 * row['accuracy_difference_ci']:.1f}" == half, method
        assert len(said) == text.count(" ± ") - (text is shown), "every interval is held against its number"
        significant = [row["method"] for row in rows if row["accuracy_p"] < 0.05]
        assert ("none of these is significant" in text) == (text is shown and not significant)
    grown = next(row for row in settings[True] if row["method"] == "fedgrow (preserving)")
    assert f"brings everyone to {100 * grown['accuracy']:.1f} ± {100 * grown['accuracy_ci']:.1f} %" in shown
    bytes_ = {row["method"]: row["total_mb"] for row in settings[True]}
    assert f"{100 * bytes_['fedit'] / bytes_['fedgrow (preserving)']:.0f} % of the bytes" in shown
    assert f"{100 * grown['saved']:.0f} % fewer bytes" in shown.replace("\n", " ")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_its_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"    make {target}" in README and re.search(rf"^{target}:", makefile, re.M)
