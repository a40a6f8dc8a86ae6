"""The report's numbers against ones computed by hand, on results written through the real writer."""

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from rich.console import Console

import fedsim.report.page
from fedsim.cli import main
from fedsim.report.document import content_of, write_report
from fedsim.report.notes import notes
from fedsim.report.page import rendered
from fedsim.report.readings import by_setting, finished_runs, last_within, read, records, sent_bytes
from fedsim.report.tables import COMPACT, LEGEND, significant, summary
from fedsim.report.terminal import print_summary
from fedsim.results.tables import SCHEMAS, Results, load, read_table, rows_of, write_table


ROOT = Path(__file__).resolve().parents[2]
NAN = math.nan


def add_run(
    directory: Path,
    algorithm: str,
    accuracies: Sequence[float | None],
    kilobytes: int,
    *,
    seed: int = 0,
    preset: str | None = None,
    status: str | None = "finished",
    upload: int | None = None,
    config: dict[str, Any] | None = None,
    **run: Any,
) -> str:
    """A run with one accuracy a round, round 0 first; each federated round moves `kilobytes` up and as much down."""
    config = {"seed": seed, "algorithm": {"name": algorithm, "preset": preset}} | (config or {})
    run_id = "-".join([algorithm, *map(str, config.values())]).translate(str.maketrans("{}'/ :", "______"))
    rounds = []
    for number, accuracy in enumerate(accuracies):
        spread = None if accuracy is None else 0.1
        worst = None if accuracy is None else accuracy - 0.1
        rounds.append(
            dict.fromkeys(SCHEMAS["rounds"].names)
            | dict(
                run_id=run_id, algorithm=algorithm, seed=seed, round=number, stage="federated" if number else "local"
            )
            | dict(accuracy_mean=accuracy, accuracy_std=spread, accuracy_min=worst, accuracy_local_mean=accuracy)
            | dict(accuracy_local_std=spread, accuracy_local_min=worst, accuracy_val_mean=accuracy)
            | dict(late=0, dropped_out=0, excluded=0, loss_mean=1.0, wall_seconds=1.0, retries=0, participants=4)
            | dict(bytes_up=1000 * kilobytes * (number > 0), bytes_down=1000 * kilobytes * (number > 0), flops=1)
            | dict(bytes_up_total=1000 * kilobytes * number, bytes_down_total=1000 * kilobytes * number)
            | dict(state_sha256=f"{number:064x}", bytes_moved=0, seam_bytes_up=0, seam_bytes_down=0, failed=0)
            | dict(accuracy_val_std=spread, accuracy_val_min=worst)
        )
    write_table(directory, "rounds", run_id, rounds)
    if status is not None:
        row = dict.fromkeys(SCHEMAS["runs"].names)
        row |= dict(run_id=run_id, suite="quick", algorithm=algorithm, preset=preset, dataset="digits", family="vit")
        row |= dict(partition="dirichlet", alpha=0.1, participants=4, cohort=4, rounds=len(accuracies) - 1, seed=seed)
        row |= dict(target_params=1_000_000, trainable_params=1234.5, upload_params=500.0, status=status)
        row |= dict(wall_seconds=10.0 + seed, git_commit="abc", code_sha256="def", versions='{"torch": "2"}')
        row |= dict(hardware='{"cpu": "some <cpu>"}', config=json.dumps(config), model="64x4", error=None, labels=None)
        row |= dict(bytes_per_upload=1000 * kilobytes // 4 if upload is None else upload, held_bytes=1, peak_bytes=2)
        row |= dict(federation_sha256=f"federation {seed}", command=None)
        write_table(directory, "runs", run_id, [row | run])
    return run_id


def add_quick(directory: Path, seed: int = 0, more: float = 0.0) -> None:
    """A suite: after its three rounds Fed-Grow (paper) has moved 0.6 MB, and that is the budget."""
    labels = json.dumps([[5, 0, 1], [0, 7, 0], [2, 2, 2], [0, 0, 9]])
    accuracies = [0.1, 0.5, 0.6, 0.7 + more]
    add_run(directory, "fedgrow", accuracies, 100, seed=seed, preset="paper", labels=labels)
    add_run(directory, "fedgrow", [0.3, 0.5, 0.6, 0.8], 150, seed=seed, preset="preserving")
    add_run(directory, "fedavg", [0.1, 0.4, 0.8, 0.9], 250, seed=seed)
    add_run(directory, "heterofl", [0.2, 0.6, 0.7, 0.8], 500, seed=seed)
    add_run(directory, "local_only", [0.2, 0.3, 0.4, 0.5], 0, seed=seed)


def html_report(results: Results, title: str) -> str:
    """The page as HTML."""
    return rendered("html", content_of(results, read(results), title))


def written(page: str) -> str:
    """A page as HTML without what is the report's own: its script, which is all that may run in it, and its figures."""
    script = Path(fedsim.report.page.__file__).with_name("templates").joinpath("page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.count(f"<script>{script}</script>") == 1 and f"script-src 'sha256-{digest}'\">" in page
    for drawn in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        parsed = ElementTree.fromstring(drawn.replace("<svg", '<svg xmlns:xlink="x"', 1))
        assert not {element.tag for element in parsed.iter()} & {"script", "foreignObject", "a", "metadata"}
        assert not any(name.startswith("on") for element in parsed.iter() for name in element.attrib)
    return re.sub(r"<svg .*?</svg>", "<img>", page.replace(f"<script>{script}</script>", ""), flags=re.DOTALL)


def markdown(directory: Path) -> str:
    """The page of a results folder as Markdown."""
    write_report(directory)
    return (directory / "report.md").read_text()


def row_of(table: pd.DataFrame, method: str) -> dict[str, Any]:
    (row,) = [row for row in table.to_dict("records") if row["method"] == method]
    return row


def test_both_readings_by_hand(tmp_path: Path) -> None:
    add_quick(tmp_path)
    table = summary(load(tmp_path))
    methods = ["fedgrow (paper)", "fedgrow (preserving)", "fedavg", "heterofl", "local_only"]
    assert list(table["method"]) == methods
    # method: last round, at equal bytes, the round that was, MB in total, saved against FedAvg's 62500 bytes
    expected = {
        "fedgrow (paper)": (0.7, 0.7, 3, 0.6, 0.6),
        "fedgrow (preserving)": (0.8, 0.6, 2, 0.9, 0.4),  # 0.3 MB a round: exactly the budget after round 2
        "fedavg": (0.9, 0.4, 1, 1.5, 0.0),
        "heterofl": (0.8, 0.2, 0, 3.0, -1.0),  # 1 MB a round: too much from the first on
        "local_only": (0.5, 0.5, 3, 0.0, 1.0),  # sends nothing: its last round
    }
    for method, numbers in expected.items():
        row = row_of(table, method)
        columns = ("accuracy", "equal_bytes_accuracy", "equal_bytes_round", "total_mb", "saved")
        assert tuple(row[column] for column in columns) == pytest.approx(numbers), method
        assert row["accuracy_std"] == pytest.approx(0.1)
        assert row["accuracy_min"] == pytest.approx(row["accuracy"] - 0.1)
        assert row["equal_bytes_min"] == pytest.approx(row["equal_bytes_accuracy"] - 0.1)
    fedavg = row_of(table, "fedavg")
    assert (fedavg["upload_mb"], fedavg["trainable_params"], fedavg["seconds"]) == (0.0625, 1234.5, 10.0)
    assert fedavg["seeds"] == 1 and math.isnan(fedavg["accuracy_seed_std"])
    (note,) = notes(load(tmp_path))
    assert "fedgrow (paper) in its whole run, 0.600 MB" in note


def test_seeds_are_averaged_and_the_budget_is_each_seeds_own(tmp_path: Path) -> None:
    add_quick(tmp_path, seed=0)
    add_quick(tmp_path, seed=1, more=0.1)
    # In seed 2 Fed-Grow stops after one round: 0.2 MB, which FedAvg passes in its first.
    add_run(tmp_path, "fedgrow", [0.1, 0.9], 100, seed=2, preset="paper")
    add_run(tmp_path, "fedavg", [0.1, 0.4, 0.8, 0.9], 250, seed=2)
    table = summary(load(tmp_path))
    paper = row_of(table, "fedgrow (paper)")
    assert paper["seeds"] == 3
    assert paper["accuracy"] == pytest.approx((0.7 + 0.8 + 0.9) / 3)
    assert paper["accuracy_seed_std"] == pytest.approx(0.1)
    assert paper["seconds"] == pytest.approx(11.0)
    fedavg = row_of(table, "fedavg")
    assert fedavg["equal_bytes_accuracy"] == pytest.approx((0.4 + 0.4 + 0.1) / 3)
    assert fedavg["equal_bytes_round"] == pytest.approx(2 / 3)
    lines = notes(load(tmp_path))
    assert "mean over 3 seeds" in lines[0]
    assert "different numbers of seeds" in lines[1] and "heterofl 2" in lines[1]


def test_rounds_that_were_not_evaluated_are_skipped(tmp_path: Path) -> None:
    add_run(tmp_path, "fedgrow", [0.1, 0.2, 0.3, 0.7], 100, preset="paper")
    add_run(tmp_path, "fedavg", [0.1, 0.4, None, 0.9], 100)
    add_run(tmp_path, "heterofl", [None, 0.4, 0.8, None], 400)
    table = summary(load(tmp_path))
    fedavg, heterofl = row_of(table, "fedavg"), row_of(table, "heterofl")
    assert (fedavg["equal_bytes_accuracy"], fedavg["equal_bytes_round"]) == (0.9, 3)
    assert (heterofl["accuracy"], heterofl["rounds"], heterofl["total_mb"]) == (0.8, 3, 2.4)
    assert math.isnan(heterofl["equal_bytes_accuracy"]) and math.isnan(heterofl["equal_bytes_round"])


@pytest.mark.parametrize("budget, round_", [(0, 0), (199, 0), (200, 1), (599, 1), (600, 3), (10**9, 3)])
def test_budget_edges(budget: int, round_: int) -> None:
    accuracies = [0.1, 0.2, NAN, 0.4]
    history = [
        {"round": i, "bytes_up_total": 150 * i, "bytes_down_total": 50 * i, "accuracy_mean": accuracies[i]}
        for i in range(4)
    ]
    found = last_within(history, sent_bytes, budget)
    assert found is not None and found["round"] == round_


def test_without_fedavg_nothing_is_saved_and_without_fedgrow_the_first_method_is_the_budget(tmp_path: Path) -> None:
    add_run(tmp_path / "a", "fedgrow", [0.1, 0.2], 100, preset="paper")
    table = summary(load(tmp_path / "a"))
    assert list(table["saved"].isna()) == [True]
    assert "no finished run of fedavg" in notes(load(tmp_path / "a"))[1]
    add_run(tmp_path / "b", "fedavg", [0.1, 0.2], 100)
    table = summary(load(tmp_path / "b"))
    assert list(table["equal_bytes_accuracy"]) == [0.2] and list(table["saved"]) == [0.0]
    assert "than fedavg in its whole run" in notes(load(tmp_path / "b"))[0]
    for folder in ("a", "b"):
        assert "| -" in markdown(tmp_path / folder)
        assert "<img>" in written(html_report(load(tmp_path / folder), "x"))


def test_failed_and_unfinished_runs_are_said_and_not_averaged(tmp_path: Path) -> None:
    add_quick(tmp_path)
    add_run(tmp_path, "fedavg", [0.0], 250, seed=1, status="failed", error="participant 3: ValueError: <nan>")
    add_run(tmp_path, "heterofl", [0.0, 0.0], 250, seed=1, status=None)
    results = load(tmp_path)
    assert row_of(summary(results), "fedavg")["accuracy"] == pytest.approx(0.9)
    failed, unfinished = notes(results)[1:]
    assert failed.startswith("Failed: fedavg, seed 1") and failed.endswith("participant 3: ValueError: <nan>")
    assert unfinished.startswith("Not finished: heterofl, seed 1") and unfinished.endswith("got to round 1")
    page = html_report(results, "x")
    assert "&lt;nan&gt;" in page and "<nan>" not in page


@pytest.mark.parametrize("status", ["failed", None])
def test_folder_in_which_nothing_finished(tmp_path: Path, status: str | None) -> None:
    add_run(tmp_path, "fedavg", [0.1], 250, status=status)
    results = load(tmp_path)
    assert len(summary(results)) == 0
    assert len(notes(results)) == 1
    assert "No run has finished" in html_report(results, "x")
    print_summary(results, console=Console(file=io.StringIO()))
    assert "No run has finished" in markdown(tmp_path) and f"\n* {notes(results)[0]}\n" in markdown(tmp_path)


def test_runs_with_other_settings_are_told_apart(tmp_path: Path) -> None:
    add_quick(tmp_path)
    add_run(tmp_path, "fedavg", [0.1, 0.2], 250, config={"training": {"lr": 0.5}})
    add_run(tmp_path, "fedavg", [0.1, 0.3], 250, config={"training": {"lr": 0.1}}, alpha=1.0)
    results = load(tmp_path)
    table = summary(results)
    found = [(row["alpha"], row["method"]) for row in finished_runs(results) if row["algorithm"] == "fedavg"]
    assert sorted(found) == [(0.1, "fedavg training.lr=-"), (0.1, "fedavg training.lr=0.5"), (1.0, "fedavg")]
    assert len(set(table["setting"])) == 2
    assert row_of(table, "fedavg")["accuracy"] == 0.3
    assert all(note.startswith("quick: digits, vit, dirichlet (alpha") for note in notes(results))


def test_a_different_federation_is_said(tmp_path: Path) -> None:
    add_quick(tmp_path)
    add_run(tmp_path, "fedprox", [0.1, 0.2], 250, federation_sha256="another")
    assert any("same federation" in note for note in notes(load(tmp_path)))


def test_contents_of_one_data_set_that_differ_are_said(tmp_path: Path) -> None:
    for folder, algorithm, data, digest in (
        ("a", "fedgrow", {"name": "d.csv"}, "1" * 64),
        ("a", "fedavg", {"name": "other.csv"}, "2" * 64),
        ("b", "fedprox", {"name": "d.csv"}, "3" * 64),
        ("b", "heterofl", {"name": "d.csv"}, None),
    ):
        add_run(tmp_path / folder, algorithm, [0.5], 1, config={"task": {"data": data}}, data_sha256=digest)
    said = [note for note in notes(load(tmp_path / "a", tmp_path / "b")) if note.startswith("Not comparable")]
    assert len(said) == 1 and re.search(r"sha256 1{16} \(.*fedgrow.*\); sha256 3{16} \(.*fedprox.*\)", said[0].lower())
    assert not [note for note in notes(load(tmp_path / "a")) if note.startswith("Not comparable")]


def test_terminal_table_fits_120_columns_and_names_the_files(tmp_path: Path) -> None:
    add_quick(tmp_path)
    add_run(tmp_path, "fedgrow_released_code", [0.1, 0.123456], 123_456, preset="preserving")
    file = io.StringIO()
    print_summary(load(tmp_path), directory=tmp_path, report=tmp_path / "report.html", console=Console(file=file))
    text = file.getvalue()
    table = text.split("Equal bytes:")[0].splitlines()
    assert max(map(len, table)) <= 120
    for cell in ("fedgrow_released_code", " 10.0 ", "0.0625", "60.0 %", "-100.0 %", "1.23 k"):
        assert cell in text
    assert f"{tmp_path}/rounds" in text and str(tmp_path / "report.html") in text


def test_terminal_table_on_an_ascii_terminal(tmp_path: Path) -> None:
    add_quick(tmp_path)
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding="ascii")
    print_summary(load(tmp_path), console=Console(file=file))
    file.flush()
    assert b"accuracy +- ci" in written.getvalue()


def test_a_method_that_computes_nothing_has_a_place_in_every_figure(tmp_path: Path) -> None:
    """Totals of MB and FLOPs may be 0 (`analytic` trains nothing), where others differ by much."""
    add_run(tmp_path, "fedavg", [0.1, 0.4, 0.9], 250)
    add_run(tmp_path, "heterofl", [0.1, 0.2, 0.3], 1)
    run_id = add_run(tmp_path, "analytic", [0.1, 0.9, 0.9], 0)
    rows = rows_of(read_table(tmp_path, "rounds"), "rounds")
    own = [row | {"flops": 0} for row in rows if row["run_id"] == run_id]
    write_table(tmp_path, "rounds", run_id, own)
    assert "analytic" in markdown(tmp_path)


def test_runs_that_begin_with_other_public_models_are_not_compared(tmp_path: Path) -> None:
    public = {"checkpoints": [{"path": "models/vit-24x1"}], "preset": "aki"}
    add_run(tmp_path, "fedavg", [0.1, 0.9], 250)
    add_run(tmp_path, "fedavg", [0.8, 0.9], 250, config={"start": public})
    tier = {"form": {"width": 8, "depth": 1}, "checkpoint": {"path": "/srv/minilm/"}}
    add_run(tmp_path, "fedavg", [0.7, 0.9], 250, config={"start": None, "tiers": [tier]})
    names = [name.partition("participants")[2] for name in by_setting(records(summary(load(tmp_path))))]
    assert sorted(names) == ["", ", from minilm", ", from vit-24x1, grown by aki"]
    add_run(tmp_path, "fedavg", [0.7, 0.9], 250, config={"start": ["no start"]})
    with pytest.raises(ValueError, match="its config cannot be understood"):
        summary(load(tmp_path))


GROUPS = ("nothing leaves", "operator leaves", "model leaves", "what leaves")


def test_methods_that_let_no_model_leave_are_kept_apart(tmp_path: Path) -> None:
    """By what leaves, the least first, with a line between; intervals are over seeds (t = 12.706 for two)."""
    for seed in (0, 1):
        add_run(tmp_path, "fedavg", [0.1, 0.9], 250, seed=seed, leaves="model")
        add_run(tmp_path, "fedgrow", [0.1, 0.6 + 0.02 * seed], 100, seed=seed, preset="paper", leaves="operator")
        add_run(tmp_path, "local_only", [0.1, 0.5], 0, seed=seed, leaves="nothing")
        add_run(tmp_path, "mine", [0.1, 0.5], 0, seed=seed)  # of an earlier version, which did not say
    assert list(summary(load(tmp_path))["method"]) == ["local_only", "fedgrow (paper)", "fedavg", "mine"]
    file = io.StringIO()
    print_summary(load(tmp_path), console=Console(file=file))
    lines = [line.strip() for line in file.getvalue().splitlines()]
    found = [line.split("  ")[0] for line in lines if line.startswith(("local", "fedg", "fedavg", "mine", *GROUPS))]
    assert found == [
        *("nothing leaves", "local_only", "operator leaves", "fedgrow (paper)", "model leaves", "fedavg"),
        *("what leaves: not said", "mine"),
    ]
    (grown,) = [line for line in lines if line.startswith("fedgrow")]
    assert "61.0 ± 12.7" in grown  # 0.61 ± 12.706 x 0.01414 / sqrt 2
    for column in LEGEND:
        assert f"{column}: " in file.getvalue()
    assert all(any(heading.startswith(column) or column in heading for heading in COMPACT) for column in LEGEND)


def test_markdown_is_tables_with_equal_numbers_of_cells(tmp_path: Path) -> None:
    add_quick(tmp_path)
    add_run(tmp_path, "fed|prox", [0.1, 0.2], 250)
    tables = re.findall(r"(?<=\n\n)(?:\|.*\n)+(?=\n)", markdown(tmp_path))
    assert len(tables) == 6, "what it took to reach the target, too"
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    lines = tables[0].splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("| fedgrow (paper) | - | 70.0 | 10.0 | 60.0 | - | 70.0 | 1.23 k |")
    assert any(line.startswith("| fed\\|prox |") for line in lines)


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    add_quick(tmp_path, seed=0)
    add_quick(tmp_path, seed=1)
    page = written(html_report(load(tmp_path), "results <&> more"))
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "some &lt;cpu&gt;" in page and "results &lt;&amp;&gt; more" in page
    assert page.count("<img>") == 2 * 7  # savings, three curves, differences, time, labels; no participant was scored
    assert page.count("<details>") == 1 + 10
    assert page == written(html_report(load(tmp_path), "results <&> more"))
    for numbers in re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]*)"', page):
        assert base64.b64decode(numbers).count(b"\n") > 1


def test_nothing_that_somebody_stored_is_markup(tmp_path: Path) -> None:
    add_quick(tmp_path)
    add_run(tmp_path, "<script>best</script>", [0.1, 0.99], 250, error="<b>", config={"x": "</pre><script>"})
    page = written(html_report(load(tmp_path), "x"))
    assert "<script" not in page and "<b>&lt;script&gt;best&lt;/script&gt;</b> is highest, 99.0 %" in page


@pytest.mark.parametrize("out", [None, "elsewhere/page.html"])
def test_command_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture, out: str | None) -> None:
    add_quick(tmp_path)
    path = tmp_path / (out or "report.html")
    assert main(["report", str(tmp_path)] + (["--out", str(path)] if out else [])) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert not list(path.parent.glob(".*"))


def test_command_refuses_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "looked for runs/*.parquet" in capsys.readouterr().err


def test_command_runs_as_a_script_from_the_root(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/report.py", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is not a folder" in done.stderr


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (4.567, "4.57"),
        (99.96, "100"),
        (1234.6, "1,235"),
        (NAN, "-"),
        (-0.00012345, "-0.000123"),
    ],
)
def test_significant_digits(number: float, text: str) -> None:
    assert significant(number) == text
