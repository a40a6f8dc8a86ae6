"""Data sets: the embedded ones, local files of each format, known names, and what is refused."""

import io
import os
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsim.data import config as config_module
from fedsim.data import embedded, files, text
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, Dataset, cifar10, digits, load, pydoc, sst2


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loading never looks up or connects to anything: the attempt is recorded, as libraries swallow the error."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load.cache_clear()
    yield
    assert attempts == []


def _same(first: Dataset, second: Dataset) -> bool:
    return first is not second and first.fingerprint == second.fingerprint


def _reload(config: DataConfig, data_dir: str | None = None) -> Dataset:
    load.cache_clear()
    return load(config, data_dir)


def _csv(folder: Path, name: str, lines: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def _decoded(row: torch.Tensor) -> str:
    return bytes(value for value in row.tolist() if value < 256).decode()


def _picture(value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 0))


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    _picture(value).save(buffer, "PNG")
    return buffer.getvalue()


# Embedded sets


def test_digits():
    data = load(digits(), None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("image", 10, None)
    assert len(data.train) + len(data.test) == 1797 and len(data.test) == 359
    pixels = data.train.inputs["pixel_values"]
    assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (1, 8, 8)
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    assert data.train.labels.dtype == torch.int64 and data.train.groups is None
    whole = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    torch.testing.assert_close(torch.bincount(data.test.labels) / whole, torch.full((10,), 0.2), atol=0.01, rtol=0)
    assert load(digits(), None) is data
    assert _same(data, _reload(digits()))
    assert data.fingerprint != load(digits(test_share=0.3), None).fingerprint


def test_digits_at_another_size():
    data = load(digits(image_size=12, channels=3, limit=5), None)
    assert data.train.inputs["pixel_values"].shape == (5, 3, 12, 12) and len(data.test) == 5


def test_pydoc():
    from pydoc_data.topics import topics

    data = load(pydoc(), None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("lm", 1, 258)
    assert data.train.groups is not None and data.test.groups is not None
    held, kept = set(data.test.groups.tolist()), set(data.train.groups.tolist())
    assert not held & kept and held | kept == set(range(len(topics)))
    sizes = [int(split.inputs["attention_mask"].sum()) for split in (data.train, data.test)]
    assert 0.1 < sizes[1] / sum(sizes) <= 0.2
    for split in (data.train, data.test):
        ids, mask = split.inputs["input_ids"], split.inputs["attention_mask"]
        assert ids.shape == mask.shape == (len(split), 64) and ids.dtype == mask.dtype == torch.int64
        assert torch.equal(mask == 0, ids == 256) and int(mask.sum(1).min()) >= 2
        assert not split.labels.any()
    # The pieces of one topic, in order, are its text.
    topic = sorted(kept)[0]
    rows = data.train.inputs["input_ids"][data.train.groups == topic].flatten()
    assert _decoded(rows) == topics[sorted(topics)[topic]]
    assert _same(data, _reload(pydoc()))


@pytest.mark.parametrize("share", [1e-6, 0.999999])
def test_pydoc_keeps_a_topic_on_each_side(share):
    data = load(pydoc(test_share=share, max_length=512), None)
    assert len(data.train) >= 1 and len(data.test) >= 1


def test_limit_keeps_more_of_the_same():
    def kept(limit: int) -> set[bytes]:
        return {row.numpy().tobytes() for row in load(digits(limit=limit), None).train.inputs["pixel_values"]}

    assert len(kept(20)) == 20 and kept(20) < kept(50)
    assert len(load(digits(limit=10_000), None).train) == 1438


# Local files


def test_headerless_csv_by_settings_alone(tmp_path):
    lines = [f'{i % 4 + 1},"title {i}","body, with ""quotes"" {i}"' for i in range(20)]
    name = _csv(tmp_path, "train.csv", lines)
    config = DataConfig(name=name, header=False, label=0, text=(1, 2), label_offset=1, num_classes=4)
    data = load(config, None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("text", 4, 258)
    assert (len(data.train), len(data.test)) == (16, 4)
    texts = {}
    for split in (data.train, data.test):
        for row, label in zip(split.inputs["input_ids"], split.labels, strict=True):
            texts[_decoded(row)] = int(label)
    assert texts == {f'title {i} body, with "quotes" {i}': i % 4 for i in range(20)}
    assert _same(data, _reload(config))


def test_csv_cells_are_read_as_they_are(tmp_path):
    name = _csv(tmp_path, "data.csv", ["text,label", "007,0", "null,1", "NA,0", ",1", "1e3,0"])
    data = load(DataConfig(name=name, text=("text",), num_classes=2, test_share=0.2, max_length=8), None)
    rows = torch.cat([data.train.inputs["input_ids"], data.test.inputs["input_ids"]])
    assert sorted(_decoded(row) for row in rows) == ["", "007", "1e3", "NA", "null"]
    assert int(rows.eq(257).sum()) == 5


def test_long_text_is_cut(tmp_path):
    name = _csv(tmp_path, "data.csv", ["text,label", "abcdefgh,0", "é,1"])
    data = load(DataConfig(name=name, text=(0,), num_classes=2, max_length=4, test_share=0.5), None)
    rows = {tuple(row.tolist()) for row in torch.cat([data.train.inputs["input_ids"], data.test.inputs["input_ids"]])}
    assert rows == {(97, 98, 99, 100), (0xC3, 0xA9, 257, 256)}


def test_tsv_folder_with_two_splits_and_raw_quotes(tmp_path):
    _csv(tmp_path, "train.tsv", ["sentence\tlabel", '"open quote\t0', "b\t1", "c\t1"])
    _csv(tmp_path, "validation.tsv", ["sentence\tlabel", "d\t1"])
    data = load(DataConfig(name=str(tmp_path), text=("sentence",), num_classes=2), None)
    assert [_decoded(row) for row in data.train.inputs["input_ids"]] == ['"open quote', "b", "c"]
    assert data.train.labels.tolist() == [0, 1, 1] and data.test.labels.tolist() == [1]


def test_test_split_is_preferred_to_validation(tmp_path):
    for split, label in (("train", 0), ("test", 1), ("validation", 2)):
        _csv(tmp_path, f"{split}.csv", ["text,label", f"a,{label}"])
    config = DataConfig(name=str(tmp_path), text=("text",), num_classes=3)
    assert load(config, None).test.labels.tolist() == [1]
    assert load(replace(config, test_split="validation"), None).test.labels.tolist() == [2]


@pytest.mark.parametrize("form", ["feature", "struct", "bytes", "nested"])
def test_parquet_images(tmp_path, form):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [0, 50, 100, 150]
    path = tmp_path / "odd [name]" / "train.parquet"
    path.parent.mkdir()
    cells: dict[str, list[Any]] = {
        "struct": [{"bytes": _png(value), "path": None} for value in values],
        "bytes": [_png(value) for value in values],
        "nested": [np.full((8, 8), value).tolist() for value in values],
    }
    if form == "feature":
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"img": [_picture(value) for value in values], "label": [0, 1, 0, 1]}
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    else:
        pq.write_table(pa.table({"img": cells[form], "label": [0, 1, 0, 1]}), path)
    data = load(DataConfig(name=str(path), num_classes=2, test_share=0.25), None)
    pixels = torch.cat([data.train.inputs["pixel_values"], data.test.inputs["pixel_values"]])
    assert data.kind == "image" and pixels.shape == (4, 1, 8, 8)
    assert sorted(pixels[:, 0, 0, 0].tolist()) == values


def test_sharded_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(2):
        table = pa.table({"text": [f"text {shard}", None], "target": [shard, shard]})
        pq.write_table(table, tmp_path / f"train-0000{shard}-of-00002.parquet")
    pq.write_table(pa.table({"text": ["t"], "target": [0]}), tmp_path / "test-00000-of-00001.parquet")
    data = load(DataConfig(name=str(tmp_path), text=("text",), num_classes=2), None)
    assert data.train.labels.tolist() == [0, 0, 1, 1] and len(data.test) == 1
    assert [_decoded(row) for row in data.train.inputs["input_ids"]] == ["text 0", "", "text 1", ""]


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_image_folder(tmp_path, splits):
    for split in splits:
        # The test split lacks class "a": labels must count the classes of all splits.
        for label, word in enumerate(("b", "c") if split == "test" else ("a", "b", "c")):
            folder = tmp_path / split / word
            folder.mkdir(parents=True)
            _picture(40 * label, size=(16, 16), mode="RGB").save(folder / "one.png")
    data = load(DataConfig(name=str(tmp_path), num_classes=3, channels=3, image_size=4), None)
    assert data.train.inputs["pixel_values"].shape[1:] == (3, 4, 4)
    if "test" in splits:
        assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 2], [1, 2])
    else:
        assert sorted(data.train.labels.tolist() + data.test.labels.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("both", [True, False])
def test_saved_folder(tmp_path, both):
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "labels": [0, 1, 0]})
    if both:
        datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "set"))
    else:
        table.save_to_disk(str(tmp_path / "set"))
    data = load(DataConfig(name=str(tmp_path / "set"), text=("text",), num_classes=2), None)
    assert (len(data.train), len(data.test)) == ((3, 1) if both else (2, 1))


def _word_tokenizer(folder: Path, **special: str) -> str:
    """A tokenizer of whole words: [UNK] 0, [PAD] 1, good 2, bad 3, [END] 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3, "[END]": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)
    fast.save_pretrained(str(folder))
    return str(folder)


def test_local_tokenizer(tmp_path):
    words = _word_tokenizer(tmp_path / "words", pad_token="[PAD]")
    _csv(tmp_path, "train.csv", ["text,label", "good bad good bad good,0", "odd,1"])
    _csv(tmp_path, "test.csv", ["text,label", "bad,1"])
    config = DataConfig(name=str(tmp_path), text=("text",), num_classes=2, tokenizer=words, max_length=3)
    data = load(config, None)
    assert data.vocab_size == config.vocab_size == 5
    assert data.train.inputs["input_ids"].tolist() == [[2, 3, 2], [0, 1, 1]]
    assert data.train.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='no/such': no such folder"):
        load(replace(config, tokenizer="no/such"), None)
    with pytest.raises(ValueError, match="could not be loaded"):
        load(replace(config, tokenizer=str(tmp_path)), None)


def test_tokens_outside_the_promised_vocabulary_are_refused(tmp_path, monkeypatch):
    name = _csv(tmp_path, "data.csv", ["text,label", "a,0", "b,1"])
    monkeypatch.setattr(text, "vocabulary", lambda tokenizer, hub: 100)
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='bytes'.* size, 100; it gave 257"):
        load(DataConfig(name=name, text=("text",), num_classes=2), None)


# The kind of data, known before they are loaded


@pytest.mark.parametrize(
    ("config", "kind", "vocab_size"),
    [
        (digits(), "image", None),
        (pydoc(), "lm", 258),
        (DataConfig(name="pydoc"), "lm", 258),
        (cifar10(), "image", None),
        (DataConfig(name="cifar100"), "image", None),
        (sst2(), "text", 258),
        (DataConfig(name="sst2"), "text", 258),
        (DataConfig(name="ag_news"), "text", 258),
        (sst2(objective="next_token"), "lm", 258),
        (DataConfig(name="some/folder"), "image", None),
        (DataConfig(name="some.parquet", image="img"), "image", None),
        (DataConfig(name="some.csv", text=(1,)), "text", 258),
        (DataConfig(name="some.csv", objective="next_token"), "lm", 258),
        (DataConfig(name="some.csv", objective="masked_token"), "mlm", 259),
        (pydoc(objective="masked_token"), "mlm", 259),
        (sst2(objective="masked_token"), "mlm", 259),
        (DataConfig(name="some.parquet", objective="token_classes"), "tokens", 258),
        (DataConfig(name="some.parquet", objective="token_classes", text=("words",)), "tokens", 258),
    ],
)
def test_kind_is_known_without_data(config, kind, vocab_size):
    assert (config.kind, config.vocab_size) == (kind, vocab_size)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    theirs: Any = load_digits()
    images, labels, is_test = embedded.digits()
    assert labels.tolist() == theirs.target.tolist()
    assert is_test.sum() == sum(round(0.2 * number) for number in np.bincount(theirs.target))
    assert images.tolist() == np.rint(theirs.images * 255 / 16).tolist()


def test_every_embedded_set_has_a_constructor_of_its_kind():
    for name, kind in config_module.EMBEDDED.items():
        assert DataConfig(name=name).kind == kind == load(DataConfig(name=name), None).kind


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_text_taken_for_images_is_refused_with_the_remedy(tmp_path, column):
    name = _csv(tmp_path, "train.csv", [f"{column},label", "a,0", "b,1"])
    config = DataConfig(name=name, num_classes=2)
    with pytest.raises(ValueError, match=rf"task\.data\.text=\(\): must be .*--set task\.data\.text={column} "):
        load(config, None)
    assert load(replace(config, text=(column,)), None).kind == "text"


def test_images_taken_for_text_are_refused(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": [_picture(0), _picture(9)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    config = DataConfig(name=str(tmp_path), text=("img",), num_classes=2)
    with pytest.raises(ValueError, match=r"task\.data\.text='img': must be a column of texts; it holds Image"):
        load(config, None)
    with pytest.raises(ValueError, match=r"task\.data\.text=\(\): must be the text columns.*\['img', 'label'\]"):
        load(replace(config, text=(), objective="next_token"), None)
    assert load(replace(config, text=()), None).kind == "image"


# Language modelling from files, and natural groups


def test_next_token_from_files(tmp_path):
    _csv(tmp_path, "train.csv", ["text", "abcdefg", '""', "abcd", "x"])
    _csv(tmp_path, "test.csv", ["text", "é"])
    config = DataConfig(name=str(tmp_path), objective="next_token", max_length=4)
    data = load(config, None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("lm", 1, 258)
    # "abcd" leaves a piece of its end token alone and the empty text is nothing else: both are dropped.
    rows = [[97, 98, 99, 100], [101, 102, 103, 257], [97, 98, 99, 100], [120, 257, 256, 256]]
    assert data.train.inputs["input_ids"].tolist() == rows
    assert torch.equal(data.train.inputs["attention_mask"] == 0, data.train.inputs["input_ids"] == 256)
    assert data.test.inputs["input_ids"].tolist() == [[0xC3, 0xA9, 257, 256]]
    assert data.train.labels.tolist() == [0] * 4 and data.train.groups is None
    assert _same(data, _reload(config))
    assert _same(data, load(replace(config, text=("text",)), None))


def test_next_token_joins_columns_and_needs_no_label(tmp_path):
    name = _csv(tmp_path, "train.csv", ["a,b,label", *(f"{i},x,wrong" for i in range(5))])
    data = load(DataConfig(name=name, objective="next_token", text=("a", "b"), max_length=8), None)
    texts = {_decoded(row) for split in (data.train, data.test) for row in split.inputs["input_ids"]}
    assert texts == {f"{i} x" for i in range(5)} and len(data.test) == 1


def test_next_token_limit_counts_pieces(tmp_path):
    name = _csv(tmp_path, "train.csv", ["text", *("abcdefghijklmnop" for _ in range(10))])
    config = DataConfig(name=name, objective="next_token", max_length=4, limit=3)
    data = load(config, None)
    assert (len(data.train), len(data.test)) == (3, 3)
    assert len(load(replace(config, limit=None), None).train) == 32


@pytest.mark.parametrize("end", [True, False])
def test_next_token_by_a_tokenizer(tmp_path, end):
    special = {"eos_token": "[END]"} if end else {"pad_token": "[PAD]"}
    words = _word_tokenizer(tmp_path / "words", **special)
    _csv(tmp_path, "train.csv", ["text", "good bad good bad", "bad"])
    _csv(tmp_path, "test.csv", ["text", "good good"])
    config = DataConfig(name=str(tmp_path), objective="next_token", tokenizer=words, max_length=3)
    data = load(config, None)
    assert data.vocab_size == 5
    # Without an end token "good bad good bad" leaves a piece of one token, and so does "bad".
    assert data.train.inputs["input_ids"].tolist() == ([[2, 3, 2], [3, 4, 4], [3, 4, 4]] if end else [[2, 3, 2]])
    mask = [[1, 1, 1], [1, 1, 0], [1, 1, 0]] if end else [[1, 1, 1]]
    assert data.train.inputs["attention_mask"].tolist() == mask


def test_next_token_without_text_is_refused(tmp_path):
    _csv(tmp_path, "train.csv", ["text,body", "a,b"])
    _csv(tmp_path, "test.csv", ["text,body", '"",b'])
    config = DataConfig(name=str(tmp_path), objective="next_token")
    with pytest.raises(ValueError, match=r"task\.data\.text=\('text',\).*no row of the test split holds 2 tokens"):
        load(config, None)
    assert len(load(replace(config, text=("body",)), None).test) == 1


def test_groups_are_dealt_whole(tmp_path):
    lines = [f"{'word ' * 4},{i % 2},author {i % 5}" for i in range(40)]
    name = _csv(tmp_path, "train.csv", ["text,label,author", *lines])
    classes = DataConfig(name=name, text=("text",), group="author", num_classes=2, max_length=8)
    for config in (classes, replace(classes, objective="next_token", group=2)):
        data = load(config, None)
        assert data.train.groups is not None and data.test.groups is not None
        assert len(data.train.groups) == len(data.train) and data.train.groups.dtype == torch.int64
        assert set(data.train.groups.tolist()) == set(range(5))
        parts = Partition(scheme="natural").split(data.train.labels.numpy(), data.train.groups.numpy(), 5, seed=0)
        assert all(len(set(data.train.groups[part].tolist())) == 1 for part in parts)
        assert data.fingerprint != load(replace(config, group=None), None).fingerprint


def test_groups_are_numbered_alike_in_both_splits_and_under_a_limit(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(split: str, groups: list[Any]) -> None:
        table = pa.table({"text": [f"{group}" for group in groups], "label": [0] * len(groups), "by": groups})
        pq.write_table(table, tmp_path / f"{split}.parquet")

    write("train", [30, 4, 30, 100])
    write("test", [100, 7])
    config = DataConfig(name=str(tmp_path), text=("text",), group="by", num_classes=1)
    data = load(config, None)
    assert data.train.groups is not None and data.test.groups is not None
    assert (data.train.groups.tolist(), data.test.groups.tolist()) == ([2, 0, 2, 3], [3, 1])
    number = {"30": 2, "4": 0, "100": 3}
    few = load(replace(config, limit=2), None).train
    assert few.groups is not None
    assert few.groups.tolist() == [number[_decoded(row)] for row in few.inputs["input_ids"]]
    write("test", [100, None])
    load.cache_clear()
    with pytest.raises(ValueError, match=r"task\.data\.group='by': must be .*; it holds None"):
        load(config, None)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    import datasets
    from datasets import config as settings

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    name = _csv(tmp_path, "data.csv", ["text,label", "a,0", "b,1"])
    bars, counts = datasets.are_progress_bars_disabled(), settings.HF_UPDATE_DOWNLOAD_COUNTS
    load(DataConfig(name=name, text=("text",), num_classes=2), None)
    assert not list(scratch.iterdir())
    assert (bars, counts) == (datasets.are_progress_bars_disabled(), settings.HF_UPDATE_DOWNLOAD_COUNTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "scratch"]


# Known names and the hub


def test_known_name_in_the_data_folder(tmp_path):
    _csv(tmp_path / "sst2", "train.tsv", ["a fine film\t1", "dull\t0"])
    _csv(tmp_path / "sst2", "test.tsv", ["good\t1"])
    data = load(sst2(), str(tmp_path))
    assert (len(data.train), len(data.test), data.train.labels.tolist()) == (2, 1, [1, 0])
    assert _same(data, _reload(sst2(text=(0,), label=1), str(tmp_path)))


def test_missing_data_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ValueError) as caught:
        load(cifar10(), str(tmp_path))
    assert f"no folder {tmp_path}/cifar10" in str(caught.value)
    assert "FEDSIM_DATA_DIR" in str(caught.value) and "--set task.data.hub=true" in str(caught.value)
    with pytest.raises(ValueError, match="FEDSIM_DATA_DIR is not set"):
        load(cifar10(), None)
    with pytest.raises(ValueError, match=f"task.data.name='{tmp_path}/none.csv': no file or folder"):
        load(DataConfig(name=f"{tmp_path}/none.csv"), None)


def test_hub_only_when_allowed(tmp_path, monkeypatch):
    import datasets

    calls = []
    train = datasets.Dataset.from_dict({"idx": [0, 1], "sentence": ["a", "b"], "label": [0, 1]})
    unlabelled = datasets.Dataset.from_dict({"idx": [0], "sentence": ["c"], "label": [-1]})
    splits = datasets.DatasetDict({"train": train, "validation": train.select([1]), "test": unlabelled})

    def fetch(*arguments):
        calls.append(arguments)
        return splits

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    with pytest.raises(ValueError, match="hub=true"):
        load(sst2(), None)
    assert calls == []
    assert load(sst2(hub=True), None).test.labels.tolist() == [1]
    glue = DataConfig(name="glue", config_name="sst2", text=("sentence",), hub=True, num_classes=2)
    load(replace(glue, test_split="validation"), None)
    assert calls == [("stanfordnlp/sst2", None), ("glue", "sst2")]
    with pytest.raises(ValueError, match=r"less task\.data\.label_offset=0 is -1.*without labels"):
        load(glue, None)
    with pytest.raises(ValueError, match=r"task\.data\.test_split='dev': must be a split of .*\['test', 'train'"):
        load(DataConfig(name="glue", hub=True, test_split="dev"), None)


def test_hub_failure_is_named(monkeypatch):
    import datasets

    def fetch(*_):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    with pytest.raises(ValueError, match=r"task\.data\.name='cifar10': no hub set 'uoft-cs/cifar10' .*unreachable"):
        load(cifar10(hub=True), None)


# Refusals


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        (["text,label", "a,0", "b,2"], {}, r"task\.data\.num_classes=2: label 2 less task\.data\.label_offset=0 is 2"),
        (["text,label", "a,1", "b,0"], {"label_offset": 1}, "label 0 less .*label_offset=1 is -1"),
        (["text,label", "a,0", "b,pos"], {}, r"task\.data\.label='label'.*it holds 'pos'"),
        (["text,label", "a,0", "b,1.5"], {}, "whole numbers; it holds '1.5'"),
        (["text,label", "a,0", "b,"], {}, "whole numbers; it holds ''"),
        (["text,label", "a,0", "b,1"], {"text": ("body",)}, r"task\.data\.text='body'.*\['text', 'label'\]"),
        (["text,label", "a,0", "b,1"], {"text": (2,)}, r"task\.data\.text=2.*\['text', 'label'\]"),
        (["text,label", "a,0", "b,1"], {"label": "class"}, r"task\.data\.label='class'.*\['text', 'label'\]"),
        (
            ["text,label", "a,0", "b,1"],
            {"image": "text", "text": ()},
            r"task\.data\.image='text': a cell of this column is not",
        ),
        (["text,kind", "a,0", "b,1"], {}, r"task\.data\.label=None.*\['text', 'kind'\]"),
        (["body,label", "a,0", "b,1"], {"text": ()}, r"task\.data\.text=\(\).*text=COLUMN.*\['body', 'label'\]"),
        (["text,label", "a,0", "b,1"], {"group": "by"}, r"task\.data\.group='by': no such column.*\['text', 'label'\]"),
        (["text,label", "a,0"], {}, "it holds 1"),
        (["text,label"], {}, "no data"),
        (["text,label", "a,0", "b,1,3"], {}, "could not be read as csv"),
        (["text,label", "a,0,9", "b,1,3"], {}, "could not be read as csv"),
        ([""], {}, "could not be read as csv"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, lines, settings, words):
    name = _csv(tmp_path, "data.csv", lines)
    with pytest.raises(ValueError, match=words):
        load(DataConfig(**{"name": name, "num_classes": 2, "text": ("text",), **settings}), None)


def test_wrong_folders_are_refused_by_name(tmp_path):
    _csv(tmp_path, "train.csv", ["text,label", "a,0", "b,1"])
    config = DataConfig(name=str(tmp_path), text=("text",), num_classes=2)
    assert len(load(config, None).test) == 1
    with pytest.raises(ValueError, match=r"task\.data\.test_split='dev': must be a split of .*\['train\.csv'\]"):
        load(replace(config, test_split="dev"), None)
    with pytest.raises(ValueError, match=r"task\.data\.train_split='big'"):
        load(replace(config, train_split="big"), None)
    _csv(tmp_path, "train.tsv", ["text\tlabel", "a\t0"])
    load.cache_clear()
    with pytest.raises(ValueError, match=r"\['train\.csv', 'train\.tsv'\]"):
        load(config, None)
    (tmp_path / "train.tsv").rename(tmp_path / "test.tsv")
    with pytest.raises(ValueError, match=r"in one format, not \['csv', 'tsv'\]"):
        load(config, None)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"ends in one of \.parquet, \.csv, \.tsv"):
        load(replace(config, name=str(tmp_path / "notes.txt")), None)
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="could not be read as parquet"):
        load(replace(config, name=str(tmp_path / "bad.parquet")), None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", None),
        ("hub", 1),
        ("config_name", 3),
        ("train_split", ""),
        ("test_split", "train"),
        ("test_share", 0),
        ("test_share", 1.0),
        ("test_share", float("nan")),
        ("test_share", "0.2"),
        ("test_share", True),
        ("image", True),
        ("image", -1),
        ("image", 0.0),
        ("text", "sentence"),
        ("text", ["sentence"]),
        ("text", (1.5,)),
        ("text", (None,)),
        ("text", (-1,)),
        ("text", ("",)),
        ("group", -1),
        ("group", 1.0),
        ("group", ""),
        ("objective", "words"),
        ("objective", None),
        ("config_name", ""),
        ("max_length", float("nan")),
        ("label", True),
        ("label", -2),
        ("label_offset", 0.5),
        ("header", "no"),
        ("limit", 0),
        ("limit", 2.0),
        ("limit", True),
        ("image_size", 0),
        ("channels", 2),
        ("num_classes", 0),
        ("num_classes", None),
        ("class_names", "O"),
        ("class_names", ("O",)),
        ("class_names", (*"ABCDEFGHI", "")),
        ("class_names", (*"ABCDEFGHII",)),
        ("tokenizer", ""),
        ("tokenizer", None),
        ("max_length", 1),
    ],
)
def test_wrong_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError) as caught:
        DataConfig(**{"name": "some.csv", field: value})
    assert str(caught.value).startswith(f"task.data.{field}={value!r}: must be ")


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"task\.data\.text=\('a',\)"):
        DataConfig(name="some.csv", image="img", text=("a",))
    with pytest.raises(ValueError, match=r"task\.data\.name='digits'"):
        digits(label="label")
    with pytest.raises(ValueError, match=r"task\.data\.name='pydoc'.*group"):
        pydoc(group="topic")
    for config in (digits(), cifar10(), DataConfig(name="a.csv", image="img")):
        with pytest.raises(ValueError, match=r"task\.data\.objective='next_token': must be 'classes' for images"):
            replace(config, objective="next_token")
        for objective in ("masked_token", "token_classes"):
            with pytest.raises(ValueError, match=rf"objective='{objective}': must be 'classes' for images"):
                replace(config, objective=objective)
    with pytest.raises(ValueError, match=r"objective='token_classes': must be 'next_token' or 'masked_token' for"):
        pydoc(objective="token_classes")
    with pytest.raises(ValueError, match=r"task\.data\.text=\('a', 'b'\): must be one column"):
        DataConfig(name="some.parquet", objective="token_classes", text=("a", "b"))
    with pytest.raises(
        ValueError, match=r"class_names=\('O', 'B-X'\): must be empty or .*num_classes=3 names; there are 2"
    ):
        DataConfig(name="some.parquet", objective="token_classes", num_classes=3, class_names=("O", "B-X"))
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='words'"):
        pydoc(tokenizer="words")
    with pytest.raises(ValueError, match=r"task\.data\.num_classes=5"):
        load(digits(num_classes=5), None)


def test_settings_travel():
    config = sst2(limit=3)
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(sst2(limit=3))


# Real data


@pytest.fixture
def data_dir() -> str:
    folder = os.environ.get("FEDSIM_DATA_DIR")
    if not folder:
        pytest.skip("FEDSIM_DATA_DIR is not set")
    return folder


@pytest.mark.data
def test_real_cifar10(data_dir):
    if not Path(data_dir, "cifar10").is_dir():
        pytest.skip(f"{data_dir} has no cifar10")
    data = load(cifar10(limit=300), data_dir)
    assert data.kind == "image" and (len(data.train), len(data.test)) == (300, 300)
    assert data.train.inputs["pixel_values"].shape == (300, 3, 32, 32)
    assert set(data.train.labels.tolist()) == set(range(10))
    assert 80 < float(data.train.inputs["pixel_values"].float().mean()) < 160
    assert _same(data, _reload(cifar10(limit=300), data_dir))


@pytest.mark.data
def test_real_cifar10_is_whole(data_dir, tmp_path):
    path = Path(data_dir, "cifar10")
    if not path.is_dir():
        pytest.skip(f"{data_dir} has no cifar10")
    tables = files.tables(cifar10(), data_dir, str(tmp_path))
    assert {split: len(table) for split, table in tables.items()} == {"train": 50_000, "test": 10_000}


@pytest.mark.data
def test_real_sst2(data_dir):
    if not Path(data_dir, "sst2").is_dir():
        pytest.skip(f"{data_dir} has no sst2")
    data = load(sst2(), data_dir)
    assert (data.kind, data.num_classes, len(data.train), len(data.test)) == ("text", 2, 6920, 1821)
    assert _decoded(data.test.inputs["input_ids"][0]) == "no movement , no yuks , not much of anything"
    assert data.test.labels[:3].tolist() == [0, 0, 0]
    assert len(load(sst2(test_split="validation"), data_dir).test) == 872
