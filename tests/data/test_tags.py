"""Which token carries which tag: by bytes, by tokenizers of either kind, and columns that are no words and tags."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedsim.data import text
from fedsim.data.config import DataConfig
from fedsim.data.source import _loaded, load
from tests.support.tagged_words import BL, BP, IL, IP, NAMES, NONE, OO, both, tagged, word_pieces


pytestmark = pytest.mark.usefixtures("read_again")


def test_by_bytes_the_first_byte_of_a_word_carries_its_tag(tmp_path: Path) -> None:
    words = [["EU", "é", "x"], ["abcdefg", "h"], ["ab", "cdefghij", "k"], ["", "a"]]
    config = both(tmp_path, words, [[BP, OO, IL], [BL, IP], [OO, BP, IP], [BL, BP]])
    data = load(config, None)
    assert (data.kind, data.num_classes, data.vocab_size) == ("tokens", 1, 258)
    assert data.train.inputs["input_ids"].tolist() == [
        [69, 85, 32, 0xC3, 0xA9, 32, 120, 257],
        [97, 98, 99, 100, 101, 102, 103, 32],  # "h" is cut off, and so is the end
        [97, 98, 32, 99, 100, 101, 102, 103],  # a word cut short keeps its tag
        [32, 97, 257, 256, 256, 256, 256, 256],  # a word of nothing has no token
    ]
    assert data.train.inputs["attention_mask"].tolist() == [[1] * 8, [1] * 8, [1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert data.train.inputs["labels"].tolist() == [
        [BP, NONE, NONE, OO, NONE, NONE, IL, NONE],
        [BL, NONE, NONE, NONE, NONE, NONE, NONE, NONE],
        [OO, NONE, NONE, BP, NONE, NONE, NONE, NONE],
        [NONE, BP, NONE, NONE, NONE, NONE, NONE, NONE],
    ]
    assert all(tensor.dtype == torch.int64 for tensor in data.train.inputs.values())
    assert data.train.labels.tolist() == [0] * 4


def test_by_a_tokenizer_the_first_piece_of_a_word_carries_its_tag(tmp_path: Path) -> None:
    words = [["goodness", "bad", "odd"], ["bad", "\u200b", "bad", "good", "goodness"]]
    config = both(tmp_path / "data", words, [[BP, OO, IL], [BL, BP, IP, OO, BP]])
    data = load(replace(config, tokenizer=word_pieces(tmp_path / "pieces"), max_length=6), None)
    assert data.vocab_size == 8
    assert data.train.inputs["input_ids"].tolist() == [[2, 5, 6, 7, 1, 3], [2, 7, 7, 5, 5, 3]]
    # A word that the tokenizer leaves out has no token; the last word's second piece is cut off, its first is not.
    assert data.train.inputs["labels"].tolist() == [[NONE, BP, NONE, OO, IL, NONE], [NONE, BL, IP, OO, BP, NONE]]


def test_a_tokenizer_that_marks_words_by_a_space_keeps_them_apart(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import GPT2Tokenizer

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "Ġa", "ab"]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    merges: Any = [("Ġ", "a"), ("a", "b")]  # the library's annotation says texts, which it does not take
    GPT2Tokenizer(vocab=numbers, merges=merges).save_pretrained(str(tmp_path / "bpe"))
    config = both(tmp_path / "data", [["a", "ab", "a"]], [[BP, IP, OO]])
    data = load(replace(config, tokenizer=str(tmp_path / "bpe"), max_length=5), None)
    ids = data.train.inputs["input_ids"][0].tolist()
    assert [vocabulary[id_] for id_ in ids] == ["Ġa", "Ġa", "b", "Ġa", "<|endoftext|>"]
    assert data.train.inputs["labels"].tolist() == [[BP, IP, NONE, OO, NONE]]


def test_a_tokenizer_that_cannot_tell_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_pretrained", lambda *_, **__: SimpleNamespace(is_fast=False))
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='slow': must be 'bytes' or a tokenizer that says"):
        text.word_tokens([["a"]], "slow", 8, hub=False)


def test_tags_by_name_and_tags_by_number_are_the_same_data(tmp_path: Path) -> None:
    words, tags = [["a", "b"], ["c"], ["d", "e", "f"]], [[BP, IP], [OO], [BL, OO, IL]]
    named = [[NAMES[tag] for tag in of_row] for of_row in tags]
    by_number = load(both(tmp_path / "numbers", words, tags), None)
    shifted = both(tmp_path / "shifted", words, [[tag + 1 for tag in of_row] for of_row in tags])
    for other in (both(tmp_path / "names", words, named), replace(shifted, label_offset=1)):
        assert load(other, None).fingerprint == by_number.fingerprint
    assert load(replace(both(tmp_path / "names", words, named), label_offset=1), None).fingerprint == (
        by_number.fingerprint  # an offset is of numbers
    )
    tags[2][2] = IP
    assert load(both(tmp_path / "other", words, tags), None).fingerprint != by_number.fingerprint


def test_columns_by_name_and_saved_folders(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    lists = {"w": datasets.List(datasets.Value("string")), "t": datasets.List(datasets.ClassLabel(names=[*NAMES]))}
    rows = {"w": [["a"], ["b", "c"]], "t": [[BP], [OO, BL]]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(lists))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    config = both(tmp_path / "parquet", rows["w"], rows["t"])
    saved = replace(config, name=str(tmp_path / "saved"), text=("w",), label="t")
    assert load(saved, None).fingerprint == load(config, None).fingerprint
    assert load(replace(saved, class_names=()), None).fingerprint == load(config, None).fingerprint
    other = (*NAMES[3:], *NAMES[:3])
    with pytest.raises(ValueError, match=r"class_names=\('B-LOC', .*must be the names that the data give: \('O',"):
        load(replace(saved, class_names=other), None)


def test_rows_without_a_tagged_token_are_dropped_with_their_group(tmp_path: Path) -> None:
    config = both(tmp_path, [[], ["a"], [""], ["b", "c"]], [[], [BP], [OO], [OO, OO]], by=[7, 8, 9, 10])
    data = load(replace(config, group="by"), None)
    assert data.train.inputs["input_ids"][:, 0].tolist() == [97, 98]
    assert data.train.groups is not None and data.train.groups.tolist() == [1, 3] and len(data.train) == 2
    tagged(tmp_path, [[""], []], [[OO], []], "test", by=[1, 2])
    _loaded.cache_clear()
    with pytest.raises(ValueError, match=r"task\.data\.text='tokens': .*no row of the test split holds one"):
        load(config, None)


@pytest.mark.parametrize(
    ("words", "tags", "settings", "message"),
    [
        (
            ["a", "b"],
            [[OO], [OO]],
            {},
            r"task\.data\.text='tokens': must be a column of lists of words.*it holds Value",
        ),
        ([[1], [2]], [[OO], [OO]], {}, r"task\.data\.text='tokens': must be a column of lists of words.*it holds List"),
        ([["a"], ["b", None]], [[OO], [OO, OO]], {}, r"task\.data\.text='tokens': .*row . holds \['b', None\]"),
        ([["a"], None], [[OO], [OO]], {}, r"task\.data\.text='tokens': .*row . holds None"),
        (
            [["a"], ["b"]],
            [OO, OO],
            {},
            r"task\.data\.label='ner_tags': must be a column of lists of whole .*holds Value",
        ),
        ([["a"], ["b"]], [[0.5], [1.0]], {}, r"task\.data\.label='ner_tags': .*it holds List\(Value\('float64'\)\)"),
        (
            [["a"], ["b", "c"]],
            [[OO], [OO]],
            {},
            r"label='ner_tags': must be one tag a word; row . holds 2 words, tags \[0",
        ),
        ([["a"], ["b"]], [[OO], None], {}, r"label='ner_tags': must be one tag a word; row . holds 1 words, tags None"),
        ([["a"], ["b"]], [["O"], ["B-ORG"]], {}, r"label='ner_tags': must be names .*'I-LOC'\); row . holds 'B-ORG'"),
        ([["a"], ["b"]], [["O"], ["O"]], {"class_names": ()}, r"task\.data\.class_names=\(\); row . holds 'O'"),
        ([["a"], ["b"]], [[OO], [5]], {}, r"task\.data\.num_classes=5: label 5 less .* is 5; 0\.\.4 is accepted"),
        ([["a"], ["b"]], [[OO], [OO]], {"label": "pos"}, r"task\.data\.label='pos': no such column"),
        ([["a"], ["b"]], [[OO], [OO]], {"text": ("words",)}, r"task\.data\.text='words': no such column"),
    ],
)
def test_columns_that_are_no_words_and_tags_are_refused(
    tmp_path: Path, words: list[Any], tags: list[Any], settings: dict[str, Any], message: str
) -> None:
    config = replace(tagged(tmp_path, words, tags), **settings)
    with pytest.raises(ValueError, match=message):
        load(config, None)


def test_columns_of_other_names_must_be_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"w": [["a"], ["b"]], "t": [[OO], [OO]]}), tmp_path / "train.parquet")
    config = DataConfig(str(tmp_path), objective="token_classes", num_classes=5)
    with pytest.raises(ValueError, match=r"task\.data\.text=\(\): must be .*\['w', 't'\]"):
        load(config, None)
    with pytest.raises(ValueError, match=r"task\.data\.label=None: must be set, as none of \('ner_tags', 'tags', 'lab"):
        load(replace(config, text=("w",)), None)
    assert len(load(replace(config, text=(0,), label=1), None).train) == 1
