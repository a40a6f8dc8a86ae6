"""What is scored is what is deployed.

An exported folder, loaded by plain `transformers` with its own tokenizer or image processor and given the raw test
examples one at a time, has the loss and the accuracy that `Task.score` computes.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import load_image

from baselines.fedavg import FedAvg
from benchmarks.suites import tiny
from fedsim.data.config import DataConfig
from fedsim.data.dataset import Dataset
from fedsim.data.partition import Partition
from fedsim.data.source import load
from fedsim.data.text import IGNORED
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from fedsim.results import card, export
from fedsim.results.tables import load as load_results
from tests.support.exported import picture, random_model
from tests.support.family_rows import ROWS, Row
from tests.support.inline_runs import inline
from tests.support.side_tokenizers import words_from


pytestmark = [pytest.mark.usefixtures("one_thread")]

NAMES = ("x", "y", "z")
LETTERS = "abcdefghij"
LENGTH = 12


def sentences(count: int = 13) -> list[list[str]]:
    """Words of one letter, some sentences longer than `LENGTH`, one of a single word."""
    draw = np.random.default_rng(0)
    return [[str(word) for word in draw.choice([*LETTERS], size)] for size in draw.integers(1, 18, count)]


def text_data(kind: str, folder: Path, tokenizer: str) -> DataConfig:
    """Raw examples of one kind in parquet files; the class of a sentence, or word, is that of its (first) letter."""
    words = sentences()
    tags = [[NAMES[LETTERS.index(word) % 3] for word in of_row] for of_row in words]
    columns = {"text": [" ".join(of_row) for of_row in words], "label": [of_row[0] for of_row in tags]}
    if kind == "tokens":
        columns = {"text": words, "label": tags}
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    objective: Any = {"text": "classes", "tokens": "token_classes", "lm": "next_token", "mlm": "masked_token"}[kind]
    classes: dict[str, Any] = {"class_names": NAMES} if kind in ("text", "tokens") else {}
    return DataConfig(
        str(folder), objective=objective, text=("text",), label="label", num_classes=3, max_length=LENGTH,
        tokenizer=tokenizer, **classes,
    )  # fmt: skip


def loaded(kind: str, folder: Path) -> Any:
    return getattr(transformers, card.AUTO_CLASSES[kind]).from_pretrained(folder)


def answers(kind: str, folder: Path, data: Dataset, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of what is predicted and what it should have been, from one raw example after the other."""
    model, tokenizer = loaded(kind, folder), AutoTokenizer.from_pretrained(folder)
    by_bytes = task.config.data.tokenizer == "bytes"
    named = model.config.label2id
    if kind == "mlm":
        masked = task._masked(dict(data.test.inputs), None)  # which tokens are asked for is drawn, not deployed
        asked = zip(masked["input_ids"], masked["labels"], masked["attention_mask"].bool(), strict=True)
    for row in pq.read_table(Path(task.config.data.name, "test.parquet")).to_pylist():
        said = row["text"]
        if kind == "text":
            batch = tokenizer(said, truncation=True, return_tensors="pt")
            yield model(**batch).logits, torch.tensor([named[row["label"]]])
        elif kind == "tokens":
            given = " ".join(said) if by_bytes else said
            batch = tokenizer(given, is_split_into_words=not by_bytes, truncation=True, return_tensors="pt")
            logits = model(**batch).logits[0]
            firsts = range(0, 2 * len(said), 2) if by_bytes else range(len(said))  # every word is one byte, one token
            ends = batch["input_ids"].shape[1] if by_bytes else sum(each is not None for each in batch.word_ids())
            kept = [(first, tag) for first, tag in zip(firsts, row["label"], strict=True) if first < ends]
            yield logits[[first for first, _ in kept]], torch.tensor([named[tag] for _, tag in kept])
        else:
            closed = [] if by_bytes else [tokenizer.eos_token_id]
            ids = tokenizer(said, add_special_tokens=by_bytes)["input_ids"] + closed
            for piece in (torch.tensor([ids[i : i + LENGTH]]) for i in range(0, len(ids), LENGTH)):
                if piece.shape[1] < 2:
                    continue
                if kind == "lm":
                    yield model(input_ids=piece).logits[0, :-1], piece[0, 1:]
                    continue
                ids_, labels, mask = next(asked)
                seen = (labels != IGNORED) & mask
                assert torch.equal(torch.where(seen, labels, ids_)[mask], piece[0])
                yield model(input_ids=ids_[mask][None]).logits[0][seen[mask]], labels[seen]


def compared(config: TaskConfig, form: Form, folder: Path) -> tuple[Any, int]:
    """Hold both ways to score against each other; the score, and how many predictions there are."""
    row, data = Row(config, form), load(config.data, None)
    task = Task(config, data)
    model = random_model(row)
    score = task.score(model, data.test, batch_size=5)
    export.write(model, config.data, "", folder)
    with torch.no_grad():
        said = [*answers(config.data.kind, folder, data, task)]
    logits, labels = torch.cat([each for each, _ in said]).double(), torch.cat([each for _, each in said])
    assert len(labels) == score.count.sum()
    assert (logits.argmax(-1) == labels).sum() == score.correct.sum()
    assert F.cross_entropy(logits, labels).item() == pytest.approx(score.loss, rel=2e-5)
    return score, len(labels)


OF_TEXT = {name: row for name, row in ROWS.items() if row.config.data.kind != "image"}


@pytest.mark.parametrize("side", ["bytes", "right", "left", "left, unframed", "left, unpadded"])
@pytest.mark.parametrize("name", OF_TEXT)
def test_texts_are_scored_as_they_are_deployed(name: str, side: str, tmp_path: Path) -> None:
    row, kind = OF_TEXT[name], OF_TEXT[name].config.data.kind
    tokenizer = side
    if side != "bytes":
        framed, padding = "unframed" not in side, "unpadded" not in side
        tokenizer = words_from(tmp_path / "words", side.split(",")[0], framed, padding)
    (tmp_path / "data").mkdir()
    data = text_data(kind, tmp_path / "data", tokenizer)
    _, count = compared(dataclasses.replace(row.config, data=data), row.small, tmp_path / "model")
    assert count >= 13


@pytest.mark.parametrize("settings", [{}, {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}])
def test_images_of_any_format_are_scored_as_they_are_deployed(settings: dict[str, Any], tmp_path: Path) -> None:
    made = {
        "rgb.png": picture("RGB", 20, 31), "rgba.png": picture("RGBA", 9, 9), "grey.jpg": picture("L", 40, 8),
        "la.png": picture("RGBA", 16, 16).convert("LA"), "palette.gif": picture("RGB", 16, 16).convert("P"),
        "clear.png": picture("RGBA", 16, 16).quantize(32), "print.jpg": picture("RGB", 16, 16).convert("CMYK"),
        "black.png": picture("L", 16, 16).convert("1"), "turned.jpg": picture("RGB", 16, 24),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "test"):
        for number, (name, image) in enumerate(made.items()):
            folder = tmp_path / split / NAMES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            settings_of_file: dict[str, Any] = {"exif": exif} if name == "turned.jpg" else {}
            image.save(folder / name, **settings_of_file)
    data = DataConfig(str(tmp_path), image_size=8, channels=3, num_classes=3, class_names=("z", "x", "y"), **settings)
    row, found = Row(TaskConfig(data, "vit")), load(data, None)
    model = random_model(row)
    score = Task(row.config, found).score(model, found.test, batch_size=4)
    export.write(model, data, "", tmp_path / "model")
    again, processor = loaded("image", tmp_path / "model"), AutoImageProcessor.from_pretrained(tmp_path / "model")
    right, losses = 0, []
    for path in sorted((tmp_path / "test").glob("*/*")):
        with Image.open(path) as image, torch.no_grad():
            given = load_image(str(path)) if "turned" in path.name else image
            logits = again(**processor(given, return_tensors="pt")).logits.double()
        right += again.config.id2label[int(logits.argmax())] == path.parent.name
        losses.append(F.cross_entropy(logits, torch.tensor([again.config.label2id[path.parent.name]])).item())
    assert right == score.correct.sum() and len(losses) == score.count.sum() == 9
    assert np.mean(losses) == pytest.approx(score.loss, rel=2e-5)


def test_grey_images_are_scored_as_they_are_deployed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(6):
            folder = tmp_path / split / NAMES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(picture("L", 12, 20)) // (number + 1)).save(folder / f"{number}.png")
    data = DataConfig(str(tmp_path), image_size=8, channels=1, num_classes=3)
    row, found = Row(TaskConfig(data, "vit")), load(data, None)
    model = random_model(row)
    score = Task(row.config, found).score(model, found.test)
    export.write(model, data, "", tmp_path / "model")
    again, processor = loaded("image", tmp_path / "model"), AutoImageProcessor.from_pretrained(tmp_path / "model")
    paths = sorted((tmp_path / "test").glob("*/*"))
    with torch.no_grad():
        logits = again(
            **processor([load_image(str(path)).convert("L") for path in paths], return_tensors="pt")
        ).logits.double()
    labels = torch.tensor([NAMES.index(path.parent.name) for path in paths])
    assert (logits.argmax(-1) == labels).sum() == score.correct.sum()
    assert F.cross_entropy(logits, labels).item() == pytest.approx(score.loss, rel=2e-5)


# whole runs -----------------------------------------------------------------------------------------------------------


def run_of(config: TaskConfig, out: Path) -> pd.DataFrame:
    """FedAvg of a small target by two participants; the rows of the last round by participant."""
    form = Form(16, 1, heads=2, mlp=16)
    experiment = dataclasses.replace(
        tiny(), algorithm=FedAvg(lr=0.01), task=config, partition=Partition("iid", min_size=5), participants=2,
        rounds=1, tiers=(dataclasses.replace(tiny().tiers[0], form=form),), intermediate=form, target=form,
    )  # fmt: skip
    inline(experiment, out)
    return load_results(out).clients.query("round == 1").set_index("client")


def test_a_run_on_an_image_folder_is_exported_with_its_classes_and_scores(tmp_path: Path) -> None:
    for split, count in (("Training", 12), ("val", 6)):
        for number, name in enumerate(("zebra", "ant", "cat")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                made = picture("RGBA" if i % 2 else "L", 9 + i, 20 - i)
                made.putalpha(60 * number + 40) if i % 2 else made.paste(100 * number, (0, 0, 9, 9))
                made.save(tmp_path / "images" / split / name / f"{i}.png")
    data = DataConfig(str(tmp_path / "images"), image_size=8, channels=3, num_classes=3)
    rows = run_of(TaskConfig(data, "vit", patch_size=4), tmp_path / "out")
    paths = sorted((tmp_path / "images/val").glob("*/*"))
    labels = [path.parent.name for path in paths]
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.copy())
    shutil.rmtree(tmp_path / "images")  # an export needs no data
    for participant in (0, 1):
        to = export.export(tmp_path / "out", None, participant, tmp_path / f"model{participant}")
        model, processor = loaded("image", to), AutoImageProcessor.from_pretrained(to)
        assert model.config.id2label == {0: "ant", 1: "cat", 2: "zebra"}
        with torch.no_grad():
            logits = model(**processor(images, return_tensors="pt")).logits
        said = [model.config.id2label[int(number)] for number in logits.argmax(-1)]
        assert np.mean([a == b for a, b in zip(said, labels, strict=True)]) == pytest.approx(rows.accuracy[participant])
        wanted = torch.tensor([model.config.label2id[name] for name in labels])
        assert F.cross_entropy(logits.double(), wanted).item() == pytest.approx(rows.loss[participant], rel=1e-5)


@pytest.mark.parametrize("class_names", [(), ("good", "bad", "fine")])
def test_a_run_on_texts_is_exported_with_its_classes_and_scores(class_names: tuple[str, ...], tmp_path: Path) -> None:
    texts, labels = [" ".join(words) for words in sentences(60)], ["good", "fine", "bad"] * 20
    for split, rows in (("train", slice(0, 40)), ("test", slice(40, 60))):
        table = {"text": texts[rows], "label": labels[rows]}
        pd.DataFrame(table).to_csv(tmp_path / f"{split}.csv", index=False)
    data = DataConfig(
        str(tmp_path), text=("text",), num_classes=3, max_length=LENGTH, class_names=class_names,
        tokenizer=words_from(tmp_path / "words", "left"),
    )  # fmt: skip
    rows = run_of(TaskConfig(data, "gpt2"), tmp_path / "out")
    to = export.export(tmp_path / "out", None, 1, tmp_path / "model")
    model, tokenizer = loaded("text", to), AutoTokenizer.from_pretrained(to)
    assert tuple(model.config.id2label.values()) == (class_names or ("bad", "fine", "good"))
    with torch.no_grad():
        batches = [tokenizer(each, truncation=True, return_tensors="pt") for each in texts[40:]]
        logits = torch.cat([model(**batch).logits for batch in batches])
    wanted = torch.tensor([model.config.label2id[name] for name in labels[40:]])
    assert (logits.argmax(-1) == wanted).double().mean().item() == pytest.approx(rows.accuracy[1])
    assert F.cross_entropy(logits.double(), wanted).item() == pytest.approx(rows.loss[1], rel=1e-5)
