"""`fedsim new`: what it writes runs as it is, tests and notebook included."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import main


SMALLER = {"rounds=5": "rounds=1", "participants=6": "participants=3", "digits()": "digits(limit=150)"}
SMALLER |= {"min_size=40": "min_size=20", "epochs=2": "epochs=1"}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["new", "my_animals"]) == 0
    said = capsys.readouterr().out
    written = {path.name for path in Path("my_animals").iterdir()}
    assert written == {"__init__.py", "method.py", "experiments.py", "test_method.py", "study.ipynb", "README.md"}
    assert all(f"written: my_animals/{name}" in said for name in written)
    assert said.splitlines()[-1].endswith(
        "fedsim sweep my_animals.experiments:suite --runtime inline --out results/my_animals"
    )
    yield tmp_path / "my_animals"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_animals"]:
        del sys.modules[name]


def smaller(study: Path) -> None:
    """Less of everything: what runs is the same."""
    text = (study / "experiments.py").read_text()
    for long, short in SMALLER.items():
        assert long in text
        text = text.replace(long, short)
    (study / "experiments.py").write_text(text)


@pytest.mark.usefixtures("uncounted", "one_thread")
def test_its_tests_pass(study: Path) -> None:
    test_method: Any = __import__("my_animals.test_method").test_method
    names = [name for name in vars(test_method) if name.startswith("test_")]
    assert len(names) == 3
    for name in names:
        getattr(test_method, name)()


def test_its_notebook_runs_and_its_suite_is_found(study: Path, capsys: pytest.CaptureFixture) -> None:
    smaller(study)
    book = json.loads((study / "study.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5 and "seeds=(0, 1, 2)" in cells[0]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell.replace("seeds=(0, 1, 2)", "seeds=(0,)"), names)
    methods = set(names["results"].runs.algorithm)
    assert methods == {"fedper", "fedavg", "fedgrow"} and (names["results"].runs.status == "finished").all()
    capsys.readouterr()
    assert main(["inspect", "my_animals.experiments:suite"]) == 0
    assert "fedper" in capsys.readouterr().out


def test_its_page_names_commands_that_there_are(study: Path) -> None:
    text = (study / "README.md").read_text()
    assert text.startswith("# my_animals") and "{{" not in text
    assert "fedsim sweep my_animals.experiments:suite" in text


@pytest.mark.parametrize(
    "name, accepted",
    [
        ("1st", "a name that Python can import"),
        ("a-b", "a name that Python can import"),
        ("class", "a name that Python can import"),
        ("../up", "a name that Python can import"),
        ("größe", "a name that Python can import"),
        ("json", "a name that no other module has"),
        ("fedsim", "a name that no other module has"),
        ("there", "one that is not there yet"),
    ],
)
def test_names_that_cannot_be_are_refused(
    name: str, accepted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    assert main(["new", name]) == 2
    assert f"NAME={name!r}: must be {accepted}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and Path("there").read_text() == "mine"
