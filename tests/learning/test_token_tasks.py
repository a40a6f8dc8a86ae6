"""Tasks that label tokens: which token carries which tag, which tokens are masked, and what of it is found."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.core.canonical import canonical, revived
from fedsim.core.seeding import derive
from fedsim.data import text
from fedsim.data.config import DataConfig, Dataset, Split, pydoc
from fedsim.data.partition import Partition
from fedsim.data.source import load
from fedsim.experiment import Experiment, Tier, parsed
from fedsim.learning.entities import EntityCounts, EntityTags
from fedsim.learning.masking import masked
from fedsim.learning.meter import Meter
from fedsim.learning.task import IGNORED, Task, TaskConfig, subset
from fedsim.models import Form, Inputs
from fedsim.results.tables import read_table
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from tests.support.clients import local_train, objective_of


NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
OO, BP, IP, BL, IL = range(5)
NONE = IGNORED


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> Iterator[None]:
    """Models this small only lose time to a second thread; a file of the same name is read again in each test."""
    load.cache_clear()
    yield


def tagged(folder: Path, words: list[Any], tags: list[Any], split: str = "train", **columns: list[Any]) -> DataConfig:
    """A parquet file of one split, and the data it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"tokens": words, "ner_tags": tags, **columns}), folder / f"{split}.parquet")
    return DataConfig(
        str(folder), objective="token_classes", num_classes=5, class_names=NAMES, max_length=8, test_share=0.5
    )


def both(folder: Path, words: list[Any], tags: list[Any], **columns: list[Any]) -> DataConfig:
    """The same examples in the training and in the test split, in order."""
    tagged(folder, words, tags, "test", **columns)
    return tagged(folder, words, tags, "train", **columns)


# which token carries a tag --------------------------------------------------------------------------------------------


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


def _word_pieces(folder: Path) -> str:
    """BERT's kind of tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, good 5, ##ness 6, bad 7."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "##ness", "bad"]
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(str(folder))
    return str(folder)


def test_by_a_tokenizer_the_first_piece_of_a_word_carries_its_tag(tmp_path: Path) -> None:
    words = [["goodness", "bad", "odd"], ["bad", "\u200b", "bad", "good", "goodness"]]
    config = both(tmp_path / "data", words, [[BP, OO, IL], [BL, BP, IP, OO, BP]])
    data = load(replace(config, tokenizer=_word_pieces(tmp_path / "pieces"), max_length=6), None)
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
    load.cache_clear()
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


# entities -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ([OO, BP, IP, OO], {(1, 3, "PER")}),
        ([BP, BP], {(0, 1, "PER"), (1, 2, "PER")}),
        ([BP, IP, BP, IP], {(0, 2, "PER"), (2, 4, "PER")}),
        ([OO, IP, IP], {(1, 3, "PER")}),  # begins without a B-
        ([IP, OO, IP], {(0, 1, "PER"), (2, 3, "PER")}),
        ([BP, IL, IL], {(0, 1, "PER"), (1, 3, "LOC")}),  # another kind begins another entity
        ([BL, IL, IP, BP], {(0, 2, "LOC"), (2, 3, "PER"), (3, 4, "PER")}),
        ([OO, OO], set()),
        ([], set()),
    ],
)
def test_entities_by_hand(tags: list[int], entities: set[tuple[int, int, str]]) -> None:
    reader = EntityTags.of(NAMES)
    assert reader is not None
    found = reader.entities(np.array(tags, dtype=np.int64), np.zeros(len(tags), dtype=np.int64))
    assert {(first, last, ("LOC", "PER")[kind]) for first, last, kind in found} == entities


def test_no_entity_goes_on_in_the_next_example() -> None:
    reader = EntityTags.of(NAMES)
    assert reader is not None
    tags = np.array([BP, IP, IP])
    assert reader.entities(tags, np.array([0, 0, 0])) == {(0, 3, 1)}
    assert reader.entities(tags, np.array([0, 0, 1])) == {(0, 2, 1), (2, 3, 1)}
    assert reader.entities(tags, np.array([4, 7, 7])) == {(0, 1, 1), (1, 3, 1)}


def test_an_entity_must_be_found_whole_and_of_its_kind() -> None:
    reader = EntityTags.of(NAMES)
    assert reader is not None
    # In order: found, too short, of the wrong kind, not said, not there, two taken for one.
    true = [BP, IP, OO, BP, IP, IP, OO, BL, IL, OO, BL, OO, OO, OO, BP, BP]
    said = [BP, IP, OO, BP, IP, OO, OO, BP, IP, OO, OO, OO, BL, OO, BP, IP]
    counts = reader.count(np.array(true), np.array(said), np.zeros(16))
    assert counts == EntityCounts(right=1, said=5, true=6)
    assert (counts.precision, counts.recall, counts.f1) == (1 / 5, 1 / 6, 2 / 11)
    assert counts.f1 == pytest.approx(2 / (1 / counts.precision + 1 / counts.recall))
    # A B- said for an I- that begins is the same entity; the tag itself is wrong all the same.
    assert reader.count(np.array([OO, IP]), np.array([OO, BP]), np.zeros(2)) == EntityCounts(1, 1, 1)


@pytest.mark.parametrize(
    "counts", [EntityCounts(), EntityCounts(0, 0, 3), EntityCounts(0, 3, 0), EntityCounts(0, 3, 3)]
)
def test_nothing_right_is_zero_and_no_error(counts: EntityCounts) -> None:
    assert (counts.precision, counts.recall, counts.f1) == (0, 0, 0)


@pytest.mark.parametrize("names", [(), ("NOUN", "VERB"), ("O", "S-PER"), ("O", "PER"), ("O", "B_PER")])
def test_classes_that_are_no_tags_have_no_entities(names: tuple[str, ...]) -> None:
    assert EntityTags.of(names) is None


# scores of token classes ----------------------------------------------------------------------------------------------


class Knows(nn.Module):
    """Says of each token the class that a table has for its id."""

    def __init__(self, said: dict[int, int], classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(300, classes), requires_grad=False)
        for id_, class_ in said.items():
            self.logits[id_, class_] = math.log(3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def tag_task(config: DataConfig) -> tuple[Task, Dataset]:
    data = load(config, None)
    return Task(TaskConfig(config, family="bert"), data), data


def test_token_classes_are_scored_by_token_and_by_entity(tmp_path: Path) -> None:
    words = [["a", "b", "c"], ["b", "x"], ["d", "y", "y"]]
    tags = [[BP, IP, OO], [IP, OO], [BL, OO, OO]]
    task, data = tag_task(both(tmp_path, words, tags))
    model = Knows({ord("a"): BP, ord("b"): IP, ord("c"): OO, ord("x"): IP, ord("d"): BL, ord("y"): OO}, 5)
    result = task.score(model, data.test)
    assert result.count.tolist() == [4, 1, 2, 1, 0]
    assert result.correct.tolist() == [3, 1, 2, 1, 0]
    assert result.accuracy == 7 / 8
    # True: a b | b | d; said: a b | b x | d.
    assert result.entities == EntityCounts(right=2, said=3, true=3)
    assert (result.precision, result.recall, result.f1) == (2 / 3, 2 / 3, 2 / 3)
    # The softmax of (log 3, 0, 0, 0, 0) is 3/7 and 1/7: one of eight is wrong.
    assert result.loss == pytest.approx((7 * math.log(7 / 3) + math.log(7)) / 8, rel=1e-6)
    batch = task.batch(data.test, torch.arange(3))
    assert float(task.loss(model(batch["input_ids"], batch["attention_mask"]).logits, batch)) == pytest.approx(
        result.loss, rel=1e-6
    )
    for batch_size in (1, 2, 100):
        other = task.score(model, data.test, batch_size)
        assert other.entities == result.entities and np.array_equal(other.correct, result.correct)
        assert other.loss == pytest.approx(result.loss, rel=1e-6)
    parts = [task.score(model, subset(data.test, np.array(part))) for part in ([2], [0, 1])]
    assert all(part.entities is not None for part in parts)
    assert sum((part.entities for part in parts if part.entities), EntityCounts()) == result.entities


def test_without_names_of_tags_there_is_no_entity_score(tmp_path: Path) -> None:
    task, data = tag_task(replace(both(tmp_path, [["a"], ["b"]], [[BP], [OO]]), class_names=()))
    result = task.score(Knows({}, 5), data.test)
    assert result.entities is None and result.accuracy == 1 / 2
    assert all(math.isnan(value) for value in (result.precision, result.recall, result.f1))


def test_an_empty_split_has_no_entity_score(tmp_path: Path) -> None:
    task, data = tag_task(both(tmp_path, [["a"], ["b"]], [[BP], [OO]]))
    result = task.score(Knows({}, 5), subset(data.test, np.array([], dtype=np.int64)))
    assert all(
        math.isnan(value) for value in (result.accuracy, result.loss, result.precision, result.recall, result.f1)
    )


@pytest.mark.parametrize("objective", ["token_classes", "masked_token"])
def test_an_example_has_the_shapes_of_a_batch(tmp_path: Path, objective: Any) -> None:
    task, data = tag_task(both(tmp_path, [["a"], ["b"]], [[BP], [OO]]))
    if objective == "masked_token":
        config = pydoc(objective=objective, limit=3, max_length=8)
        data, task = load(config, None), Task(TaskConfig(config, family="bert"))
    batch, example = task.batch(data.train, torch.arange(2)), task.example(2)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in batch.items()
    }
    assert float(task.loss(torch.zeros(2, 8, 300), example)) == pytest.approx(math.log(300))


# data with a mask -----------------------------------------------------------------------------------------------------


def test_masked_pieces_are_those_of_next_token_data() -> None:
    masked_data, next_data = load(pydoc(objective="masked_token", limit=9), None), load(pydoc(limit=9), None)
    assert (masked_data.kind, masked_data.num_classes, masked_data.vocab_size) == ("mlm", 1, 259)
    assert masked_data.fingerprint == next_data.fingerprint
    for objective, mask, vocabulary in (("masked_token", 258, 259), ("next_token", None, 258)):
        inputs = TaskConfig(pydoc(objective=objective), family="gpt2").inputs
        assert (inputs.mask_id, inputs.vocab_size, inputs.padding_id, inputs.end_id) == (mask, vocabulary, 256, 257)


def test_the_mask_of_a_tokenizer(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    pieces = _word_pieces(tmp_path / "pieces")
    (tmp_path / "train.csv").write_text("text\ngood goodness bad good\nbad\n")
    (tmp_path / "test.csv").write_text("text\ngood bad\n")
    config = DataConfig(str(tmp_path), objective="masked_token", tokenizer=pieces, max_length=3)
    assert (config.mask_id, config.vocab_size) == (4, 8)
    assert load(config, None).train.inputs["input_ids"].tolist() == [[5, 5, 6], [7, 5, 0]]
    assert replace(config, objective="next_token").mask_id is None
    bare = BertTokenizer.from_pretrained(pieces)
    bare.mask_token = None
    bare.save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(
        ValueError, match=r"task\.data\.tokenizer='.*bare': must be 'bytes' or a tokenizer that has a m"
    ):
        TaskConfig(replace(config, tokenizer=str(tmp_path / "bare")), family="bert").inputs  # noqa: B018


# which tokens are masked ----------------------------------------------------------------------------------------------


BYTES = Inputs("mlm", 1, vocab_size=259, max_length=50, padding_id=256, end_id=257, mask_id=258)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_of_masked_tokens() -> None:
    ids = torch.randint(256, (2000, 50), generator=seeded(1))
    read, labels = masked(ids, torch.ones_like(ids), BYTES, seeded(0))
    predicted = labels != IGNORED
    assert torch.equal(labels[predicted], ids[predicted])
    assert torch.equal(read[~predicted], ids[~predicted])
    total = int(predicted.sum())
    # Five standard deviations of each share, of 100,000 tokens and of about 15,000.
    assert abs(total / ids.numel() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / ids.numel())
    hidden, stayed = (read == 258) & predicted, (read == ids) & predicted
    replaced = predicted & ~hidden & ~stayed
    for share, expected in ((hidden, 0.8 + 0.1 / 259), (stayed, 0.1 + 0.1 / 259), (replaced, 0.1 * 257 / 259)):
        assert abs(int(share.sum()) / total - expected) < 5 * math.sqrt(expected * (1 - expected) / total)
    counts = torch.bincount(read[replaced], minlength=259).double()
    assert counts[258] == 0 and counts[:256].min() >= 0 and counts[:258].gt(0).double().mean() > 0.95
    assert counts.max() < 5 * counts[:258].mean()


def test_ends_and_padding_are_not_to_be_predicted() -> None:
    ids = torch.tensor([[97, 257, 256, 256], [97, 98, 257, 256], [257, 257, 256, 256], [258, 97, 257, 256]])
    mask = (ids != 256).long()
    seen = torch.zeros(4, 4, dtype=torch.bool)
    for seed in range(60):
        labels = masked(ids, mask, BYTES, seeded(seed))[1]
        assert (labels != IGNORED).any(dim=1).all()
        seen |= labels != IGNORED
    # The first example has one token to choose; the third has none but ends, and one of these is chosen.
    assert seen.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, False, False],
        [False, True, False, False],
    ]


def test_padding_that_is_also_the_end_is_told_by_the_attention_mask() -> None:
    inputs = replace(BYTES, padding_id=257)
    ids, mask = torch.tensor([[97, 98, 257, 257]] * 50), torch.tensor([[1, 1, 1, 0]] * 50)
    labels = masked(ids, mask, inputs, seeded(0))[1]
    assert (labels[:, :2] != IGNORED).any(dim=1).all() and (labels[:, 2:] == IGNORED).all()


def test_a_draw_depends_on_the_generator_alone() -> None:
    ids = torch.randint(256, (20, 50), generator=seeded(1))
    mask, before = torch.ones_like(ids), ids.clone()
    torch.manual_seed(0)
    first, again, other = (masked(ids, mask, BYTES, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(ids, before)
    none = masked(ids[:0], mask[:0], BYTES, seeded(0))
    assert none[0].shape == none[1].shape == (0, 50)


@pytest.fixture(scope="module")
def masked_task() -> Task:
    config = pydoc(objective="masked_token", limit=30, max_length=24)
    return Task(TaskConfig(config, family="bert"), load(config, None))


def test_batches_draw_afresh_and_scoring_does_not(masked_task: Task) -> None:
    assert masked_task.dataset is not None
    split, index, drawn = masked_task.dataset.train, torch.arange(5), seeded(0)
    first, second = (masked_task.batch(split, index, generator=drawn) for _ in range(2))
    assert not torch.equal(first["labels"], second["labels"])
    plain, again = (masked_task.batch(split, index) for _ in range(2))
    assert torch.equal(plain["labels"], again["labels"]) and torch.equal(plain["input_ids"], again["input_ids"])
    # Masked once, always masked the same: a split that carries labels is left as it is.
    fixed = Split(plain, split.labels[:5])
    for name, tensor in masked_task.batch(fixed, torch.tensor([3, 1]), generator=drawn).items():
        assert torch.equal(tensor, plain[name][[3, 1]])


class Guesses(nn.Module):
    """Logits that depend on the token read and on its place."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=seeded(0)), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        place = torch.arange(input_ids.shape[1])[:, None] / 10
        return SimpleNamespace(logits=self.table[input_ids] + place * self.table[0])


def test_masked_scores_do_not_depend_on_the_batch_size(masked_task: Task) -> None:
    assert masked_task.dataset is not None
    split, model = masked_task.dataset.test, Guesses(259)
    reference = masked_task.score(model, split)
    whole = masked_task.batch(split, torch.arange(len(split)))
    assert reference.count.tolist() == [int((whole["labels"] != IGNORED).sum())]
    assert reference.count.sum() >= len(split) == 30
    logits = model(whole["input_ids"], whole["attention_mask"]).logits
    assert reference.loss == pytest.approx(float(masked_task.loss(logits, whole)), rel=1e-5)
    for batch_size in (1, 7, 1000):
        other = masked_task.score(model, split, batch_size)
        assert np.array_equal(other.count, reference.count) and np.array_equal(other.correct, reference.correct)
        assert other.loss == pytest.approx(reference.loss, rel=1e-6)
    assert reference.entities is None


def test_a_masked_score_by_hand() -> None:
    ids = torch.full((6, 24), 97)
    split = Split({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(6, dtype=torch.long))
    task = Task(TaskConfig(pydoc(objective="masked_token", max_length=24), family="bert"))
    always = Knows({id_: 97 for id_ in range(259)}, 259)
    result = task.score(always, split)
    assert result.accuracy == 1 and result.loss == pytest.approx(math.log(261 / 3), rel=1e-6)
    labels = task.batch(split, torch.arange(6))["labels"]
    assert result.count.tolist() == [int((labels != IGNORED).sum())]
    # A model that says what it reads is right only where the mask is not.
    copies = Knows({id_: id_ for id_ in range(259)}, 259)
    read = task.batch(split, torch.arange(6))["input_ids"]
    assert task.score(copies, split).correct.tolist() == [int((read[labels != IGNORED] == 97).sum())]


def test_training_masks_afresh_in_each_epoch_and_the_same_in_each_run(masked_task: Task) -> None:
    assert masked_task.dataset is not None
    train = subset(masked_task.dataset.train, np.arange(4))
    form = Form(8, 1, heads=2)

    def labels_seen(round: int, purpose: str) -> list[Tensor]:
        seen = []

        def loss(parameters: Any, batch: dict[str, Tensor]) -> Tensor:
            seen.append(batch["labels"])
            return masked_task.loss(parameters["table"][batch["input_ids"]], batch)

        ctx = ClientContext(
            seed=0,
            round=round,
            task=masked_task,
            intermediate=form,
            target=form,
            info=ClientInfo(0, "phone", form, 4),
            train=train,
            device=torch.device("cpu"),
            meter=Meter({}),
        )
        table = {"table": torch.zeros(259, 259)}
        local_train(ctx, objective_of(loss), table, purpose=purpose, lr=1e-3, epochs=2, batch_size=4)
        return seen[-2:]  # the counting of a step came first

    def chosen(batch: Tensor) -> set[tuple[bool, ...]]:
        return {tuple(row) for row in (batch != IGNORED).tolist()}

    one, two = labels_seen(1, "target")
    assert chosen(one) != chosen(two)
    again = labels_seen(1, "target")
    assert torch.equal(one, again[0]) and torch.equal(two, again[1])
    assert chosen(labels_seen(2, "target")[0]) != chosen(one) != chosen(labels_seen(1, "local")[0])


# settings, and what reaches the tables --------------------------------------------------------------------------------


def test_settings_reach_the_model_and_the_identity_of_a_run() -> None:
    config = TaskConfig(pydoc(), family="gpt2", settings=(("activation_function", "relu"), ("initializer_range", 0.5)))
    assert config.inputs.settings == config.settings
    assert TaskConfig(settings=(("qkv_bias", False),)).inputs.settings == (("qkv_bias", False),)
    assert revived(canonical(config)) == config
    assert canonical(config) != canonical(replace(config, settings=()))
    assert replace(config, settings=parsed("(('rope_theta', 5e5),)")).settings == (("rope_theta", 5e5),)
    for wrong in ((("a", 1), ("a", 2)), (("", 1),), (("a", None),), (("a",),), ("a", 1)):
        with pytest.raises(ValueError, match=r"^task\.settings="):
            TaskConfig(settings=wrong)  # pyright: ignore[reportArgumentType]


def test_entity_scores_reach_the_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [[("abc", "de", "x")[word] for word in rng.integers(3, size=3)] for _ in range(40)]
    tags = [[(BP, IP, OO)[("abc", "de", "x").index(word)] for word in row] for row in words]
    config = replace(both(tmp_path / "data", words, tags), max_length=12)
    form = Form(8, 1, heads=2)
    experiment = Experiment(
        FedAvg(lr=1e-2),
        TaskConfig(config, family="bert"),
        tiers=(Tier("phone", form),),
        intermediate=form,
        target=form,
        partition=Partition("iid"),
        participants=2,
        rounds=1,
    )
    runtime = InlineRuntime()
    run(experiment, runtime=runtime, out=tmp_path / "out")
    runtime.close()
    clients: Any = read_table(tmp_path / "out", "clients")
    rounds: Any = read_table(tmp_path / "out", "rounds")
    task, data = tag_task(config)
    assert list(clients["num_test_examples"]) == [40] * 4 and list(rounds["stage"]) == ["local", "federated"]
    for name in ("precision", "recall", "f1"):
        assert clients[name].between(0, 1).all()
        means = clients.groupby("round")[name].mean()
        assert list(rounds[f"{name}_mean"]) == pytest.approx(list(means))
    for round in (0, 1):  # a global model: everyone's score is the same, but not what each makes of its own part
        of_round = clients[clients["round"] == round]
        assert of_round["f1"].nunique() == 1 and of_round["accuracy"].nunique() == 1
        assert list(of_round["accuracy_local"]) == list(of_round["accuracy_val"])
    fresh = task.fresh(form, derive(experiment.seed, "target", 0))  # where FedAvg starts
    untrained = task.score(task.module(form, fresh), data.test)
    first = rounds.iloc[0]
    assert (first["f1_mean"], first["accuracy_mean"]) == (untrained.f1, untrained.accuracy)
    assert untrained.f1 > 0


def test_other_tasks_have_no_entity_scores(tiny_run: Path) -> None:
    clients, rounds = (read_table(tiny_run, table) for table in ("clients", "rounds"))
    assert clients[["precision", "recall", "f1"]].isna().to_numpy().all()
    assert rounds[["precision_mean", "recall_mean", "f1_mean"]].isna().to_numpy().all()
