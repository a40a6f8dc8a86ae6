"""`fedsim list` and `fedsim show`: a line for everything there is, and what a run was, cost and gave."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.methods import named
from fedgrow_algo.presets import ABOUT, PRESETS
from fedsim.cli import main
from fedsim.cli.words import KINDS
from fedsim.data.config import EMBEDDED, KNOWN
from fedsim.devices import PROFILES
from fedsim.models import families
from fedsim.models.ladders import PUBLIC
from fedsim.results.tables import load, read_table, rows_of, write_table
from fedsim.sweeps.suites import suites_of


NAMES = {
    "methods": list(named()),
    "presets": list(PRESETS),
    "families": list(families()),
    "datasets": [*EMBEDDED, *KNOWN],
    "models": list(PUBLIC),
    "devices": list(PROFILES),
    "suites": list(suites_of("benchmarks.suites")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_a_line_that_says_what_it_is(kind: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    widest = max(map(len, NAMES[kind]))
    assert [line[:widest].strip() for line in lines] == NAMES[kind]
    assert all(len(line[widest:].strip()) > 15 for line in lines)


def test_presets_are_all_described() -> None:
    assert ABOUT.keys() == PRESETS.keys()


def test_a_kind_that_is_none_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["list", "method"])
    assert left.value.code == 2 and "methods" in capsys.readouterr().err


def test_the_only_run_is_shown_with_cost_result_and_config(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    results = load(tiny_run)
    run, last = results.runs.iloc[0], results.rounds.sort_values("round").iloc[-1]
    for words in ([], [run.run_id[:5]]):
        assert main(["show", str(tiny_run), *words]) == 0
        said = capsys.readouterr().out
        assert run.run_id in said and run.method in said and last.state_sha256 in said
        assert f"{100 * last.accuracy_mean:.1f} % of what participants deploy" in said
        assert f"{last.bytes_up_total / 1e6:.3g} MB" in said
        assert json.loads(said[said.index("\n{") :]) == json.loads(run.config)


def test_of_several_runs_each_has_a_line_and_one_is_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    shutil.copytree(tiny_run / "rounds", tmp_path / "rounds")
    (row,) = rows_of(read_table(tmp_path, "runs"), "runs")
    other = row | {"run_id": "f" * 16, "status": "failed", "error": "participant 1: no space left"}
    write_table(tmp_path, "runs", other["run_id"], [other])
    assert main(["show", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2 and lines[1].startswith("f" * 16) and lines[1].endswith("failed: participant 1: no space left")
    )
    assert main(["show", str(tmp_path), "fff"]) == 0
    assert "no space left" in capsys.readouterr().out
    for wrong in ("x", ""):
        assert main(["show", str(tmp_path), wrong]) == 2
        assert f"RUN_ID={wrong!r}" in capsys.readouterr().err
