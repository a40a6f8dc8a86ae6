"""Whole runs on every kind of data: embedded text, and real images and sentences from FEDSIM_DATA_DIR."""

from dataclasses import replace

import pytest

import fedsim
from benchmarks.suites import tiny
from fedgrow_algo.fedgrow import FedGrow
from fedsim.core import environment
from fedsim.data.partition import Partition
from fedsim.data.source import cifar10, pydoc, sst2
from fedsim.experiment import Experiment
from fedsim.learning.task import TaskConfig


def needs(name: str) -> None:
    folder = environment.data_dir()
    if folder is None:
        pytest.skip(f"FEDSIM_DATA_DIR is not set: {name} is looked up there")


def short(task: TaskConfig, **changes) -> Experiment:
    experiment = tiny()
    assert isinstance(experiment.algorithm, FedGrow)
    algorithm = replace(experiment.algorithm, preset="preserving", small_epochs=3, local_epochs=1, batch_size=16)
    return replace(experiment, algorithm=algorithm, task=task, rounds=2, **changes)


def last_round(experiment: Experiment, out):
    results = fedsim.run(experiment, out=out, runtime="inline")
    assert results.runs.status.tolist() == ["finished"]
    return results, results.rounds.iloc[-1]


def test_language_modelling_on_the_text_inside_cpython_split_by_topic(tmp_path):
    task = TaskConfig(pydoc(max_length=32, limit=600), family="gpt2")
    results, last = last_round(short(task, partition=Partition("natural")), tmp_path)
    first = results.rounds.iloc[0]
    assert last.loss_mean < first.loss_mean < 5.55, "ln(258) = 5.55 is what knowing nothing costs"
    assert results.runs.alpha.isna().all() and results.runs.partition[0] == "natural"
    assert last.accuracy_local_mean == last.accuracy_val_mean, "without labels: the participant's own held-out part"


@pytest.mark.data
def test_cifar10(tmp_path):
    needs("cifar10")
    task = TaskConfig(cifar10(limit=300), patch_size=8)
    results, last = last_round(short(task, partition=Partition("dirichlet", alpha=1.0, min_size=30)), tmp_path)
    assert results.clients.num_test_examples.dropna().unique().tolist() == [300]
    assert last.bytes_up == last.seam_bytes_up > 0


@pytest.mark.data
def test_sst2(tmp_path):
    needs("sst2")
    task = TaskConfig(sst2(limit=300, max_length=48), family="gpt2")
    results, last = last_round(short(task, partition=Partition("iid")), tmp_path)
    assert results.runs.dataset.tolist() == ["sst2"] and results.runs.family.tolist() == ["gpt2"]
    assert 0.3 < last.accuracy_mean < 0.9 and last.train_loss < 1.0
