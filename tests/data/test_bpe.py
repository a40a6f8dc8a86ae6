"""A tokenizer trained on a split that nobody holds: what it gives, what is refused, and that it travels with a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from baselines.fedavg import FedAvg
from benchmarks.suites import tiny
from fedsim.data import bpe, text
from fedsim.data.config import DataConfig
from fedsim.data.partition import Partition
from fedsim.data.source import _loaded, load
from fedsim.experiment import Experiment
from fedsim.learning.task import TaskConfig
from fedsim.models import Form
from fedsim.results.export import export
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run


WORDS = ["the", "film", "is", "a", "good", "one", "and", "the", "cast", "is", "as", "good", "as", "the", "film"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 + 20 labelled sentences to train and score on, and 30 of other words that are public."""
    directory = tmp_path / "data"
    directory.mkdir()
    for split, count, words in (("train", 60, WORDS), ("test", 20, WORDS), ("public", 30, ["banana", "bandana"])):
        lines = [f"{' '.join(words[i % 5 :][: 3 + i % 4])} {i},{i % 2}" for i in range(count)]
        (directory / f"{split}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return directory


def config(folder: Path, tokenizer: str = "bpe:public:270", **changes) -> DataConfig:
    settings = {"text": ("text",), "label": "label", "num_classes": 2, "max_length": 24, "tokenizer": tokenizer}
    return DataConfig(str(folder), **(settings | changes))


def test_pairs_are_joined_by_how_often_the_public_texts_have_them() -> None:
    """`aab` three times: special tokens, bytes, then three joins, of which the last makes the whole word."""
    tokenizer = bpe.tokenizer(bpe.trained(["aab aab aab"], bpe.SMALLEST + 3))
    words = [token for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])][bpe.SMALLEST :]
    assert len(words) == 3 and words[-1] in ("Ġaab", "aab") and all(set(word) <= set("Ġab") for word in words)
    assert tokenizer.convert_tokens_to_ids(list(bpe.SPECIAL)) == [0, 1, 2, 3]
    ids = tokenizer("aab", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1 and ids[0] >= bpe.SMALLEST
    assert tokenizer("aab")["input_ids"] == [3, *ids, 1]


def test_every_text_can_be_written_and_read_back() -> None:
    tokenizer = bpe.tokenizer(bpe.trained(["plain words"], bpe.SMALLEST + 2))
    for said in ("plain", "Ünïcode 漢字 \n\t", "<end> is text"):
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        assert str(tokenizer.decode(ids)).removeprefix(" ") == said
        assert max(ids) < bpe.SMALLEST + 2


def test_the_same_texts_give_the_same_tokenizer(folder: Path) -> None:
    texts = [line for line in (folder / "public.csv").read_text().splitlines()[1:]]
    first, second = (bpe.trained(texts, 300) for _ in range(2))
    assert first == second
    assert bpe.trained(texts[::2], 300) != first


def test_sizes_and_special_ids_are_known_without_data() -> None:
    assert text.vocabulary("bpe:public:1234", False) == 1234
    assert text.special_ids("bpe:public:1234", False) == (0, 1) and text.mask_id("bpe:public:1234", False) == 2
    assert bpe.parsed("bytes") is None and bpe.parsed("bpe:a:b:300") == bpe.Bpe("a:b", 300)


def test_data_are_read_with_the_public_splits_tokenizer(folder: Path) -> None:
    data = load(config(folder), None)
    assert len(data.train) == 60 and len(data.test) == 20 and data.vocab_size == 270
    assert data.tokenizer is not None
    words = data.tokenizer.get_vocab()
    assert any(word.startswith("Ġban") for word in words) and "Ġfilm" not in words  # nothing of what participants hold
    ids, mask = data.train.inputs["input_ids"], data.train.inputs["attention_mask"]
    assert (ids[:, 0] == 3).all() and (ids[mask == 0] == bpe.PADDING_ID).all() and int(ids.max()) < 270
    by_bytes = load(config(folder, "bytes"), None)
    assert by_bytes.tokenizer is None and by_bytes.fingerprint != data.fingerprint
    before = data.fingerprint
    (folder / "public.csv").write_text("text,label\n" + "the film is good,0\n" * 9)
    _loaded.cache_clear()
    assert load(config(folder), None).fingerprint != before  # what is public decides the tokens


@pytest.mark.parametrize("objective", ["next_token", "masked_token"])
def test_language_modelling_predicts_its_tokens(folder: Path, objective: str) -> None:
    data = load(config(folder, objective=objective, label=None), None)
    ids = data.train.inputs["input_ids"]
    assert int(ids.max()) < 270 and not (ids == 3).any()  # pieces have no start
    assert (ids == bpe.END_ID).any()


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("bpe:train:300", "a split that nobody trains on and nobody is scored on"),
        ("bpe:test:300", "a split that nobody trains on and nobody is scored on"),
        ("bpe:public:259", "at least 260 tokens"),
        ("bpe:public", "'bpe:SPLIT:SIZE'"),
        ("bpe::300", "'bpe:SPLIT:SIZE'"),
        ("bpe:public:many", "'bpe:SPLIT:SIZE'"),
        ("bpe:missing:300", "train_split='missing'"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(folder: Path, tokenizer: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^task\.data\.tokenizer=") as error:
        load(config(folder, tokenizer), None)
    assert said in str(error.value)


def test_a_split_that_stands_in_for_the_test_split_is_refused(folder: Path) -> None:
    (folder / "test.csv").rename(folder / "validation.csv")
    with pytest.raises(ValueError, match="stands in for the test split"):
        load(config(folder, "bpe:validation:300"), None)
    assert len(load(config(folder), None).test) == 20


def experiment(folder: Path) -> Experiment:
    task = TaskConfig(config(folder), "bert")
    base = replace(tiny(), task=task, algorithm=FedAvg(lr=1e-3, batch_size=32), rounds=1, partition=Partition("iid"))
    return replace(base, tiers=tuple(replace(tier, form=Form(16, 1)) for tier in base.tiers))


def test_a_run_stores_its_tokenizer_and_an_export_brings_it_along(folder: Path, tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", experiment(folder)
    runtime = InlineRuntime()
    run_id = run(chosen, runtime=runtime, out=out)
    runtime.close()
    stored = out / "checkpoints" / run_id / "tokenizer"
    data = load(chosen.task.data, None)
    (folder / "public.csv").unlink()  # an export needs no data
    exported = export(out, None, 0, tmp_path / "model")
    assert data.tokenizer is not None
    line = (folder / "test.csv").read_text().splitlines()[1].rpartition(",")[0]
    for place in (stored, exported):
        found = AutoTokenizer.from_pretrained(place)(line, padding="max_length", truncation=True, max_length=24)
        assert torch.equal(torch.tensor(found["input_ids"]), data.test.inputs["input_ids"][0])
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == 270
