"""A run knows what it read: data, tokenizer and checkpoints count by content, not by path."""

import dataclasses
import os
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from baselines.fedavg import FedAvg, fedavg_small
from baselines.lora import fedit
from fedgrow_algo.grown import Grown
from fedsim.core.canonical import canonical
from fedsim.data import DataConfig, Partition, content, prepared
from fedsim.data.source import _pinned
from fedsim.data.source import load as load_data
from fedsim.engine.cohort import members
from fedsim.engine.content import Content, content_of, pinned
from fedsim.engine.inbox import Inbox
from fedsim.experiment import Experiment, from_pretrained
from fedsim.learning.task import TaskConfig, load_task
from fedsim.models.checkpoint import Checkpoint
from fedsim.results.machine import SameEnvironment
from fedsim.results.provenance import code_sha256
from fedsim.results.store import RunStore
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import RunFailed, _participant
from fedsim.sweeps.runner import run_all
from tests.support.checkpoints import saved
from tests.support.inline_runs import Cut, Interrupted, Told, inline


HASHES = r"sha256 [0-9a-f]{16} then, [0-9a-f]{16} now"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    write_texts(path)
    return path


def write_texts(path: Path, flip: int = 0) -> None:
    path.write_text("text,label\n" + "".join(f"text {i},{(i + flip) % 2}\n" for i in range(60)))


def of_texts(path: Path, tiny_experiment: Experiment, **changes: Any) -> Experiment:
    data = DataConfig(str(path), text=("text",), label="label", num_classes=2, max_length=16)
    task = TaskConfig(data, "bert")
    method = fedavg_small(epochs=1, batch_size=16)
    return dataclasses.replace(
        tiny_experiment, task=task, algorithm=method, partition=Partition("iid"), rounds=2, **changes
    )


def sweep(experiments: list[Experiment], out: Path) -> tuple[list[int], str, list[RunFailed]]:
    """The rounds that were computed, what was said, and what failed."""
    progress, said = Told(), StringIO()
    console = Console(file=said, width=1000)
    failures = run_all(experiments, out=out, make_runtime=InlineRuntime, progress=progress, console=console)
    return progress.rounds, said.getvalue(), failures


# files, by content ----------------------------------------------------------------------------------------------------


def test_a_file_that_changes_is_read_again_and_one_that_does_not_is_not(texts: Path) -> None:
    config = DataConfig(str(texts), text=("text",), label="label", num_classes=2, max_length=16)
    first = load_data(config, None)
    assert load_data(config, None) is first
    write_texts(texts, flip=1)  # the same size; most file systems also give it another time
    os.utime(texts, ns=(1, 1))
    second = load_data(config, None)
    assert second is not first and second.fingerprint != first.fingerprint
    assert not torch.equal(second.train.labels, first.train.labels)
    write_texts(texts)
    assert load_data(config, None).fingerprint == first.fingerprint, "the same content by another time"


def test_every_cell_counts_and_its_place_in_the_file_does_not(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(20)], "label": np.arange(20) % 2, "other": 7})

    def fingerprint(frame: Any, name: str) -> str:
        frame.to_parquet(tmp_path / name)
        settings: Any = {"text": ("text",), "label": "label", "num_classes": 2, "max_length": 16}
        return load_data(DataConfig(str(tmp_path / name), **settings), None).fingerprint

    whole = fingerprint(frame, "a.parquet")
    assert fingerprint(frame[["other", "label", "text"]], "b.parquet") == whole
    for number, (row, column, value) in enumerate([(0, "text", "text 0."), (7, "text", ""), (13, "label", 0)]):
        changed = frame.copy()
        changed.loc[row, column] = value
        assert fingerprint(changed, f"c{number}.parquet") != whole, (row, column)


@pytest.mark.parametrize("seed", range(5))
def test_any_byte_and_any_name_in_a_folder_changes_its_hash(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in ("a/1.bin", "a/b/2.bin", "c.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(rng.bytes(50))
    (tmp_path / ".hidden").write_text("no part of it")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")

    def whole_of_it() -> str:
        return content.sha256s(tmp_path.parent)[str(tmp_path)]

    before, whole = content.sha256s(tmp_path), whole_of_it()
    assert list(before) == [str(tmp_path / "a"), str(tmp_path / "c.bin")]
    (tmp_path / ".hidden").write_text("still not")
    assert whole_of_it() == whole

    victim = tmp_path / ("a/1.bin", "a/b/2.bin", "c.bin")[seed % 3]
    flipped = bytearray(victim.read_bytes())
    flipped[rng.integers(50)] ^= 1 << int(rng.integers(8))
    victim.write_bytes(flipped)
    os.utime(victim, ns=(1, 1))
    changed = [path for path, found in content.sha256s(tmp_path).items() if found != before[path]]
    assert changed == [str(victim if seed % 3 == 2 else tmp_path / "a")] and whole_of_it() != whole
    victim.rename(victim.with_name("renamed"))
    assert whole_of_it() not in (whole, "")


def test_content_that_an_experiment_names_is_held_to_it(texts: Path, tiny_experiment: Experiment) -> None:
    experiment = of_texts(texts, tiny_experiment)
    named = pinned(experiment, None)
    assert named.run_id == experiment.run_id and canonical(named) == canonical(experiment)
    assert content_of(named, None) == content_of(experiment, None)
    with pytest.raises(ValueError, match=r"task\.data\.sha256='abc': must be 64 digits"):
        dataclasses.replace(experiment.task.data, sha256="abc")
    other = dataclasses.replace(experiment.task.data, sha256="0" * 64)
    with pytest.raises(ValueError, match=rf"task\.data\.name='{texts}': its content has changed: sha256 0{{64}} then"):
        load_data(other, None)


def test_what_is_not_known_of_one_is_not_compared() -> None:
    old, new = Content("1" * 64, None, {"a": "1" * 64}), Content("2" * 64, None, {"a": "2" * 64, "b": "3" * 64})
    assert new.change_from(new) is None and new.change_from(Content()) is None
    said = f"a has changed: sha256 {'1' * 16} then, {'2' * 16} now; b is new"
    assert new.change_from(old) == said
    assert old.change_from(new) == f"a has changed: sha256 {'2' * 16} then, {'1' * 16} now; b is gone"
    assert dataclasses.replace(new, data_sha256="1" * 64).change_from(old) is None, "read the same from other files"
    unnamed = Content("1" * 64).change_from(Content("2" * 64))
    assert unnamed == f"what is read has changed: sha256 {'2' * 16} then, {'1' * 16} now"


# runs, by content -----------------------------------------------------------------------------------------------------


def test_a_finished_run_of_other_data_is_computed_again_and_kept_aside(
    texts: Path, tiny_experiment: Experiment, tmp_path: Path
) -> None:
    out, experiment = tmp_path / "out", of_texts(texts, tiny_experiment)
    assert sweep([experiment], out)[0] == [0, 1, 2]
    old = load(out)
    os.utime(texts, ns=(1, 1))
    rounds, said, _ = sweep([experiment], out)
    assert rounds == [] and "finished before" in said, "another time is no other content"

    write_texts(texts, flip=1)
    rounds, said, failures = sweep([experiment], out)
    assert rounds == [0, 1, 2] and not failures
    assert re.search(rf"computed again, {texts} has changed: {HASHES}; what there was is moved to {out}/outdated", said)
    new = load(out)
    assert list(new.runs.run_id) == list(old.runs.run_id) and len(new.rounds) == 3
    assert new.runs.data_sha256[0] != old.runs.data_sha256[0]
    assert list(new.rounds.state_sha256) != list(old.rounds.state_sha256)
    kept = out / "outdated" / f"{experiment.run_id}.1"
    assert list(pd.read_parquet(kept / "rounds.parquet").state_sha256) == list(old.rounds.state_sha256)
    assert (kept / "checkpoint" / "manifest.json").exists()
    assert sweep([experiment], out)[0] == []


def test_a_cut_run_is_not_resumed_over_other_data(texts: Path, tiny_experiment: Experiment, tmp_path: Path) -> None:
    out, whole, experiment = tmp_path / "out", tmp_path / "whole", of_texts(texts, tiny_experiment)
    inline(experiment, whole)
    with pytest.raises(Interrupted):
        inline(experiment, out, progress=Cut(1))
    write_texts(texts, flip=1)
    rounds, _, (failure,) = sweep([experiment], out)
    assert rounds == [] and re.search(rf"{texts} has changed: {HASHES}; bring back", str(failure))
    (row,) = load(out).runs.to_dict("records")
    assert row["status"] == "failed" and "has changed" in row["error"]
    assert row["data_sha256"] == load(whole).runs.data_sha256[0], "of what its rounds have read"
    assert list(load(out).rounds["round"]) == [0, 1]

    write_texts(texts)
    rounds, _, failures = sweep([experiment], out)
    assert rounds == [2] and not failures
    assert list(load(out).rounds.state_sha256) == list(load(whole).rounds.state_sha256)


def test_a_sweep_is_not_joined_by_runs_of_other_data(texts: Path, tiny_experiment: Experiment, tmp_path: Path) -> None:
    out, experiment = tmp_path / "out", of_texts(texts, tiny_experiment)
    sweep([experiment], out)
    write_texts(texts, flip=1)
    second = dataclasses.replace(experiment, seed=1)
    with pytest.raises(ValueError, match=rf"holds run {experiment.run_id}, which has read .*{texts} has ch.*{HASHES}"):
        sweep([second], out)
    digits = dataclasses.replace(tiny_experiment, rounds=1)
    assert sweep([digits], out)[0] == [0, 1], "other data may join"
    assert sweep([experiment, second], out)[0] == [0, 1, 2] * 2, "all that have read them are computed again"


def test_a_sweep_is_joined_by_runs_that_begin_with_another_public_model(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    """Two names may hold two contents."""
    task, form, out = load_task(tiny_experiment.task, None), tiny_experiment.tiers[0].form, tmp_path / "out"
    experiments = []
    for seed in (0, 1):
        saved(task.module(form, task.fresh(form, seed)), tmp_path / str(seed))
        start = Grown((Checkpoint(str(tmp_path / str(seed))),))
        method = fedavg_small(epochs=1)
        experiments.append(dataclasses.replace(tiny_experiment, algorithm=method, start=start, rounds=1))
    for experiment in experiments:
        assert sweep([experiment], out)[0] == [0, 1]
    assert load(out).runs.checkpoints_sha256.nunique() == 2


def replace_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_readme(folder: Path) -> None:
    (folder / "README.md").write_text("about the model")


@pytest.mark.parametrize(("change", "again"), [(replace_weights, True), (write_readme, False)])
def test_weights_that_are_replaced_count_and_what_is_written_about_them_does_not(
    tiny_experiment: Experiment, tmp_path: Path, change: Callable[[Path], None], again: bool
) -> None:
    out, task, folder = tmp_path / "out", load_task(tiny_experiment.task, None), tmp_path / "model"
    form = tiny_experiment.tiers[0].form
    saved(task.module(form, task.fresh(form, 5)), folder)
    tier = from_pretrained("small", tiny_experiment.task.family, str(folder))
    experiment = dataclasses.replace(
        tiny_experiment, tiers=(tier, *tiny_experiment.tiers[1:]), algorithm=FedAvg(epochs=1), rounds=1
    )
    assert sweep([experiment], out)[0] == [0, 1]
    before = load(out).runs
    change(folder)
    rounds, said, _ = sweep([experiment], out)
    assert rounds == ([0, 1] if again else [])
    assert bool(re.search(rf"{folder}/model\.safetensors has changed: {HASHES}", said)) == again
    assert (load(out).runs.checkpoints_sha256[0] != before.checkpoints_sha256[0]) == again
    assert load(out).runs.data_sha256[0] == before.data_sha256[0]


def test_checkpoints_that_an_algorithm_names_count(tiny_experiment: Experiment, tmp_path: Path) -> None:
    task, form, folder = load_task(tiny_experiment.task, None), tiny_experiment.target, tmp_path / "base"
    saved(task.module(form, task.fresh(form, 5)), folder)
    method = fedit(base=Checkpoint(str(folder)), epochs=1)
    experiment = dataclasses.replace(tiny_experiment, algorithm=method, rounds=1)
    before = content_of(experiment, None)
    assert before.checkpoints_sha256 is not None and str(folder / "model.safetensors") in before.files
    first = pinned(experiment, None)
    assert first.run_id == experiment.run_id and first.algorithm != experiment.algorithm
    replace_weights(folder)
    change = content_of(experiment, None).change_from(before)
    assert change is not None and re.fullmatch(rf"{folder}/model\.safetensors has changed: {HASHES}", change)
    with pytest.raises(ValueError, match="its content has changed"):
        content_of(first, None)


@pytest.mark.parametrize("prepared_stay", [True, False])
def test_data_that_change_while_a_sweep_runs_are_not_read(
    texts: Path, tiny_experiment: Experiment, tmp_path: Path, prepared_stay: bool
) -> None:
    class Swap(Told):
        def finished(self, row: dict[str, Any]) -> None:
            super().finished(row)
            write_texts(texts, flip=1)
            _pinned.cache_clear()  # as another process would look
            if not prepared_stay:
                prepared.clean()

    experiments = [of_texts(texts, tiny_experiment, seed=seed) for seed in (0, 1)]
    if prepared_stay:
        assert run_all(experiments, out=tmp_path / "out", make_runtime=InlineRuntime, progress=Swap()) == []
        assert load(tmp_path / "out").runs.data_sha256.nunique() == 1
        return
    with pytest.raises(ValueError, match=rf"{texts}': its content has changed"):
        run_all(experiments, out=tmp_path / "out", make_runtime=InlineRuntime, progress=Swap())
    assert set(load(tmp_path / "out").rounds.seed) == {0}


@pytest.mark.parametrize("part", ["data", "checkpoint"])
def test_a_process_that_finds_something_else_makes_no_participant(
    texts: Path, tiny_experiment: Experiment, tmp_path: Path, part: str
) -> None:
    experiment, folder = of_texts(texts, tiny_experiment), tmp_path / "model"
    task = load_task(experiment.task, None)
    form = experiment.tiers[0].form
    saved(task.module(form, task.fresh(form, 5)), folder)
    tiers = (from_pretrained("small", "bert", str(folder)), *experiment.tiers[1:])
    experiment = pinned(dataclasses.replace(experiment, tiers=tiers), None)
    if part == "data":  # prepared anew: what was prepared before is gone, as it never was on another node
        write_texts(texts, flip=1)
        prepared.clean()
    else:
        replace_weights(folder)
    member = next(each for each in members(experiment, task) if each.info.checkpoint)
    with pytest.raises(ValueError, match=rf"{texts if part == 'data' else folder}': its content has changed: sha256"):
        _participant(SameEnvironment.here(str(tmp_path), None), experiment, member, None, {}, Inbox(), False)


def test_the_store_of_a_run_without_hashes_takes_it_as_it_is(tiny_run: Path, tiny_experiment: Experiment) -> None:
    store = RunStore(tiny_run, tiny_experiment.run_id, code_sha256(tiny_experiment.algorithm), Content("0" * 64))
    assert store.status() == "outdated" and "sha256 0000" not in str(store.content_read())
    store.content = Content()
    assert store.status() == "finished"
