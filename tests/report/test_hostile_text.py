"""Names, errors and configs of anybody's are text: on the page, in figures and on the terminal they do nothing."""

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from rich.console import Console

import fedsim
from fedsim.cli import main
from fedsim.core.terminal import say, shown
from fedsim.core.text import printable
from fedsim.report.document import write_report
from fedsim.report.terminal import print_summary
from fedsim.results.tables import SCHEMAS, read_table, rows_of, write_table
from fedsim.sweeps.profile import print_profile
from tests.report.test_report import add_quick, written


pytestmark = pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")  # characters no font has

HOSTILE = {
    "tags": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "escape": "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m",
    "markup": "[red]a[/red][link=file:///etc/passwd]b[/link][/][bold",
    "mathematics": "$\\frac{1}{$ $x_$ $\\mathdefault{",
    "lines": "one\n```\n# two\r\n| three |",
    "direction": "abc\u202edcba\u2066\u200b\ufeff",
    "nothing": "\x00\x01\x02",
    "surrogate": "x\ufffe\uffff",
    "template": "{{ 7 * 7 }}{% for x in y %}",
    "long": "m" * 5000,
    "path": "../../../../tmp/x",
    "latin": "größe ±1 · 数 🌱",
}
TEXTS = ("suite", "algorithm", "preset", "dataset", "family", "partition", "git_commit", "code_sha256", "method")
TEXTS += ("command", "data_sha256", "checkpoints_sha256", "leaves")


def poisoned(folder: Path, text: str) -> Path:
    """Two finished runs and a failed one whose every text says so."""
    add_quick(folder)
    for number, row in enumerate(rows_of(read_table(folder, "runs"), "runs")):
        changed: dict[str, Any] = {name: text for name in TEXTS} | {"error": f"{text}\n{text}"}
        changed |= {"status": "failed" if number == 2 else "finished"}
        changed |= {"config": json.dumps(json.loads(row["config"]) | {text: text, "tiers": []})}
        changed |= {name: json.dumps({text: text}) for name in ("versions", "hardware")}
        write_table(folder, "runs", row["run_id"], [row | changed])
        rounds = rows_of(read_table(folder, "rounds"), "rounds")
        own = [each | {"algorithm": text, "preset": text} for each in rounds if each["run_id"] == row["run_id"]]
        write_table(folder, "rounds", row["run_id"], own)
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_page_shows_text_as_text(kind: str, tmp_path: Path) -> None:
    path = write_report(poisoned(tmp_path, HOSTILE[kind]))
    assert isinstance(path, Path)
    html, markdown = written(path.read_text()), path.with_suffix(".md").read_text()
    tags = {*re.findall(r"<\s*/?\s*([a-zA-Z!]+)", html)}
    assert not tags & {"script", "svg", "iframe", "object", "link", "base", "form"}
    assert not re.findall(r"<img [^>]*>", html) and html.count("<img>") <= 16
    assert "49" not in re.findall(r"<title>(.*?)</title>", html)[0]
    assert not re.search(r"<[^>]*\son\w+=", html), "what would run"
    for page in (html, markdown):
        assert {character for character in page if not character.isprintable()} <= {"\n"}
    outside = re.sub(r"(?ms)^```$.*?^```$", "", markdown)
    assert "<script" not in outside and "<img" not in outside
    assert outside.count("\n# ") == 0 and outside.startswith("# ")
    for figure in (tmp_path / "report_figures").glob("*"):
        assert figure.parent.parent == tmp_path and re.fullmatch(r"\d+-[a-z-]+\.svg", figure.name)
        names = {element.tag.rpartition("}")[2] for element in ElementTree.parse(figure).iter()}
        assert not names & {"script", "foreignObject", "image", "a"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_terminal_shows_text_as_text(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system="truecolor")
    results = fedsim.load(poisoned(tmp_path, HOSTILE[kind]))
    print_summary(results, console=console)
    profile = {"run_id": ["x"], "algorithm": [HOSTILE[kind]], "round": [0], "place": [HOSTILE[kind]]}
    phases = {f"{phase}_seconds": [1.0] for phase in ("broadcast", "compute", "sum", "write", "idle")}
    print_profile(pd.DataFrame(profile | phases), console)
    say(console, HOSTILE[kind])
    own = r"\x1b\[[\d;]*m"  # styles of our own
    text = re.sub(own, "", out.getvalue())
    assert all(character.isprintable() or character in "\n\t" for character in text)
    assert "\x1b]8" not in out.getvalue(), "a link"
    if kind == "markup":
        assert HOSTILE[kind] in text
    assert main(["report", str(tmp_path), "--reference", HOSTILE[kind].replace("\x00", "")]) in (0, 2)
    said = capsys.readouterr()
    assert all(character.isprintable() or character in "\n\t" for character in said.err)


@pytest.mark.parametrize("labels", ["5", "x", "[1]", "[[1], [1, 2]]", '[["x"]]', "[[NaN]]", "[" * 9000, "{}", "[[]]"])
def test_labels_that_are_none_are_left_out(labels: str, tmp_path: Path) -> None:
    add_quick(tmp_path)
    for row in rows_of(read_table(tmp_path, "runs"), "runs"):
        write_table(tmp_path, "runs", row["run_id"], [row | {"labels": labels}])
    write_report(tmp_path)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_plot_shows_text_as_text(kind: str, tmp_path: Path) -> None:
    figure = fedsim.load(poisoned(tmp_path, HOSTILE[kind])).plot("accuracy_mean", against="MB")
    figure.savefig(tmp_path / "plot.svg")
    ElementTree.parse(tmp_path / "plot.svg")


def test_what_is_printable_stays() -> None:
    for text in ("größe ±1 · 数 🌱", "a\tb\nc", "[a] $b$", "", "\u2009thin\u00a0"):
        assert printable(text) == text and shown(text).plain == text
    assert printable("\x1b[2J\r\u202e") == "\\x1b[2J\\r\\u202e"


def test_every_text_column_is_poisoned() -> None:
    texts = {field.name for field in SCHEMAS["runs"] if str(field.type) == "string"}
    assert texts - {*TEXTS} == {
        "run_id", "status", "error", "versions", "hardware", "config", "model", "federation_sha256", "labels"
    }  # fmt: skip
