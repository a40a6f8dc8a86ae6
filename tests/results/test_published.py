"""Runs whose tables may be given away: nothing private is in them, no other number moves, the report still works."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

import fedsim
from fedsim.cli import main
from fedsim.experiment import Experiment
from fedsim.report.document import write_report
from fedsim.results.columns import COLUMNS, PRIVATE, SCHEMAS
from fedsim.results.published import private_value
from fedsim.results.tables import load, read_table
from tests.support.inline_runs import INCIDENTAL, Cut, Interrupted, inline


@pytest.fixture(scope="module")
def published(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published")
    inline(tiny_experiment, out, publish=True)
    return out


def test_what_is_private_is_listed() -> None:
    assert PRIVATE["runs"] == {"labels", "error"}
    assert {"train_loss", "clipped_share", "metrics", "accuracy_val_mean", "accuracy_local_min"} < PRIVATE["rounds"]
    assert {"num_examples", "train_loss", "small_sha256", "accuracy", "loss", "flops"} < PRIVATE["clients"]
    told = {"run_id", "algorithm", "seed", "round", "client", "state_sha256", "epsilon", "config", "bytes_up"}
    assert all(not told & PRIVATE[table] for table in COLUMNS)


def test_nothing_private_is_written_and_no_other_number_moves(published: Path, tiny_run: Path) -> None:
    for table in SCHEMAS:
        plain, found = read_table(tiny_run, table), read_table(published, table)
        private = sorted(PRIVATE[table])
        assert len(found) and bool(found[private].isna().to_numpy().all()), table
        others = [*PRIVATE[table], *INCIDENTAL, "command"]
        plain, found = (frame.drop(columns=others, errors="ignore") for frame in (plain, found))
        pd.testing.assert_frame_equal(plain, found, check_exact=True, check_dtype=False)
    assert load(published).rounds.state_sha256.tolist() == load(tiny_run).rounds.state_sha256.tolist()
    assert private_value(published) is None
    run_id, column = private_value(tiny_run) or ("", "")
    assert run_id == load(tiny_run).runs.run_id[0] and column == "runs.labels"


def test_the_report_of_such_a_folder_works(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(published, out)
    page = write_report(out)
    assert isinstance(page, Path)
    html = page.read_text()
    (accuracy,) = load(out).rounds.accuracy_mean.tolist()[-1:]
    assert f"{100 * accuracy:.1f}" in html and "Who holds which examples" not in html
    assert fedsim.load(out).table().accuracy.tolist() == pytest.approx([accuracy])
    folder = fedsim.export(out, 1, tmp_path / "model")
    assert "- Its training examples never left it." in (folder / "README.md").read_text()


def test_a_run_that_is_resumed_stays_published(tiny_experiment: Experiment, published: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        inline(tiny_experiment, tmp_path, publish=True, progress=Cut(1))
    fedsim.run(tiny_experiment, out=tmp_path, publish=True)
    assert private_value(tmp_path) is None
    assert load(tmp_path).rounds.state_sha256.tolist() == load(published).rounds.state_sha256.tolist()


def test_updates_are_not_kept_beside_and_folders_with_private_values_are_refused(
    tiny_experiment: Experiment, tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="publish=True, keep_updates=True: must be one of them"):
        fedsim.sweep([tiny_experiment], out=tmp_path / "new", publish=True, keep_updates=True)
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    run_id = load(out).runs.run_id[0]
    with pytest.raises(ValueError, match=f"publish=True: the tables of {re.escape(str(out))} hold runs.labels of run"):
        fedsim.run(tiny_experiment, out=out, publish=True)
    assert load(out).runs.run_id.tolist() == [run_id], "nothing was moved or computed"


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_command_publishes(command: str, tiny_settings: list[str], tmp_path: Path) -> None:
    seeds = ["--seeds", "0"] if command == "sweep" else []
    words = [command, "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(tmp_path), *seeds, "--publish"]
    assert main([*words, "--set", *tiny_settings]) == 0
    assert private_value(tmp_path) is None and len(load(tmp_path).rounds) == 3
