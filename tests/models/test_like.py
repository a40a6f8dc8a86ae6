"""What an experiment takes from the checkpoints it names: constants, head size, FFN ratio."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from baselines.fedavg import FedAvg
from fedgrow_algo.grown import Grown
from fedsim.cli import main
from fedsim.core.canonical import revived
from fedsim.engine.cohort import check_checkpoints
from fedsim.experiment import Experiment, Tier, from_pretrained, with_settings
from fedsim.learning.task import TaskConfig
from fedsim.models import Form, Like, get_family
from fedsim.models.checkpoint import Checkpoint
from tests.support.checkpoints import built, edited, saved, with_task
from tests.support.family_rows import ROWS, TEXTS


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")

ROW = ROWS["bert-text"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
FIXED = (("hidden_act", "relu"), ("max_position_embeddings", 20), ("vocab_size", 16))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Two models that one lab has published: of two depths, with longer texts and a larger table than the task needs,
    another activation, and their tokenizer beside them."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", mask_token="[MASK]"
    )
    tokenizer.save_pretrained(tmp_path / "two")
    row = with_task(ROW, data=dataclasses.replace(TEXTS, tokenizer=str(tmp_path / "two")), settings=FIXED)
    for name, depth in (("two", 2), ("four", 4)):
        saved(built(row, Form(16, depth, heads=2, mlp=48)), tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("two", "four")}


def of_checkpoints(folders: dict[str, str], **changes: Any) -> Experiment:
    """What a person writes who names two checkpoints and how much larger the target is."""
    data = dataclasses.replace(TEXTS, tokenizer=folders["two"])
    tiers = tuple(from_pretrained(name, "bert", folder) for name, folder in folders.items())
    settings: dict[str, Any] = {"target": Like(depth=6), **changes}
    return Experiment(FedAvg(), TaskConfig(data, "bert"), tiers, **settings)


def test_an_experiment_is_complete_with_its_checkpoints(folders: dict[str, str]) -> None:
    experiment = of_checkpoints(folders, intermediate=Like(), target=Like(width=24, depth=6))
    assert experiment.task.settings == FIXED
    two, four = experiment.forms
    assert experiment.intermediate == four and type(experiment.intermediate) is Form
    assert experiment.target == Form(24, 6, heads=3, mlp=72, kv_heads=3, head_dim=8, norm_eps=1e-12)
    check_checkpoints(experiment)
    said = of_checkpoints(folders, intermediate=four, target=experiment.target)
    said = dataclasses.replace(said, task=dataclasses.replace(said.task, settings=FIXED))
    assert (said, said.run_id) == (experiment, experiment.run_id)
    assert two == dataclasses.replace(four, depth=2)


def test_what_everyone_starts_from_decides_as_well(folders: dict[str, str]) -> None:
    tiers = (Tier("phone", Form(16, 1, heads=2, mlp=48)),)
    start = Grown((Checkpoint(folders["two"]), Checkpoint(folders["four"])))
    experiment = dataclasses.replace(of_checkpoints(folders), tiers=tiers, start=start, target=Like(depth=5))
    assert experiment.target == Form(16, 5, heads=2, mlp=48)
    task = dataclasses.replace(experiment.task, settings=())
    assert dataclasses.replace(experiment, task=task).task.settings == FIXED
    assert dataclasses.replace(experiment, task=task, start=None).task.settings == ()


def test_inspect_answers_at_the_first_try(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "published.py").write_text(
        "import fedsim\nfrom baselines.fedavg import FedAvg\n\n\ndef study():\n"
        f"    data = fedsim.DataConfig('notes.csv', text=('note',), label='kind', max_length=12, num_classes=3,\n"
        f"                             tokenizer={folders['two']!r})\n"
        f"    tiers = tuple(fedsim.from_pretrained(name, 'bert', name) for name in {tuple(folders.values())!r})\n"
        "    task = fedsim.TaskConfig(data, 'bert')\n"
        "    return fedsim.Experiment(FedAvg(), task, tiers, target=fedsim.Like(depth=6))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["inspect", "published:study", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["inspect", "published:study", "--json", "--set", "target.depth=7", "rounds=2"]) == 0
    assert json.loads(capsys.readouterr().out)["target_params"] > first["target_params"]
    assert main(["inspect", "published:study", "--set", "task.settings=(('hidden_act', 'gelu'),)"]) == 2
    assert "hidden_act is 'relu', here it is 'gelu'" in capsys.readouterr().err


def test_settings_and_replacements_keep_what_was_put_in(folders: dict[str, str]) -> None:
    experiment = of_checkpoints(folders)
    deeper = with_settings(experiment, ["target.depth=7", "seed=3"])
    assert (deeper.target, deeper.task) == (dataclasses.replace(experiment.target, depth=7), experiment.task)
    again = dataclasses.replace(experiment, target=Like(width=32))
    assert again.target == Form(32, 4, heads=4, mlp=96, kv_heads=4, head_dim=8, norm_eps=1e-12)
    assert with_settings(experiment, ["task.settings=()"]) == experiment


def test_a_stored_config_is_what_it_was_whatever_has_become_of_the_files(folders: dict[str, str]) -> None:
    experiment = of_checkpoints(folders)
    stored = json.loads(experiment.canonical_json())
    assert revived(stored) == experiment
    edited(Path(folders["two"]), max_position_embeddings=30, use_cache=False)
    untold = dataclasses.replace(experiment.task, settings=(("vocab_size", 16),))
    with pytest.raises(ValueError, match="max_position_embeddings is 20, but 30 in tier 'two'"):
        dataclasses.replace(experiment, task=untold)
    assert revived(stored) == experiment and revived(stored).run_id == experiment.run_id


def test_experiments_that_say_everything_are_as_before(tiny_experiment: Experiment, tmp_path: Path) -> None:
    form = tiny_experiment.tiers[0].form
    checkpoint = saved(built(ROWS["vit"], form), tmp_path)
    tiers = (dataclasses.replace(tiny_experiment.tiers[0], checkpoint=checkpoint), *tiny_experiment.tiers[1:])
    experiment = dataclasses.replace(tiny_experiment, tiers=tiers)
    assert experiment.task == tiny_experiment.task


def test_a_vocabulary_without_its_tokenizer_is_asked_for(folders: dict[str, str]) -> None:
    for folder in folders.values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            Path(folder, name).rename(Path(folder).parent / name)
    elsewhere = str(Path(folders["two"]).parent)
    data = dataclasses.replace(TEXTS, tokenizer=elsewhere)
    tiers = tuple(from_pretrained(name, "bert", folder) for name, folder in folders.items())
    experiment = Experiment(FedAvg(), TaskConfig(data, "bert"), tiers, target=Like(depth=6))
    assert experiment.task.settings == FIXED[:2]
    with pytest.raises(ValueError, match=r"vocab_size is 16, here it is 13.*only padded"):
        check_checkpoints(experiment)


@pytest.mark.parametrize(
    "words, make",
    [
        (r"target\.width=20: must be a multiple of 8, for whole heads of 8", lambda: Like(width=20, depth=6)),
        (r"form\.width=True: must be a whole number", lambda: Like(width=True)),
        (r"form\.depth=0: must be a whole number of at least 1", lambda: Like(depth=0)),
        (r"target\.depth=2: must be at least intermediate\.depth=4", lambda: Like(depth=2)),
    ],
)
def test_what_no_form_can_be_like_is_refused(words: str, make: Any, folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        of_checkpoints(folders, intermediate=Like(), target=make())


def test_a_tier_has_a_form_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"^tiers\.form=Like\(width=None, depth=2\): must be a Form"):
        Tier("phone", Like(depth=2))


def test_an_epsilon_goes_with_the_width_as_the_familys_own() -> None:
    for name, wanted in (("gpt2-lm", 1e-3 * 16 / 24), ("bert-text", 1e-3)):
        row = ROWS[name]
        forms = (Form(16, 2, heads=2, norm_eps=1e-3), Form(8, 4, heads=2))
        found = Like(width=24).beside(forms, get_family(row.config.family), row.task.inputs, "target")
        assert dataclasses.replace(found, norm_eps=None) == Form(24, 4, heads=3)
        assert found.norm_eps == pytest.approx(wanted)
