"""Fairness: what stands in one table met one federation, or is refused before anything starts."""

import dataclasses

import pytest

from baselines.fedavg import FedAvg
from benchmarks import suites
from fedsim.cli.sweep import LISTED
from fedsim.data.config import EMBEDDED
from fedsim.engine.cohort import members
from fedsim.experiment import Experiment, with_settings
from fedsim.models.checkpoint import Checkpoint
from fedsim.sweeps import fairness
from fedsim.sweeps.fairness import check_fair
from fedsim.sweeps.suites import arguments_of, suites_in


@pytest.fixture
def other(tiny_experiment: Experiment) -> Experiment:
    return dataclasses.replace(tiny_experiment, algorithm=FedAvg())


@pytest.fixture
def undealt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "load_task", lambda *_: pytest.fail("data were loaded"))


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("validation_share=0.2", "validation_share is 0.1 and 0.2"),
        ("rounds=3", "rounds is 2 and 3"),
        ("tiers.1.share=2.0", "tiers.1.share is 1 and 2"),
        ("tiers.1.name=other", "tiers.1.name is 'tablet' and 'other'"),
    ],
)
def test_another_federation_in_the_same_table_is_refused(
    tiny_experiment: Experiment, other: Experiment, setting: str, expected: str
) -> None:
    grown = dataclasses.replace(tiny_experiment, participants=5)
    changed = with_settings(dataclasses.replace(other, participants=5), [setting])
    with pytest.raises(ValueError) as refused:
        check_fair([grown, dataclasses.replace(other, participants=5), changed], None)
    message = str(refused.value)
    assert message.startswith("fedgrow (paper), seed 0 and fedavg, seed 0 ") and message.endswith(f": {expected}")


def test_a_smallest_shard_is_refused_only_where_it_changes_the_shards(
    tiny_experiment: Experiment, other: Experiment
) -> None:
    same, stricter = (with_settings(other, [f"partition.min_size={size}"]) for size in (9, 34))
    check_fair([tiny_experiment, same], None)
    with pytest.raises(ValueError, match=r"partition\.min_size is 10 and 34$"):
        check_fair([tiny_experiment, stricter], None)


@pytest.mark.usefixtures("undealt")
@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "participants=6",
        "cohort=2",
        "partition.alpha=1.0",
        "partition.scheme=iid",
        "task.data.limit=60",
        "tiers.0.form.depth=2",
    ],
)
def test_what_stands_in_another_table_may_differ(tiny_experiment: Experiment, other: Experiment, setting: str) -> None:
    check_fair([tiny_experiment, with_settings(other, [setting, "validation_share=0.2"])], None)


@pytest.mark.usefixtures("undealt")
def test_where_a_run_is_computed_and_how_it_is_scored_is_no_part_of_the_federation(
    tiny_experiment: Experiment, other: Experiment
) -> None:
    changed = with_settings(other, ["tiers.0.num_cpus=2.0", "eval_every=2", "chunk=1", "target.depth=4"])
    check_fair([tiny_experiment, changed], None)


def test_starting_from_a_checkpoint_or_not_is_told_apart(tiny_experiment: Experiment, other: Experiment) -> None:
    tier, *tiers = other.tiers
    started = dataclasses.replace(tier, checkpoint=Checkpoint("nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        check_fair([tiny_experiment, dataclasses.replace(other, tiers=(started, *tiers))], None)


def test_data_are_dealt_once_a_way_of_dealing(
    tiny_experiment: Experiment, other: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = []
    monkeypatch.setattr(fairness, "members", lambda *given: dealt.append(given) or members(*given))
    patched = with_settings(other, ["task.patch_size=2"])
    check_fair([tiny_experiment, other, patched, *[tiny_experiment, other] * 50], None)
    assert len(dealt) == 2


def test_all_suites_of_embedded_data_are_fair() -> None:
    found = set()
    for name, make in suites_in(suites).items():
        if name in ("checkpoints", "gates", "study-grid"):  # some of it is to be fetched first
            continue
        experiments = make(**arguments_of(make, LISTED))
        if all(experiment.task.data.name in EMBEDDED for experiment in experiments):
            check_fair([dataclasses.replace(each, seed=seed) for each in experiments for seed in (0, 1)], None)
            found.add(name)
    assert found >= {"quick", "baselines", "baselines-grid", "ablations", "ablations-grid", "scaling"}
