"""Data from local files of each format: columns, splits, tokenizers, pieces of text and groups."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, _loaded, load
from tests.support.data_files import csv_file, decoded, picture, reloaded, same_data


pytestmark = pytest.mark.usefixtures("read_again")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


# local files ----------------------------------------------------------------------------------------------------------


def test_headerless_csv_by_settings_alone(tmp_path):
    lines = [f'{i % 4 + 1},"title {i}","body, with ""quotes"" {i}"' for i in range(20)]
    name = csv_file(tmp_path, "train.csv", lines)
    config = DataConfig(name=name, header=False, label=0, text=(1, 2), label_offset=1, num_classes=4)
    data = load(config, None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("text", 4, 258)
    assert (len(data.train), len(data.test)) == (16, 4)
    texts = {}
    for split in (data.train, data.test):
        for row, label in zip(split.inputs["input_ids"], split.labels, strict=True):
            texts[decoded(row)] = int(label)
    assert texts == {f'title {i} body, with "quotes" {i}': i % 4 for i in range(20)}
    assert same_data(data, reloaded(config))


def test_csv_cells_are_read_as_they_are(tmp_path):
    name = csv_file(tmp_path, "data.csv", ["text,label", "007,0", "null,1", "NA,0", ",1", "1e3,0"])
    data = load(DataConfig(name=name, text=("text",), num_classes=2, test_share=0.2, max_length=8), None)
    rows = torch.cat([data.train.inputs["input_ids"], data.test.inputs["input_ids"]])
    assert sorted(decoded(row) for row in rows) == ["", "007", "1e3", "NA", "null"]
    assert int(rows.eq(257).sum()) == 5


def test_a_blank_line_of_a_single_column_is_a_text(tmp_path):
    csv_file(tmp_path, "train.csv", ["text", "alpha", "", "   ", "beta", '""', "  x"])
    csv_file(tmp_path, "test.csv", ["text", "gamma", ""])
    data = load(DataConfig(str(tmp_path), objective="next_token", max_length=8), None)
    assert [decoded(row) for row in data.train.inputs["input_ids"]] == ["alpha", "   ", "beta", "  x"]
    csv_file(tmp_path, "train.csv", ["", "text", "alpha"])
    with pytest.raises(ValueError, match=r"rows with 1 cells; .*train\.csv, its first line has 0"):
        load(DataConfig(str(tmp_path), objective="next_token"), None)
    csv_file(tmp_path, "train.csv", ["", " ", "alpha"])
    csv_file(tmp_path, "test.csv", ["beta"])
    data = load(DataConfig(str(tmp_path), objective="next_token", header=False, text=(0,), max_length=8), None)
    assert [decoded(row) for row in data.train.inputs["input_ids"]] == [" ", "alpha"]
    name = csv_file(tmp_path, "both.csv", ["text,label", "", "a,0", "", "b,1", ""])
    assert len(load(DataConfig(name, text=("text",), num_classes=2, test_share=0.5), None).train) == 1


def test_long_text_is_cut(tmp_path):
    name = csv_file(tmp_path, "data.csv", ["text,label", "abcdefgh,0", "é,1"])
    data = load(DataConfig(name=name, text=(0,), num_classes=2, max_length=4, test_share=0.5), None)
    rows = {tuple(row.tolist()) for row in torch.cat([data.train.inputs["input_ids"], data.test.inputs["input_ids"]])}
    assert rows == {(97, 98, 99, 100), (0xC3, 0xA9, 257, 256)}


def test_tsv_folder_with_two_splits_and_raw_quotes(tmp_path):
    csv_file(tmp_path, "train.tsv", ["sentence\tlabel", '"open quote\t0', "b\t1", "c\t1"])
    csv_file(tmp_path, "validation.tsv", ["sentence\tlabel", "d\t1"])
    data = load(DataConfig(name=str(tmp_path), text=("sentence",), num_classes=2), None)
    assert [decoded(row) for row in data.train.inputs["input_ids"]] == ['"open quote', "b", "c"]
    assert data.train.labels.tolist() == [0, 1, 1] and data.test.labels.tolist() == [1]


def test_test_split_is_preferred_to_validation(tmp_path):
    for split, label in (("train", 0), ("test", 1), ("validation", 2)):
        csv_file(tmp_path, f"{split}.csv", ["text,label", f"a,{label}"])
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
        "struct": [{"bytes": png(value), "path": None} for value in values],
        "bytes": [png(value) for value in values],
        "nested": [np.full((8, 8), value).tolist() for value in values],
    }
    if form == "feature":
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"img": [picture(value) for value in values], "label": [0, 1, 0, 1]}
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
        table = pa.table({"text": [f"text {shard}", ""], "target": [shard, shard]})
        pq.write_table(table, tmp_path / f"train-0000{shard}-of-00002.parquet")
    pq.write_table(pa.table({"text": ["t"], "target": [0]}), tmp_path / "test-00000-of-00001.parquet")
    data = load(DataConfig(name=str(tmp_path), text=("text",), num_classes=2), None)
    assert data.train.labels.tolist() == [0, 0, 1, 1] and len(data.test) == 1
    assert [decoded(row) for row in data.train.inputs["input_ids"]] == ["text 0", "", "text 1", ""]


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_image_folder(tmp_path, splits):
    for split in splits:
        # The test split lacks class "a": labels must count the classes of all splits.
        for label, word in enumerate(("b", "c") if split == "test" else ("a", "b", "c")):
            folder = tmp_path / split / word
            folder.mkdir(parents=True)
            picture(40 * label, size=(16, 16), mode="RGB").save(folder / "one.png")
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


def word_tokenizer(folder: Path, **special: str) -> str:
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
    words = word_tokenizer(tmp_path / "words", pad_token="[PAD]")
    csv_file(tmp_path, "train.csv", ["text,label", "good bad good bad good,0", "odd,1"])
    csv_file(tmp_path, "test.csv", ["text,label", "bad,1"])
    config = DataConfig(name=str(tmp_path), text=("text",), num_classes=2, tokenizer=words, max_length=3)
    data = load(config, None)
    assert data.vocab_size == config.vocab_size == 5
    assert data.train.inputs["input_ids"].tolist() == [[2, 3, 2], [0, 1, 1]]
    assert data.train.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='no/such': no such folder"):
        load(replace(config, tokenizer="no/such"), None)
    with pytest.raises(ValueError, match="could not be loaded"):
        load(replace(config, tokenizer=str(tmp_path)), None)


# language modelling from files, and natural groups --------------------------------------------------------------------


def test_next_token_from_files(tmp_path):
    csv_file(tmp_path, "train.csv", ["text", "abcdefg", '""', "abcd", "x"])
    csv_file(tmp_path, "test.csv", ["text", "é"])
    config = DataConfig(name=str(tmp_path), objective="next_token", max_length=4)
    data = load(config, None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("lm", 1, 258)
    # "abcd" leaves a piece of its end token alone and the empty text is nothing else: both are dropped.
    rows = [[97, 98, 99, 100], [101, 102, 103, 257], [97, 98, 99, 100], [120, 257, 256, 256]]
    assert data.train.inputs["input_ids"].tolist() == rows
    assert torch.equal(data.train.inputs["attention_mask"] == 0, data.train.inputs["input_ids"] == 256)
    assert data.test.inputs["input_ids"].tolist() == [[0xC3, 0xA9, 257, 256]]
    assert data.train.labels.tolist() == [0] * 4 and data.train.groups is None
    assert same_data(data, reloaded(config))
    assert same_data(data, load(replace(config, text=("text",)), None))


def test_next_token_joins_columns_and_needs_no_label(tmp_path):
    name = csv_file(tmp_path, "train.csv", ["a,b,label", *(f"{i},x,wrong" for i in range(5))])
    data = load(DataConfig(name=name, objective="next_token", text=("a", "b"), max_length=8), None)
    texts = {decoded(row) for split in (data.train, data.test) for row in split.inputs["input_ids"]}
    assert texts == {f"{i} x" for i in range(5)} and len(data.test) == 1


def test_next_token_limit_counts_pieces(tmp_path):
    name = csv_file(tmp_path, "train.csv", ["text", *("abcdefghijklmnop" for _ in range(10))])
    config = DataConfig(name=name, objective="next_token", max_length=4, limit=3)
    data = load(config, None)
    assert (len(data.train), len(data.test)) == (3, 3)
    assert len(load(replace(config, limit=None), None).train) == 32


def test_what_is_skipped_is_counted_as_what_is_kept(tmp_path):
    name = csv_file(tmp_path, "train.csv", ["text,label", *(f"text {i},{i % 2}" for i in range(10))])
    config = DataConfig(name=name, text=("text",), label="label", num_classes=2)
    whole, rest = load(config, None), load(replace(config, skip=3), None)
    texts = [[decoded(row) for row in data.train.inputs["input_ids"]] for data in (whole, rest)]
    assert texts[1] == texts[0][3:] and rest.fingerprint != whole.fingerprint
    assert torch.equal(rest.train.labels, whole.train.labels[3:]) and torch.equal(rest.test.labels, whole.test.labels)
    pieces = DataConfig(name=name, text=("text",), objective="next_token", max_length=4)
    whole, rest = load(pieces, None), load(replace(pieces, skip=5), None)
    assert torch.equal(rest.train.inputs["input_ids"], whole.train.inputs["input_ids"][5:])
    with pytest.raises(ValueError, match=rf"task\.data\.skip=99: must be below {len(whole.train)}, "):
        load(replace(pieces, skip=99), None)


@pytest.mark.parametrize("end", [True, False])
def test_next_token_by_a_tokenizer(tmp_path, end):
    special = {"eos_token": "[END]"} if end else {"pad_token": "[PAD]"}
    words = word_tokenizer(tmp_path / "words", **special)
    csv_file(tmp_path, "train.csv", ["text", "good bad good bad", "bad"])
    csv_file(tmp_path, "test.csv", ["text", "good good"])
    config = DataConfig(name=str(tmp_path), objective="next_token", tokenizer=words, max_length=3)
    data = load(config, None)
    assert data.vocab_size == 5
    # Without an end token "good bad good bad" leaves a piece of one token, and so does "bad".
    assert data.train.inputs["input_ids"].tolist() == ([[2, 3, 2], [3, 4, 4], [3, 4, 4]] if end else [[2, 3, 2]])
    mask = [[1, 1, 1], [1, 1, 0], [1, 1, 0]] if end else [[1, 1, 1]]
    assert data.train.inputs["attention_mask"].tolist() == mask


def test_next_token_without_text_is_refused(tmp_path):
    csv_file(tmp_path, "train.csv", ["text,body", "a,b"])
    csv_file(tmp_path, "test.csv", ["text,body", '"",b'])
    config = DataConfig(name=str(tmp_path), objective="next_token")
    with pytest.raises(ValueError, match=r"task\.data\.text=\('text',\).*no row of the test split holds 2 tokens"):
        load(config, None)
    assert len(load(replace(config, text=("body",)), None).test) == 1


def test_groups_are_dealt_whole(tmp_path):
    lines = [f"{'word ' * 4},{i % 2},author {i % 5}" for i in range(40)]
    name = csv_file(tmp_path, "train.csv", ["text,label,author", *lines])
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
    assert few.groups.tolist() == [number[decoded(row)] for row in few.inputs["input_ids"]]
    write("test", [100, None])
    _loaded.cache_clear()
    with pytest.raises(ValueError, match=r"task\.data\.group='by': must be .*test\.parquet, row 1 holds None"):
        load(config, None)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    import datasets
    from datasets import config as settings

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    name = csv_file(tmp_path, "data.csv", ["text,label", "a,0", "b,1"])
    bars, counts = datasets.are_progress_bars_disabled(), settings.HF_UPDATE_DOWNLOAD_COUNTS
    load(DataConfig(name=name, text=("text",), num_classes=2), None)
    assert not list(scratch.iterdir())
    assert (bars, counts) == (datasets.are_progress_bars_disabled(), settings.HF_UPDATE_DOWNLOAD_COUNTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "scratch"]
