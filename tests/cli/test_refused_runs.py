"""Requests that `fedsim run` refuses before anything is written, by the name of what is wrong."""

import dataclasses
import shutil
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites import tiny
from fedsim.cli import main
from fedsim.experiment import Experiment, load_experiments, parsed, with_settings
from fedsim.storage.locking import locked
from tests.support.every_field import FIELDS
from tests.support.inline_runs import Cut, Interrupted, inline


# refused on the command line ------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(
    capsys: pytest.CaptureFixture,
    out: Path,
    settings: Sequence[str],
    *more: str,
    target: str = "benchmarks.suites:tiny",
) -> str:
    """What `fedsim run` says of a request it refuses; whatever lay in `out` lies there still."""
    before = snapshot(out)
    words = ["--set", *settings] if settings else []
    status = main(["run", target, "--runtime", "inline", "--out", str(out), *words, *more])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert snapshot(out) == before
    return captured.err


def wrong_value(hint: Any) -> str:
    """A word that is no value of the annotation: a number where texts are meant, a text elsewhere."""
    arguments = typing.get_args(hint)
    if hint is str:
        return "3"
    if str in arguments or (typing.get_origin(hint) is tuple and str in typing.get_args(arguments[0])):
        return "1.5"
    return "wrong"


@pytest.mark.parametrize("path", FIELDS)
def test_a_wrong_value_of_any_field_is_named(path: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    value = wrong_value(FIELDS[path])
    message = refused(capsys, tmp_path / "out", [f"{path}={value}"])
    name = path.rpartition(".")[2]
    assert f"{name}={parsed(value)!r}" in message or f"{name}=({parsed(value)!r},)" in message
    assert "must be" in message or "set its fields instead" in message
    assert not (tmp_path / "out").exists()


def test_the_fields_just_tried_are_those_of_every_part() -> None:
    assert {"algorithm.lr", "task.data.limit", "partition.alpha", "tiers.0.form.width", "tiers.0.num_gpus"} <= {*FIELDS}
    assert {"intermediate.heads", "target.mlp", "on_error"} <= {*FIELDS}
    assert {field.name for field in dataclasses.fields(Experiment)} <= {*FIELDS}


@pytest.mark.parametrize(
    "settings, words",
    [
        (["partition.alpha=0"], ["partition.alpha=0", "greater than 0"]),
        (["partition.alpha=-0.5"], ["partition.alpha=-0.5", "greater than 0"]),
        (["partition.alpha=inf"], ["partition.alpha=inf", "iid"]),
        (["partition.alpha=nan"], ["partition.alpha=nan", "a number"]),
        (["partition.scheme=shards", "partition.shards_per_client=5000"], ["shards_per_client=5000", "15000"]),
        (["partition.scheme=zipf"], ["partition.scheme='zipf'", "dirichlet"]),
        (["partition.scheme=natural"], ["partition.scheme='natural'", "no groups"]),
        (["partition.scheme=iid", "participants=5000"], ["participants=5000"]),
        (["partition.min_size=1000"], ["partition.min_size=1000", "3000"]),
        (["partition.alpha=0.001", "participants=30"], ["partition.alpha=0.001", "100 draws"]),
        (["target.heads=7"], ["heads=7", "width=40"]),
        (["tiers.1.form.heads=5"], ["heads=5", "width=24"]),
        (["target.width=16"], ["target.width=16", "intermediate.width=32"]),
        (["target.depth=2"], ["target.depth=2", "intermediate.depth=3"]),
        (["target.mlp=8"], ["8", "intermediate"]),
        (["tiers.2.form.width=36"], ["laptop", "36", "intermediate.width=32"]),
        (["algorithm.preset=best"], ["algorithm.preset='best'", "paper", "preserving"]),
        (["algorithm.lr=-1"], ["algorithm.lr=-1", "at least 0"]),
        (["algorithm.lr=inf"], ["algorithm.lr=inf", "finite"]),
        (["algorithm.clip=0"], ["algorithm.clip=0", "greater than 0"]),
        (["algorithm.batch_size=0"], ["algorithm.batch_size=0", "at least 1"]),
        (["algorithm.epochs=1.5"], ["algorithm.epochs=1.5", "a whole number"]),
        (["rounds=0"], ["rounds=0", "at least 1"]),
        (["rounds=true"], ["rounds=True", "a whole number"]),
        (["seed=-1"], ["seed=-1"]),
        (["cohort=4"], ["cohort=4", "participants=3"]),
        (["participants=2"], ["participants=2", "3"]),
        (["validation_share=1"], ["validation_share=1", "0.9"]),
        (["scored=nobody"], ["scored='nobody'", "everyone", "cohort", "auto"]),
        (["on_error=ignore"], ["on_error='ignore'", "stop", "drop"]),
        (["tiers.1.name=phone"], ["tiers", "different names"]),
        (["tiers.1.num_gpus=1.5"], ["num_gpus=1.5"]),
        (["tiers.1.share=0"], ["share=0", "greater than 0"]),
        (["task.patch_size=3"], ["task.patch_size=3", "task.data.image_size=8"]),
        (["task.family=resnet"], ["task.family='resnet'", "vit"]),
        (["task.family=gpt2"], ["task.family='gpt2'", "image"]),
        (["task.data.name=nowhere.csv"], ["task.data.name='nowhere.csv'", "nowhere.csv"]),
        (["task.data.num_classes=5"], ["task.data.num_classes=5"]),
        (["task.data.test_share=1"], ["task.data.test_share=1"]),
        (["algorithm.lrr=1"], ["algorithm.lrr", "did you mean", "lr"]),
        (["rounds"], ["'rounds'", "field=value"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_request_that_cannot_be_met_is_refused(
    settings: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    message = refused(capsys, tmp_path / "out", settings)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


CIFAR10 = ["task.data.name=cifar10", "task.data.image_size=32", "task.data.channels=3"]


def test_known_data_without_a_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSIM_DATA_DIR", raising=False)
    message = refused(capsys, tmp_path / "out", CIFAR10)
    for word in ("task.data.name='cifar10'", "FEDSIM_DATA_DIR is not set", "task.data.hub=true"):
        assert word in message
    assert not (tmp_path / "out").exists()


def test_known_data_that_are_not_in_the_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_DATA_DIR", str(tmp_path))
    message = refused(capsys, tmp_path / "out", CIFAR10)
    assert f"{tmp_path}/cifar10" in message
    assert "is not set" not in message


@pytest.mark.parametrize(
    "target, words",
    [
        ("benchmarks.suites", ["module and a function"]),
        ("benchmarks.suites:", ["module and a function"]),
        (":tiny", [":tiny"]),
        ("benchmarks.nothing:tiny", ["benchmarks.nothing", "No module"]),
        ("no_such_package:tiny", ["no_such_package", "No module"]),
        (".suites:tiny", [".suites:tiny"]),
        ("benchmarks.suites:tinny", ["did you mean", "tiny"]),
        ("benchmarks.suites:__doc__", ["function of benchmarks.suites"]),
        ("fedsim.core.environment:ray_address", ["returns an Experiment"]),
        ("fedsim.models:families", ["returns an Experiment"]),
        ("fedsim.experiment:canonical", ["fedsim.experiment:canonical"]),  # needs an argument
    ],
)
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_target_that_leads_nowhere_is_refused(
    target: str,
    words: list[str],
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if command == "run":
        message = refused(capsys, tmp_path / "out", [], target=target)
    else:
        assert main(["inspect", target]) == 2
        message = capsys.readouterr().err
    for word in [target, *words]:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_an_experiment_may_lie_where_the_command_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_study.py").write_text(
        "from benchmarks.suites import tiny\ndef two():\n    return tiny(), tiny()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone afterwards, unlike what the loader adds
    assert load_experiments("my_own_study:two") == [tiny(), tiny()]


@pytest.mark.parametrize("hosts", ["0", "-2"])
def test_a_number_of_hosts_below_one_is_refused(hosts: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert f"--hosts={hosts}" in refused(capsys, tmp_path / "out", [], "--hosts", hosts)


@pytest.mark.parametrize("words", [["--runtime", "spark"], ["--hosts", "many"], ["--nonsense"]])
def test_unknown_options_are_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "benchmarks.suites:tiny", "--out", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# refused for what lies in the output folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_output_folder_that_cannot_be_made(
    below: str, tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / below
    message = refused(capsys, out, tiny_settings)
    assert f"--out={str(out)!r}" in message
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_output_folder_of_a_different_experiment(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    for more in ([], ["--resume"]):
        message = refused(capsys, out, [*tiny_settings, "seed=1"], *more)
        assert tiny_experiment.run_id in message
        assert with_settings(tiny_experiment, ["seed=1"]).run_id in message
        assert "different experiment" in message


def test_an_unfinished_run_without_resume(
    tmp_path: Path, tiny_experiment: Experiment, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        inline(tiny_experiment, tmp_path, progress=Cut(after=0))
    assert snapshot(tmp_path)
    message = refused(capsys, tmp_path, tiny_settings)
    assert tiny_experiment.run_id in message
    assert "--resume" in message


def test_an_output_folder_somebody_else_is_writing_to(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    with locked(tmp_path):
        assert "another process" in refused(capsys, tmp_path, tiny_settings)
    assert snapshot(tmp_path) == {}


def test_a_damaged_manifest_is_named_and_left_alone(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, tiny_settings: list[str], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    (out / "runs" / f"{tiny_experiment.run_id}.parquet").unlink()
    manifest = out / "checkpoints" / tiny_experiment.run_id / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    assert str(manifest) in refused(capsys, out, tiny_settings, "--resume")
