"""The command: what it prints, what it writes, and what its exit status says."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from baselines.fedavg import FedAvg
from benchmarks import suites
from fedsim.cli import main
from fedsim.engine.participant import Participant, Reply
from fedsim.experiment import Experiment
from fedsim.learning.meter import StepCost
from fedsim.learning.steps import Asking
from fedsim.results.tables import load
from tests.support.manifests import rewrite


TINY = "benchmarks.suites:tiny"
LADDERS = {
    "released_ladder": {
        "target": 5_742_052,
        "upload": 2_089_152,
        "local": 1_065_056,
        "communication": "63.62 %",
        "trainable": "45.07 %",
        "depths": {"256x2", "256x3", "256x4"},
    },
    "abstract_ladder": {
        "target": 11_610_820,
        "upload": None,
        "local": None,
        "communication": "73.01 %",
        "trainable": "59.25 %",
        "depths": {"320x2", "320x3", "320x4"},
    },
}


# inspect --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LADDERS)
def test_inspect_tells_the_published_numbers(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = LADDERS[name]
    # Counting the FLOPs of models of this size takes its time, and is the business of other tests.
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (0, 0))))
    monkeypatch.setattr("fedsim.data.source.load", lambda *_: pytest.fail("inspect loads no data"))
    monkeypatch.setattr("fedsim.learning.task.load", lambda *_: pytest.fail("inspect loads no data"))

    assert main(["inspect", f"benchmarks.suites:{name}"]) == 0
    text = capsys.readouterr().out
    assert main(["inspect", f"benchmarks.suites:{name}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)

    assert f"{expected['target']:,} parameters" in text
    assert f"{expected['communication']} of FedAvg's upload" in text
    assert f"{expected['trainable']} of the target's" in text
    if expected["upload"] is not None:
        assert f"{expected['upload']:,} parameters, 8.36 MB" in text
        assert f"{expected['local']:,} parameters" in text
        assert "22.97 MB" in text
        assert figures["upload_params"] == expected["upload"]
        assert figures["trainable_params"] == expected["upload"] + expected["local"]
        assert figures["upload_bytes"] == 4 * expected["upload"]

    assert figures["target_params"] == expected["target"]
    assert figures["fedavg_upload_bytes"] == 4 * expected["target"]
    assert f"{100 * figures['communication_saved']:.2f} %" == expected["communication"]
    assert f"{100 * figures['trainable_saved']:.2f} %" == expected["trainable"]
    assert figures["communication_saved"] == 1 - figures["upload_bytes"] / figures["fedavg_upload_bytes"]
    assert figures["trainable_saved"] == 1 - figures["trainable_params"] / figures["target_params"]
    people = figures["participants"]
    assert [one["participant"] for one in people] == list(range(12))
    assert {one["form"] for one in people} == expected["depths"]
    for form in expected["depths"]:
        assert sum(one["form"] == form for one in people) == 4
    for count in ("trainable_params", "upload_params"):
        assert sum(one[count] for one in people) / 12 == pytest.approx(figures[count])


def test_inspect_of_a_suite_prints_one_object_an_experiment(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny_experiment: Experiment
) -> None:
    averaging = dataclasses.replace(tiny_experiment, algorithm=FedAvg())
    both = [averaging, dataclasses.replace(averaging, tiers=averaging.tiers[:1], seed=1)]
    monkeypatch.setattr(suites, "two", lambda: both, raising=False)
    assert main(["inspect", "benchmarks.suites:two", "--json"]) == 0
    objects = json.loads(capsys.readouterr().out)
    assert [one["run_id"] for one in objects] == [one.run_id for one in both]
    for one in objects:
        assert one["upload_params"] == one["trainable_params"] == one["target_params"]
        assert one["communication_saved"] == one["trainable_saved"] == 0
        assert all(participant["flops_per_step"]["target"] > 0 for participant in one["participants"])


# run ------------------------------------------------------------------------------------------------------------------


def test_run_writes_results_and_does_nothing_the_second_time(
    tmp_path: Path, tiny_run: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    words = ["run", TINY, "--runtime", "inline", "--out", str(tmp_path), "--set", *tiny_settings]
    assert main(words) == 0
    said = capsys.readouterr().out
    for expected in ("fedgrow (paper), seed 0: 2 rounds", "round 0/2", "round 2/2", "MB sent", f"{tmp_path}/rounds"):
        assert expected in said
    results = load(tmp_path)
    assert list(results.rounds.state_sha256) == list(load(tiny_run).rounds.state_sha256)
    assert results.runs.suite.item() == "tiny"

    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "finished before" in said and "round 1" not in said
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_results_go_to_a_folder_named_after_the_function(
    tmp_path: Path, tiny_run: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "results" / "tiny")
    assert main(["run", TINY, "--runtime", "inline", "--set", *tiny_settings]) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["tiny"]


def test_settings_may_be_given_one_by_one(
    tmp_path: Path, tiny_run: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    words = [word for setting in tiny_settings for word in ("--set", setting)]
    assert main(["run", TINY, "--runtime", "inline", "--out", str(out), *words]) == 0
    assert "finished before" in capsys.readouterr().out


def test_a_run_that_failed_says_who_why_and_how_to_go_on(
    tmp_path: Path,
    tiny_run: Path,
    tiny_settings: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Participant.train

    def broken(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        if (round, self.member.info.id) == (2, 1):
            raise ArithmeticError("two and two make five")
        return real(self, round, payload)

    out = tmp_path / "with a space"
    with monkeypatch.context() as patched:
        patched.setattr(Participant, "train", broken)
        assert main(["run", TINY, "--runtime", "inline", "--out", str(out), "--set", *tiny_settings]) == 1
    said = capsys.readouterr().out
    run_id = load(out).runs.run_id.item()
    assert f"run {run_id} failed: participant 1: ArithmeticError: two and two make five" in said

    (line,) = (line for line in said.splitlines() if line.startswith("go on with: "))
    command = shlex.split(line.removeprefix("go on with: "))
    assert command[:2] == ["fedsim", "run"]
    assert main(command[1:]) == 0
    assert "resumed at round 2" in capsys.readouterr().out
    assert list(load(out).rounds.state_sha256) == list(load(tiny_run).rounds.state_sha256)


def test_ctrl_c_leaves_what_was_finished_readable(
    tmp_path: Path,
    tiny_settings: list[str],
    tiny_run: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        raise KeyboardInterrupt

    words = ["run", TINY, "--runtime", "inline", "--out", str(tmp_path), "--set", *tiny_settings]
    with monkeypatch.context() as patched:
        patched.setattr(Participant, "train", interrupted)
        assert main(words) == 130
    assert "every finished round is on disk" in capsys.readouterr().out
    assert list(load(tmp_path).rounds["round"]) == [0]
    assert main([*words, "--resume"]) == 0
    assert list(load(tmp_path).rounds.state_sha256) == list(load(tiny_run).rounds.state_sha256)


def test_python_m_fedsim_is_the_command_and_says_why_before_it_ends_its_ray() -> None:
    command = [sys.executable, "-m", "fedsim", "run", TINY, "--set", "roundz=1"]
    here = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stderr.readline() == "error: --set roundz: no such field; did you mean rounds?\n"
        assert process.poll() is None, "there is a Ray to be ended yet"
        said = f"starting Ray, importing torch\nloading {TINY} and its models\n"
        assert (process.stdout.read(), process.stderr.read(), process.wait()) == (said, "", 2)


def test_clean_frees_checkpoints_of_finished_runs_and_keeps_the_tables(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    (run_id,) = load(out).runs.run_id
    size = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())
    cut = out / "checkpoints" / "0123456789abcdef"
    shutil.copytree(out / "checkpoints" / run_id, cut)
    rewrite(cut / "manifest.json", run_id=cut.name, files={})
    (out / "rounds" / f".{run_id}.parquet.tmp").write_bytes(b"1234")
    before = load(out).rounds

    assert main(["clean", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"freed {(size + 4) / 1e6:.1f} MB: checkpoints of 1 runs" in said and "1 unfinished" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == [cut.name]
    assert not list((out / "rounds").glob(".*"))
    assert load(out).rounds.equals(before) and load(out).runs.status.tolist() == ["finished"]
    assert main(["export", str(out), "--participant", "0", "--to", str(tmp_path / "model")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err

    assert main(["clean", str(out), "--unfinished"]) == 0
    assert not cut.exists() and load(out).rounds.equals(before)


def test_clean_deletes_nothing_but_what_a_run_writes(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders and files of others stay, and what lies behind links."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(tiny_run, out)
    (run_id,) = load(out).runs.run_id
    for folder in (elsewhere, out / "checkpoints" / "mine", out / "checkpoints" / run_id / "mine"):
        folder.mkdir()
        (folder / "notes.txt").write_text("keep")
    (out / "rounds" / ".draft.tmp").write_text("keep")
    (out / "checkpoints" / "linked").symlink_to(elsewhere)
    shutil.copytree(out / "checkpoints" / run_id, out / "checkpoints" / "renamed")
    shutil.rmtree(out / "checkpoints" / run_id / "private")
    (out / "checkpoints" / run_id / "private").symlink_to(elsewhere)

    assert main(["clean", str(out), "--unfinished"]) == 0
    assert "left alone 3 folders" in capsys.readouterr().out
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.t*t") if path.name == "notes.txt"}
    own = f"out/checkpoints/{run_id}/mine/notes.txt"
    assert kept == {
        "elsewhere/notes.txt",
        "out/checkpoints/mine/notes.txt",
        "out/checkpoints/renamed/mine/notes.txt",
        own,
    }
    assert (out / "rounds" / ".draft.tmp").exists() and (out / "checkpoints" / "renamed" / "manifest.json").exists()
    assert not list((out / "checkpoints" / run_id).glob("server.*"))


def test_clean_does_not_follow_a_link_to_checkpoints(tmp_path: Path, tiny_run: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(tiny_run, out)
    (out / "checkpoints").rename(elsewhere)
    (out / "checkpoints").symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    assert main(["clean", str(out), "--unfinished"]) == 0
    assert sorted(elsewhere.rglob("*")) == before


def test_clean_refuses_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err and not list(tmp_path.iterdir())
