"""What a checkpoint was trained to be given is what it is given here: images, tokens; and what it holds are numbers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim.data.config import DataConfig, cifar10
from fedsim.learning.starts import check_start
from fedsim.learning.task import TaskConfig
from fedsim.models.checkpoint import Checkpoint
from fedsim.results.export import image_processor
from tests.support.checkpoints import SEED, built, edited, read, saved, with_task
from tests.support.family_rows import ROWS, TEXTS, TIED, Row
from tests.support.side_tokenizers import words_from


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")

COLOUR = Row(TaskConfig(cifar10(image_size=8), "vit"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def checked(folder: Path, **data: Any) -> None:
    config = dataclasses.replace(COLOUR.config, data=dataclasses.replace(COLOUR.config.data, **data))
    check_start(Row(config).task, COLOUR.small, Checkpoint(str(folder)), SEED)


def prepared(folder: Path, **fields: Any) -> Path:
    """A checkpoint that comes with an image processor's file."""
    saved(built(COLOUR), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


OURS = ({}, {"image_mean": MEAN, "image_std": STD})


@pytest.mark.parametrize("fields", OURS, ids=["halves", "ImageNet's"])
def test_images_prepared_as_here_are_accepted(fields: dict[str, Any], tmp_path: Path) -> None:
    saved(built(COLOUR), tmp_path)
    image_processor(dataclasses.replace(COLOUR.config.data, **fields)).save_pretrained(tmp_path)
    checked(tmp_path, **fields)
    other = OURS[fields == OURS[0]]
    with pytest.raises(
        ValueError, match=r"^task\.data\.image_mean=\(.*: must be \(0\.\d.*, as in the preprocessor_config"
    ):
        checked(tmp_path, **other)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({}, {}),
        ({"image_mean": [*MEAN], "image_std": [*STD], "size": 8}, {"image_mean": MEAN, "image_std": STD}),
        ({"image_mean": 0.5, "image_std": 0.5, "resample": 2, "size": {"height": 8, "width": 8}}, {}),
        ({"do_normalize": False}, {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, {}),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, {}),
        ({"do_resize": False, "resample": 3, "size": 224}, {}),
    ],
)
def test_what_says_the_same_in_other_words_is_accepted(
    fields: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    checked(prepared(tmp_path, **fields), **data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_mean": [*MEAN]},
            r"^task\.data\.image_mean=\(\): must be \(0\.485, 0\.456, 0\.406\), as in .*checkpoint",
        ),
        ({"image_std": 1.0}, r"^task\.data\.image_std=\(\): must be \(1\.0, 1\.0, 1\.0\)"),
        ({"image_mean": [0.5]}, r"^task\.data\.image_mean=\(\): must be \(0\.5,\)"),
        ({"do_rescale": False}, r"^task\.data\.image_mean=\(\): must be \(0\.0019"),
        ({"resample": 3}, r"^checkpoint\.path=.*says resample=3, here it is 2; a copy without that file"),
        ({"size": {"shortest_edge": 8}}, r"^checkpoint\.path=.*says size=\{'shortest_edge': 8\}, here it is"),
        ({"size": 16}, r"^checkpoint\.path=.*says size=16, here"),
        ({"do_center_crop": True}, r"^checkpoint\.path=.*says do_center_crop=True, here it is False"),
        ({"image_mean": "grey"}, r"^checkpoint\.path=.*preprocessor_config\.json could not be read"),
    ],
)
def test_images_prepared_otherwise_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        checked(folder)
    assert str(tmp_path) in str(error.value)
    (folder / "preprocessor_config.json").unlink()
    checked(folder)


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    (folder / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(ValueError, match=r"^checkpoint\.path=.*preprocessor_config\.json could not be read"):
        checked(folder)


# weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["vit", "bert-text", "gpt2-lm"])
def test_weights_that_are_no_numbers_are_named(name: str, value: float, tmp_path: Path) -> None:
    row = ROWS[name]
    module = built(row)
    parameter, tensor = [*module.named_parameters()][3]
    tensor.data.view(-1)[-1] = value
    checkpoint = saved(module, tmp_path)
    with pytest.raises(
        ValueError, match=rf"^checkpoint\.path=.*NaN or an infinite number .*a parameter \({parameter}\)"
    ):
        check_start(row.task, row.small, checkpoint, SEED)


def test_a_head_that_is_drawn_anew_may_have_held_anything(tmp_path: Path) -> None:
    row = ROWS["bert-text"]
    more = with_task(row, data=dataclasses.replace(TEXTS, num_classes=5))
    module = built(more)
    module.classifier.weight.data.fill_(math.nan)
    checkpoint = saved(module, tmp_path)
    assert all(tensor.isfinite().all() for tensor in read(row, checkpoint).values())


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm-tied", "bert-mlm", "modernbert-mlm"])
def test_a_tied_head_that_is_another_is_refused(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    module = built(row)
    checkpoint = saved(module, tmp_path)
    check_start(row.task, row.small, checkpoint, SEED)
    head = TIED[name].head
    assert head is not None
    weights = load_file(tmp_path / "model.safetensors")
    weights[head] = module.get_output_embeddings().weight.detach() + 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^checkpoint\.path=.*ties .*{head}.*tie_word_embeddings=false") as error:
        check_start(row.task, row.small, checkpoint, SEED)
    assert "\n" not in str(error.value)
    everything = {parameter: tensor.clone() for parameter, tensor in module.state_dict().items()}
    save_file(everything | weights, tmp_path / "model.safetensors", {"format": "pt"})
    edited(tmp_path, tie_word_embeddings=False)
    settings = (*row.config.settings, ("tie_word_embeddings", False))
    untied = with_task(row, settings=tuple(dict(settings).items()))
    assert torch.equal(read(untied, checkpoint)[head], weights[head]), "the message's remedy"


# where they lie -------------------------------------------------------------------------------------------------------


def test_a_tilde_is_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = words_from(tmp_path / "model", "left")
    data = DataConfig("x.csv", text=("t",), num_classes=3, max_length=12, tokenizer=words)
    row = with_task(ROWS["gpt2-text"], data=data)
    saved(built(row), tmp_path / "model")
    for path, tokenizer in (("~/model", words), (str(tmp_path / "model"), "~/model"), ("~/model", "~/model")):
        with_home = with_task(row, data=dataclasses.replace(data, tokenizer=tokenizer))
        check_start(with_home.task, row.small, Checkpoint(path), SEED)
        assert read(with_home, Checkpoint(path)).keys() == read(row, Checkpoint(str(tmp_path / "model"))).keys()
    with pytest.raises(ValueError, match=r"checkpoint\.path='~/nothing': must be a folder"):
        read(row, Checkpoint("~/nothing"))
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='~/nothing': no such folder"):
        dataclasses.replace(data, tokenizer="~/nothing").vocab_size  # noqa: B018
