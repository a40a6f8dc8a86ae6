"""What people do with a results folder: the analysis script, the report as HTML and Markdown, other readers."""

import re
import statistics
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import duckdb
import polars
import pytest

import fedsim
from baselines.fedavg import FedAvg
from benchmarks.suites import tiny
from fedgrow_algo.fedgrow import FedGrow
from fedsim.report.document import write_report
from fedsim.report.readings import records
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of Fed-Grow with and without federation and of FedAvg, computed for real."""
    directory, base = tmp_path_factory.mktemp("results"), replace(tiny(), rounds=2)
    grow = base.algorithm
    assert isinstance(grow, FedGrow)
    grow = replace(grow, local_epochs=1, small_epochs=1)
    runtime = InlineRuntime()
    for seed in (0, 1):
        for algorithm in (grow, replace(grow, federate=False), FedAvg(lr=3e-3, batch_size=32)):
            experiment = replace(base, algorithm=algorithm, seed=seed)
            run(experiment, runtime=runtime, out=directory, suite="few", command="python benchmarks/sweep.py --few")
    runtime.close()
    return directory


def test_the_analysis_script_answers_its_five_questions(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "analysis.py"), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
    assert found.returncode == 0 and not found.stderr, found.stderr
    assert re.findall(r"^(\d)\. ", found.stdout, re.MULTILINE) == list("12345")
    gain = found.stdout.partition("4. What averaging")[2].partition("5. ")[0]
    ends = [row for row in records(fedsim.load(folder).rounds) if row["round"] == 2]
    means = {
        name: statistics.fmean(row["accuracy_mean"] for row in ends if row["algorithm"] == name)
        for name in ("fedgrow", "fedgrow_no_federation")
    }
    expected = 100 * (means["fedgrow"] - means["fedgrow_no_federation"])
    assert f"{expected:.3f}".rstrip("0") in gain and gain.rstrip().endswith("2")  # two seeds
    assert "phone" in found.stdout and "worst" in found.stdout


def test_frames_are_tidy(folder: Path) -> None:
    results = fedsim.load(folder)
    assert len(results.runs) == 6 and not results.runs["run_id"].duplicated().any()
    assert not results.rounds.duplicated(["run_id", "round"]).any() and len(results.rounds) == 6 * 3
    assert not results.clients.duplicated(["run_id", "round", "client"]).any() and len(results.clients) == 6 * 3 * 3
    last = results.clients.query("round == 2").set_index(["run_id", "client"])["accuracy"].sort_index()
    assert results.deployed.set_index(["run_id", "client"])["accuracy"].sort_index().equals(last)


def test_other_readers_see_the_same(folder: Path) -> None:
    expected = statistics.fmean(row["accuracy_mean"] for row in records(fedsim.load(folder).rounds))
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT avg(accuracy_mean) FROM '{folder}/rounds/*.parquet'").fetchone()
    assert found is not None
    (by_duckdb,) = found
    by_polars = polars.read_parquet(f"{folder}/rounds/*.parquet")["accuracy_mean"].mean()
    assert by_duckdb == pytest.approx(expected, rel=1e-12) and by_polars == pytest.approx(expected, rel=1e-12)


def test_methods_of_a_suite_begin_with_the_same_small_models(folder: Path) -> None:
    results = fedsim.load(folder)
    hashes = records(results.small_models.merge(results.runs[["run_id", "algorithm", "seed"]], on="run_id"))
    assert {row["algorithm"] for row in hashes} == {"fedgrow", "fedgrow_no_federation"}
    found = {(row["seed"], row["client"], row["small_sha256"]) for row in hashes}
    assert len(hashes) == 2 * len(found) == 2 * 2 * 3  # one for each seed and participant, whatever the method
    assert len({sha256 for _, _, sha256 in found}) == 2 * 3  # and nobody's is anybody else's, or another seed's


def test_page_and_markdown_say_the_same(folder: Path) -> None:
    page = write_report(folder)
    html, markdown = page.read_text(), page.with_suffix(".md").read_text()
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", html)
    assert [*map(unescape, headings)] == re.findall(r"^#{2,3} (.*)$", markdown, re.MULTILINE)
    names = re.findall(r"\]\((report_figures/.*?\.svg)\)", markdown)
    assert len(names) == html.count("<figure id=") == 8  # savings, 3 curves, differences, participants, time, labels
    assert all((folder / name).read_text().startswith("<?xml") for name in names)
    table = re.findall(r"^\| fedavg \|.*$", markdown, re.MULTILINE)[0]
    assert all(f"<td>{cell.strip()}</td>" in html for cell in table.strip("| ").split("|"))
    for text in (html, markdown):
        assert "python benchmarks/sweep.py --few" in text and "73.01" in text and "59.25" in text


def test_a_report_leaves_no_figures_of_an_earlier_one(folder: Path) -> None:
    figures = folder / "report_figures"
    figures.mkdir(exist_ok=True)
    (figures / "old.svg").write_text("")
    write_report(folder)
    assert not (figures / "old.svg").exists() and list(figures.glob("*.svg"))
