"""What the suites hold: the paper's settings at full size, less of everything at a smaller scale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from baselines.fedavg import FedAvg
from benchmarks import suites
from benchmarks.federations import PUBLIC
from benchmarks.methods import DIGITS, methods
from benchmarks.study import PARTS
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.grown import Grown
from fedsim.algorithm import LocalTraining
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment
from fedsim.learning.augmentation import Augmentation
from fedsim.learning.meter import StepCost
from fedsim.learning.starts import check_start
from fedsim.learning.task import Task
from fedsim.models import Form, Inputs, get_family


def cells(experiments: list[Experiment]) -> dict[tuple[str, int], set[tuple[Any, ...]]]:
    """(data set, participants) -> what Fed-Grow's runs on it have: rounds, epochs, epochs alone, batch, rate."""
    found: dict[tuple[str, int], set[tuple[Any, ...]]] = {}
    for each in experiments:
        if isinstance(grow := each.algorithm, FedGrow):
            key = (each.task.data.name, each.participants)
            row = (each.rounds, grow.epochs, grow.small_epochs, grow.local_epochs, grow.batch_size, grow.lr)
            found.setdefault(key, set()).add(row)
    return found


def test_paper_cv_at_full_size_is_the_released_code():
    experiments = suites.paper_cv()
    assert cells(experiments) == {
        ("cifar10", 10): {(200, 4, 50, 50, 64, 5e-4)},
        ("cifar10", 20): {(200, 8, 100, 100, 64, 5e-4)},
        ("cifar100", 10): {(200, 4, 50, 50, 64, 5e-4)},
        ("cifar100", 20): {(200, 8, 100, 100, 64, 5e-4)},
        ("flowers102", 10): {(100, 40, 200, 200, 64, 5e-4)},
        ("flowers102", 20): {(100, 40, 200, 200, 64, 5e-4)},
    }
    for each in experiments:
        assert [tier.form for tier in each.tiers] == [Form(256, depth, 8) for depth in (2, 3, 4)]
        assert (each.intermediate, each.target) == (Form(320, 4, 8), Form(384, 6, 8))
        assert (each.task.data.image_size, each.task.patch_size, each.task.data.limit) == (224, 16, None)
        assert all(tier.num_gpus == 0.25 for tier in each.tiers)
    dealt = {(each.partition.scheme, each.partition.alpha) for each in experiments}
    assert dealt == {("dirichlet", 0.5), ("dirichlet", 100.0)}


def test_paper_cv_trains_every_method_for_as_long():
    for each in suites.paper_cv():
        if isinstance(each.algorithm, FedAvg | FedGrow):
            expected = {"cifar10": {10: 4, 20: 8}, "cifar100": {10: 4, 20: 8}, "flowers102": {10: 40, 20: 40}}
            assert each.algorithm.epochs == expected[each.task.data.name][each.participants]


def test_paper_cv_augments_images_for_every_method():
    asked = {each.task.augmentation for scale in (1.0, 0.1) for each in suites.paper_cv(scale)}
    assert asked == {Augmentation(crop=(0.08, 1.0), flip=0.5, randaugment=2, magnitude=9, erase=0.25)}


def test_paper_nlp_warms_up_and_decays_for_every_method():
    for each in suites.paper_nlp(0.5):
        assert isinstance(each.algorithm, LocalTraining)
        settings = each.algorithm.settings()
        asked = {"schedule": "linear", "lr_warmup": 0.06, "clip": 1.0, "weight_decay": 0.01, "optimizer": "adamw"}
        assert {name: settings[name] for name in asked} == asked
        assert each.task.dropout == 0.1


def test_paper_nlp_keeps_the_proportions_of_the_released_code():
    # At full size its tokenizer is the hub's; half of it is what can be built anywhere.
    assert cells(suites.paper_nlp(0.5)) == {
        (name, participants): {row}
        for name, row in (
            ("ag_news", (50, 1, 5, 5, 32, 1e-4)),
            ("newsgroups", (100, 5, 50, 50, 32, 3e-4)),
        )
        for participants in (10, 20)
    }


@pytest.mark.parametrize("make", [suites.paper_cv, suites.paper_nlp])
def test_a_smaller_scale_has_the_same_cells_and_less_of_everything(make):
    small, larger = make(0.02), make(0.5)
    assert len(small) == len(larger)
    for less, more in zip(small, larger, strict=True):
        assert less.algorithm.name == more.algorithm.name and less.participants == more.participants
        assert less.rounds < more.rounds and less.target.width < more.target.width
        assert less.task.data.limit < more.task.data.limit
        assert all(tier.num_gpus == 0 for tier in less.tiers), "runs where no GPU is"
        assert [tier.form.depth for tier in less.tiers] == [tier.form.depth for tier in more.tiers]


@pytest.mark.parametrize("make", [suites.quick, suites.baselines, suites.text, suites.scaling, suites.ablations])
def test_no_experiment_is_in_a_suite_twice(make):
    experiments = make()
    assert len({each.run_id for each in experiments}) == len(experiments)


def test_scaling_reaches_ten_thousand_participants():
    populations = {each.participants for each in suites.scaling()}
    assert (min(populations), max(populations)) == (10, 10_000)


def test_the_demo_has_two_regimes_with_the_same_participants():
    """The public model was trained on digits that nobody holds, in either; it is the form of the smallest tier."""
    experiments = suites.quick()
    started = {each.algorithm.name: each for each in experiments if each.start is not None}
    assert {"fedgrow", "fedavg", "heterofl", "fedbrb_like"} < {e.algorithm.name for e in experiments if e.start is None}
    assert {"fedgrow", "fedgrow_no_federation", "fedavg", "local_only"} < started.keys()
    (federation,) = {replace(each, algorithm=experiments[0].algorithm, start=None) for each in experiments}
    assert federation.task.data.skip == PUBLIC
    start = started["fedavg"].start
    assert isinstance(start, Grown)
    check_start(Task(federation.task), federation.tiers[0].form, start.checkpoints[0], seed=0)
    about = Path(start.checkpoints[0].source, "README.md").read_text()
    assert f"first {PUBLIC} training examples" in about and f"skip={PUBLIC}" in about


@pytest.fixture
def ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two BERTs of 2 x 12 numbers where those of 384 would be fetched to."""
    monkeypatch.setenv("FEDSIM_CACHE_DIR", str(tmp_path))
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, "[UNK]"))
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = Inputs("text", 8, vocab_size=5, max_length=128, padding_id=0, end_id=3, settings=POSITIONS)
    for name, depth in (("minilm-l3", 3), ("minilm-l6", 6)):
        folder = tmp_path / "models" / name
        get_family("bert").build(Form(24, depth, heads=12, mlp=96), inputs).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)


POSITIONS = (("max_position_embeddings", 512),)


@pytest.mark.usefixtures("ladder")
def test_every_method_begins_with_real_checkpoints(monkeypatch: pytest.MonkeyPatch):
    """What they fix is not asked for: heads, FFN, positions; the target says how deep it is."""
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (1, 1))))  # takes much longer
    smoke = suites.checkpoints(0.01)
    assert {each.algorithm.name for each in smoke} == {each.name for each in methods(DIGITS)}
    assert len({each.run_id for each in smoke}) == len(smoke)
    first = smoke[0]
    assert [tier.form.depth for tier in first.tiers] == [3, 6] and first.task.settings == POSITIONS
    assert (first.target.depth, first.target.heads, first.target.inner, first.target.width) == (7, 12, 96, 24)
    assert first.rounds == 1 and first.task.data.limit == 60
    for experiment in smoke:
        assert cost_of(experiment, {}).mean("upload_params") >= 0
    minute = suites.checkpoints(0.001)
    assert minute[0].task == first.task and {each.algorithm.leaves for each in minute} == {
        each.algorithm.leaves for each in smoke
    }, "one method of each class"
    whole = suites.checkpoints()[0]
    assert whole.target.depth == 12 and whole.rounds == 20 and whole.task.data.limit is None


def test_checkpoints_that_were_not_fetched_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDSIM_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="'cache:minilm-l3': must be fetched first: fedsim models fetch minilm-l3"):
        suites.checkpoints()


@pytest.mark.usefixtures("ladder")
def test_the_study_takes_rates_that_its_grid_has():
    """Where a part has no grid of its own, rates are those of the same task among strangers."""
    grid = suites.study_grid()
    assert len({each.run_id for each in grid}) == len(grid)
    assert all(each.rounds == each.eval_every for each in grid)
    for name, part in PARTS.items():
        assert bool(part.grid()) == bool(part.grid_rounds)
        tried = part if part.grid_rounds else PARTS[name.replace("ancestor", "strangers")]
        for method, rate in part.rates.items():
            assert rate in tried.tried_for(method), (name, method)
