"""The study of when growing together helps: its parts, the answers to its questions, and what the page shows."""

import json
import math
from typing import Any

import pytest

from benchmarks import when_it_helps
from benchmarks.study import FORMS, PARTS
from benchmarks.when_it_helps import PAGE, TABLES, answers, draw, gathered, overview, verdict
from fedsim.report.readings import by_setting, read


OURS = "fedgrow_lowrank (preserving)"


def runs_of(method: str, leaves: str, scores: list[float]) -> list[dict[str, Any]]:
    found = {"method": method, "algorithm": method.split()[0], "leaves": leaves}
    return [found | {"seed": seed, "equal_bytes_accuracy": score} for seed, score in enumerate(scores)]


def test_questions_and_their_answers() -> None:
    """Differences of the adapter: 9, 10, 11 points: t = 10 / (1 / sqrt 3), p = 0.0033, twice that with two rivals."""
    runs = [
        *runs_of(OURS, "operator", [0.5, 0.5, 0.5]),
        *runs_of("fedgrow_core (preserving)", "adapter", [0.9, 0.9, 0.91]),
        *runs_of("fedit", "adapter", [0.59, 0.6, 0.61]),
        *runs_of("fedavg", "model", [0.2, 0.5, 0.8]),
    ]
    found = answers(runs, OURS)
    assert {question: {*rivals} for question, rivals in found.items()} == {"P": {"fedit"}, "A": {"fedit", "fedavg"}}
    fedit = found["A"]["fedit"]
    assert (round(fedit.difference.mean, 9), fedit.difference.n) == (0.1, 3)
    assert math.isclose(found["P"]["fedit"].p, 0.00331, rel_tol=0.01) and math.isclose(fedit.p, 0.00662, rel_tol=0.01)
    assert verdict(found, "P") == verdict(found, "A") == "behind fedit"


@pytest.mark.parametrize(
    "fedit, fedavg, expected",
    [
        ([0.41, 0.4, 0.39], [0.31, 0.3, 0.29], "best"),
        ([0.41, 0.4, 0.39], [0.2, 0.5, 0.8], "not told apart from the best"),
        ([0.41, 0.4, 0.39], [0.59, 0.6, 0.61], "behind fedavg"),
    ],
)
def test_what_is_said_of_a_question(fedit: list[float], fedavg: list[float], expected: str) -> None:
    runs = [
        *runs_of(OURS, "operator", [0.5] * 3),
        *runs_of("fedit", "adapter", fedit),
        *runs_of("fedavg", "model", fedavg),
    ]
    assert verdict(answers(runs, OURS), "A") == expected
    assert verdict(answers(runs, OURS), "P") == "best", "who lets a model leave is not asked about"


def test_a_panel_has_every_rival_in_it() -> None:
    runs = [*runs_of(OURS, "operator", [0.5] * 3), *runs_of("fedavg", "model", [0.59, 0.6, 0.61])]
    setting = f"study: somewhere, {next(iter(FORMS))}"
    (axes,) = draw({setting: answers(runs, OURS)}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fedavg"]


@pytest.mark.parametrize("name", PARTS)
def test_rates_of_the_study_were_tried(name: str) -> None:
    part = PARTS[name]
    for method, rate in part.rates.items():
        assert method in part.names and rate in part.tried_for(method), method
    assert len({*part.names}) == len(part.names) and {*part.wider} <= {*part.names}


def test_the_page_is_made_of_the_committed_tables() -> None:
    runs = by_setting(read(gathered(TABLES), reference=when_it_helps.REFERENCE).runs)
    page, text = json.loads(PAGE.with_suffix(".json").read_text()), PAGE.with_suffix(".md").read_text()
    assert page.keys() == runs.keys()
    assert overview(page) in text and overview(page) in (TABLES.parents[1] / "README.md").read_text()
    for setting, part in page.items():
        compared = answers(runs[setting], part["form"])
        assert part["verdicts"] == {question: verdict(compared, question) for question in ("P", "A")}
        assert {row["method"] for row in part["table"]} == {run["method"] for run in runs[setting]}
        for row in part["table"]:
            assert f"| {row['method']} | {row['leaves']} | {100 * row['accuracy']:.1f}" in text
