"""The model card: code that runs where it lies, front matter, and how the model was grown."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientInfo
from fedsim.data.config import sst2
from fedsim.experiment import Experiment
from fedsim.learning.task import TaskConfig
from fedsim.models.checkpoint import Checkpoint
from fedsim.results import card
from tests.support.exported import ONE_OF_A_KIND, picture, task_of, word_pieces, written
from tests.support.family_rows import TAGS


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ONE_OF_A_KIND)
def test_the_code_of_the_card_runs_where_the_card_lies(
    kind: str,
    tmp_path: Path,
    tiny_experiment: Experiment,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    config = task_of(ONE_OF_A_KIND[kind])
    written(config, tmp_path)
    picture("RGB", 30, 20).save(tmp_path / "image.png")
    answers = answers_of(config, tiny_experiment, tmp_path, capsys, monkeypatch)
    if kind == "image":
        assert re.fullmatch(r"LABEL_\d", answers)
    elif kind == "text":
        assert re.fullmatch(r"\['LABEL_\d', 'LABEL_\d'\]", answers)
    elif kind == "tokens":
        assert re.fullmatch(r"\[\('Ada', 'LABEL_\d'\), \('met', 'LABEL_\d'\), \('Bob', 'LABEL_\d'\)\]", answers)
    elif kind == "lm":
        assert answers.startswith("The")
    assert not said


def test_the_code_of_the_card_finds_words_in_word_pieces(
    tmp_path: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataclasses.replace(TAGS, tokenizer=word_pieces(tmp_path / "words"), max_length=4)
    config = task_of(data)
    written(config, tmp_path)
    answers = answers_of(config, tiny_experiment, tmp_path, capsys, monkeypatch)
    assert re.fullmatch(r"\[\('Ada', 'LABEL_\d'\), \('met', 'LABEL_\d'\)\]", answers), "the third word was cut off"


def answers_of(
    config: TaskConfig,
    experiment: Experiment,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """What the card's code prints when it runs in the folder."""
    readme = card.card(told(dataclasses.replace(experiment, algorithm=FedAvg(), task=config)))
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.strip()


def told(experiment: Experiment, **changes: Any) -> card.Deployed:
    """What there is to tell of a model, made up."""
    row = {name: None for name in card.SCORES} | {"round": 0, "num_test_examples": 40}
    row |= {"bytes_up": 0, "bytes_down": 0, "upload_params": None}
    trained = {"round": 1, "bytes_up": 8_000, "bytes_down": 12_000, "upload_params": 2_000}
    scored = {"round": 2, "accuracy": 0.5, "loss": 1.25, "precision": 0.25, "recall": 0.75, "f1": 0.375}
    made_up = {
        "experiment": experiment,
        "form": experiment.target,
        "info": ClientInfo(1, "phone", experiment.tiers[0].form, 1234),
        "round": experiment.rounds,
        "run": {"versions": '{"torch": "2.0"}', "code_sha256": "abc", "git_commit": None, "run_id": experiment.run_id},
        "clients": [row | {"accuracy": 0.1}, row | trained, row | scored],
        "received": {"width.embed": torch.zeros(20, 10), "depth.norm": torch.zeros(3, 2)},
        "private": {"middle.classifier.bias": torch.zeros(7)},
    }
    return card.Deployed(**made_up | changes)


def front_matter(readme: str) -> dict[str, Any]:
    assert readme.startswith("---\n")
    return yaml.safe_load(readme.split("---\n")[1])


def test_the_front_matter_is_what_model_cards_have(tiny_experiment: Experiment) -> None:
    assert front_matter(card.card(told(tiny_experiment))) == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["federated-learning", "model-growth", "fedgrow"],
    }
    known = dataclasses.replace(tiny_experiment, algorithm=FedAvg(), task=TaskConfig(sst2(), "bert"))
    checkpoint = Checkpoint("someone/small: 'bert'", hub=True)
    info = ClientInfo(0, "phone", tiny_experiment.tiers[0].form, 5, checkpoint)
    assert front_matter(card.card(told(known, info=info))) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["federated-learning", "fedavg"],
        "datasets": ["stanfordnlp/sst2"],
        "base_model": "someone/small: 'bert'",
    }


def test_the_card_tells_how_the_model_was_grown(tiny_experiment: Experiment) -> None:
    readme = card.card(told(tiny_experiment))
    for expected in (
        "vit 20x3, fedgrow, participant 1",
        "Method: `fedgrow`, preset `paper`.",
        "Small model: 8x1 (width x depth; 4 heads of 2, feed-forward width 8); trained on the participant's own data",
        "Intermediate form: 16x2",
        "This model: 20x3 (width x depth; 4 heads of 5, feed-forward width 20), after round 2 of 2, seed 0.",
        "Rounds: 0 local, 1 to 2 federated.",
        "Federation: 3 participants, 3 in each round.",
        "`digits`, dealt to the participants by `dirichlet, alpha 0.5`",
        "sent at most 2,000 parameters (0.008 MB) in a round, and received at most 0.012 MB",
        "206 parameters (0.001 MB): `depth`, `width`",
        "7 parameters (0.000 MB): `middle`",
        "1,234 training examples",
        "After round 2; accuracies are shares of examples. The test set holds 40 examples.",
        "| accuracy | 0.5000 |",
        "| loss | 1.2500 |",
        "| precision | 0.2500 |",
        "| f1 | 0.3750 |",
        "research simulation",
        f"Run `{tiny_experiment.run_id}`, sources `abc`.",
        "torch 2.0",
    ):
        assert expected in readme, expected
    assert "accuracy_val |" not in readme, "a score that is not known has no row"
    settings_told = readme.split("```json\n")[1].split("```")[0]
    assert json.loads(settings_told) == json.loads(tiny_experiment.canonical_json())
    assert "http" not in readme


def test_the_card_tells_where_a_small_model_came_from(tiny_experiment: Experiment) -> None:
    checkpoint = Checkpoint("someone/small", hub=True, revision="v2")
    info = ClientInfo(1, "phone", tiny_experiment.tiers[0].form, 5, checkpoint)
    readme = card.card(told(tiny_experiment, info=info, clients=[], received={}))
    assert "from the checkpoint `someone/small` at revision `v2`" in readme
    assert "sent nothing" in readme and "the server sends, after the last round, nothing." in readme
    assert "never scored" in readme


def test_the_card_of_a_model_that_was_not_grown_says_so(tiny_experiment: Experiment) -> None:
    readme = card.card(told(dataclasses.replace(tiny_experiment, algorithm=FedAvg())))
    assert "no small model was grown" in readme
    assert "Intermediate form" not in readme and "preset" not in readme.partition("```json")[0]
