"""An experiment is its numbers: identity, settings, and requests that are refused before anything is written."""

import copy
import dataclasses
import json
import math
import shutil
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from baselines.fedavg import FedAvg, fedavg_mid
from benchmarks import suites
from benchmarks.suites import tiny
from fedsim.cli import main
from fedsim.core.canonical import canonical, revived
from fedsim.data.config import DataConfig, pydoc
from fedsim.data.partition import Partition
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment, Tier, load_experiments, parsed, with_settings
from fedsim.learning.task import TaskConfig
from fedsim.models import Form
from fedsim.models.pretrained import Checkpoint
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from fedsim.storage.locking import locked


PLACEMENT = {"num_cpus", "num_gpus", "memory_mb", "resources", "gpu_fraction"}


def fields_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and annotation of every field below an experiment, inner ones too; the first of a tuple's items."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), f"{path}{field.name}"
        yield name, hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from fields_of(inner, f"{name}.")
        elif isinstance(inner, tuple) and inner and dataclasses.is_dataclass(inner[0]):
            yield f"{name}.0", type(inner[0])
            yield from fields_of(inner[0], f"{name}.0.")


FIELDS = dict(fields_of(tiny()))
LEAVES = [path for path in FIELDS if not any(other.startswith(path + ".") for other in FIELDS)]


def text_experiment() -> Experiment:
    """Every kind of field an experiment can have: named columns, a family of its own, fractions, None."""
    return Experiment(
        FedAvg(clip=None, lr=1.0),
        TaskConfig(DataConfig("notes.csv", text=("title", 2), label="kind", max_length=8), family="gpt2"),
        tiers=(
            Tier("a", Form(8, 1, 2), 0.3, Checkpoint("models/a")),
            Tier("b", Form(8, 1, 2, mlp=9), num_gpus=0.5, memory_mb=100),
        ),
        intermediate=Form(8, 1, 2, mlp=12),
        target=Form(8, 1, 2, mlp=12),
        partition=Partition("by_size", alpha=2.0),
        cohort=3,
        validation_share=0.0,
    )


EXPERIMENTS = {
    "tiny": tiny(),
    "released": suites.released_ladder(),
    "text": text_experiment(),
    **{f"quick {i}": experiment for i, experiment in enumerate(suites.quick())},
}


# identity -------------------------------------------------------------------------------------------------------------


def test_equal_experiments_have_one_run_id() -> None:
    assert tiny() == tiny() and tiny() is not tiny()
    assert tiny().run_id == tiny().run_id
    assert len(tiny().run_id) == 16
    assert with_settings(tiny(), ["rounds=3", "algorithm.lr=0.003"]).run_id == tiny().run_id
    assert with_settings(tiny(), ["algorithm.lr=1"]).run_id == with_settings(tiny(), ["algorithm.lr=1.0"]).run_id
    ids = [experiment.run_id for experiment in EXPERIMENTS.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_but_placement_is_part_of_the_run_id(path: str) -> None:
    changed = copy.deepcopy(tiny())
    *owners, name = path.split(".")
    owner: Any = changed
    for step in owners:
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    object.__setattr__(owner, name, "something else")
    assert (changed.run_id == tiny().run_id) == (name in PLACEMENT)


def test_the_algorithms_class_is_part_of_the_run_id() -> None:
    other = dataclasses.make_dataclass("FedAvg", [], bases=(FedAvg,), frozen=True)()
    one, two = (dataclasses.replace(tiny(), algorithm=algorithm) for algorithm in (FedAvg(), other))
    assert one.run_id != two.run_id


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_comes_back_from_its_canonical_json(name: str) -> None:
    experiment = EXPERIMENTS[name]
    returned = revived(json.loads(experiment.canonical_json()))
    unplaced = tuple(Tier(tier.name, tier.form, tier.share, tier.checkpoint) for tier in experiment.tiers)
    assert returned == dataclasses.replace(experiment, tiers=unplaced)
    assert returned.run_id == experiment.run_id


def test_experiments_are_frozen_and_hashable() -> None:
    assert hash(tiny()) == hash(tiny())
    for path in ("rounds", "algorithm"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(tiny(), path, 1)


# settings -------------------------------------------------------------------------------------------------------------


def test_settings_reach_inside() -> None:
    base = tiny()
    changed = with_settings(
        base, ["algorithm.lr=1e-2", "task.data.limit=50", "tiers.1.form.depth=1", "tiers.2.num_gpus=0.25", "rounds=9"]
    )
    assert (changed.algorithm.lr, changed.task.data.limit, changed.rounds) == (0.01, 50, 9)  # type: ignore[attr-defined]
    assert [tier.form.depth for tier in changed.tiers] == [1, 1, 3]
    assert [tier.num_gpus for tier in changed.tiers] == [0, 0, 0.25]
    assert base == tiny(), "the experiment itself is left alone"
    assert with_settings(base, []) == base


def test_settings_that_depend_on_each_other_are_applied_at_once() -> None:
    together = ["intermediate.width=64", "target.width=72", "target.heads=8", "tiers.0.form.width=60"]
    changed = with_settings(tiny(), together)
    assert (changed.middle.width, changed.target.width, changed.target.heads) == (64, 72, 8)
    assert changed == with_settings(tiny(), together[::-1])
    with pytest.raises(ValueError, match=r"target\.width=40.*intermediate\.width=64"):
        with_settings(tiny(), together[:1])
    pair = with_settings(tiny(), ["task.data.name=pydoc", "task.family=gpt2", "task.data.max_length=16"])
    assert (pair.task.family, pair.task.inputs.kind) == ("gpt2", "lm")


def test_the_last_word_on_a_field_counts() -> None:
    assert with_settings(tiny(), ["rounds=5", "rounds=7"]).rounds == 7


def test_one_text_column_may_be_given_without_brackets() -> None:
    base = EXPERIMENTS["text"]
    assert with_settings(base, ["task.data.text=review"]).task.data.text == ("review",)
    assert with_settings(base, ["task.data.text=2"]).task.data.text == (2,)
    assert with_settings(base, ["task.data.text=['a', 1]"]).task.data.text == ("a", 1)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", 1),
        ("1e-3", 0.001),
        ("-2.5", -2.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("inf", math.inf),
        ("dirichlet", "dirichlet"),
        ("'3'", "3"),
        ("", ""),
        ("a=b", "a=b"),
        ("../data/x.csv", "../data/x.csv"),
        ("[1, 'b']", (1, "b")),
        ("('a',)", ("a",)),
    ],
)
def test_values_typed_on_the_command_line(text: str, value: Any) -> None:
    assert parsed(text) == value
    assert type(parsed(text)) is type(value)


def test_a_path_may_hold_equals_signs() -> None:
    changed = with_settings(EXPERIMENTS["text"], ["task.data.name=a=b.csv"])
    assert changed.task.data.name == "a=b.csv"


@pytest.mark.parametrize(
    "setting, suggestion",
    [
        ("algorithm.lrr=1", "lr"),
        ("partition.alhpa=1", "alpha"),
        ("round=1", "rounds"),
        ("task.data.limits=1", "limit"),
        ("tiers.0.form.widht=8", "width"),
        ("tiers.7.name=x", "0, 1, 2"),
        ("nothing_like_it=1", "algorithm, batched, chunk"),
    ],
)
def test_an_unknown_field_suggests_the_nearest(setting: str, suggestion: str) -> None:
    with pytest.raises(ValueError) as error:
        with_settings(tiny(), [setting])
    field, message = setting.partition("=")[0], str(error.value)
    named, _, rest = message.removeprefix("--set ").partition(": no such field")
    assert f"{field}.".startswith(f"{named}.")
    assert suggestion in rest


@pytest.mark.parametrize("setting", ["rounds", "=3", ""])
def test_a_setting_without_a_field_or_a_value_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="field=value"):
        with_settings(tiny(), [setting])


@pytest.mark.parametrize("setting", ["rounds.x=1", "algorithm.lr.x=2", "task.data.name.x=2"])
def test_a_number_has_no_fields(setting: str) -> None:
    field = setting.rpartition(".")[0]
    with pytest.raises(ValueError, match=f"{field} has no fields"):
        with_settings(tiny(), [setting])


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
    class Impatient(ProgressListener):
        def finished(self, row: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    runtime = InlineRuntime()
    with pytest.raises(KeyboardInterrupt):
        run(tiny_experiment, runtime=runtime, out=tmp_path, progress=Impatient())
    runtime.close()
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


def test_a_language_model_is_dealt_by_its_topics() -> None:
    base = with_settings(tiny(), ["task.family=gpt2", "task.data.name=pydoc", "partition.scheme=natural"])
    assert base.task.data == dataclasses.replace(tiny().task.data, name="pydoc")
    assert base.task.inputs.kind == TaskConfig(pydoc(), family="gpt2").inputs.kind == "lm"


def test_a_class_of_a_script_has_one_name_in_all_its_processes() -> None:
    """Processes that a script starts know its module as `__mp_main__`."""
    here = dataclasses.make_dataclass("Mine", ["lr"], frozen=True, namespace={"__module__": "__main__"})
    there = dataclasses.make_dataclass("Mine", ["lr"], frozen=True, namespace={"__module__": "__mp_main__"})
    assert canonical(here(1)) == canonical(there(1)) == {"class": "__main__.Mine", "lr": 1}


# without an intermediate form -----------------------------------------------------------------------------------------


def test_an_intermediate_form_is_for_methods_that_have_one(tiny_experiment: Experiment) -> None:
    plain = dataclasses.replace(tiny_experiment, algorithm=FedAvg(), intermediate=None)
    assert plain.middle == plain.target
    assert revived(json.loads(plain.canonical_json())).run_id == plain.run_id
    assert plain.run_id != dataclasses.replace(plain, intermediate=tiny_experiment.intermediate).run_id
    for algorithm in (tiny_experiment.algorithm, fedavg_mid()):
        with pytest.raises(ValueError, match="intermediate=None: must be a form"):
            dataclasses.replace(plain, algorithm=algorithm)
    with pytest.raises(ValueError, match="target=None"):
        Experiment(FedAvg(), plain.task, plain.tiers)
    with pytest.raises(ValueError, match=r"form\.width=\d+: must be at most target\.width=8"):
        dataclasses.replace(plain, target=Form(8, 1, 2))


def test_a_run_without_an_intermediate_form(tiny_experiment: Experiment, tmp_path: Path) -> None:
    plain = dataclasses.replace(tiny_experiment, algorithm=FedAvg(lr=1e-2), intermediate=None)
    hashes = []
    for name, experiment in (("without", plain), ("with", dataclasses.replace(plain, intermediate=plain.target))):
        run(experiment, runtime=InlineRuntime(), out=tmp_path / name)
        hashes.append(load(tmp_path / name).rounds.sort_values("round").state_sha256.tolist())
    assert hashes[0] == hashes[1]
