"""An experiment is its numbers: identity, settings, and what a method without an intermediate form is asked for."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from baselines.fedavg import FedAvg, fedavg_mid
from benchmarks import suites
from benchmarks.suites import tiny
from fedsim.core.canonical import canonical, revived
from fedsim.data.config import DataConfig, pydoc
from fedsim.data.partition import Partition
from fedsim.experiment import Experiment, Tier, parsed, with_settings
from fedsim.learning.task import TaskConfig
from fedsim.models import Form
from fedsim.models.checkpoint import Checkpoint
from fedsim.results.tables import load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from tests.support.every_field import FIELDS


PLACEMENT = {"num_cpus", "num_gpus", "memory_mb", "resources", "gpu_fraction", "sha256", "call_seconds"}
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
        ("nothing_like_it=1", "algorithm, batched, call_seconds"),
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
