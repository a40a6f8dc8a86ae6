"""Data sets by name: the embedded ones, known names in a folder and on the hub, their kind, and real data."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.core.canonical import canonical
from fedsim.data import config as config_module
from fedsim.data import embedded, files
from fedsim.data.source import DataConfig, cifar10, digits, load, pydoc, sst2
from tests.support.data_files import csv_file, decoded, reloaded, same_data


pytestmark = pytest.mark.usefixtures("read_again")


# embedded sets --------------------------------------------------------------------------------------------------------


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
    assert same_data(data, reloaded(digits()))
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
    assert decoded(rows) == topics[sorted(topics)[topic]]
    assert same_data(data, reloaded(pydoc()))


@pytest.mark.parametrize("share", [1e-6, 0.999999])
def test_pydoc_keeps_a_topic_on_each_side(share):
    data = load(pydoc(test_share=share, max_length=512), None)
    assert len(data.train) >= 1 and len(data.test) >= 1


def test_limit_keeps_more_of_the_same():
    def kept(limit: int) -> set[bytes]:
        return {row.numpy().tobytes() for row in load(digits(limit=limit), None).train.inputs["pixel_values"]}

    assert len(kept(20)) == 20 and kept(20) < kept(50)
    assert len(load(digits(limit=10_000), None).train) == 1438


def test_test_examples_may_have_a_limit_of_their_own():
    data, both = load(digits(limit=50, test_limit=20), None), load(digits(limit=50), None)
    assert (len(data.train), len(data.test), len(both.test)) == (50, 20, 50)
    assert len(load(digits(test_limit=20), None).train) == 1438
    rows = {row.numpy().tobytes() for row in both.test.inputs["pixel_values"]}
    assert {row.numpy().tobytes() for row in data.test.inputs["pixel_values"]} < rows


def test_skip_leaves_out_the_first_training_examples():
    whole, rest = load(digits(), None), load(digits(skip=1000), None)
    assert torch.equal(rest.train.inputs["pixel_values"], whole.train.inputs["pixel_values"][1000:])
    assert torch.equal(rest.test.inputs["pixel_values"], whole.test.inputs["pixel_values"])
    few = load(digits(skip=1000, limit=30), None)
    rows = {row.numpy().tobytes() for row in rest.train.inputs["pixel_values"]}
    assert len(few.train) == len(few.test) == 30
    assert {row.numpy().tobytes() for row in few.train.inputs["pixel_values"]} <= rows
    assert canonical(digits(skip=0)) == canonical(digits()) != canonical(digits(skip=1))
    with pytest.raises(ValueError, match=r"task\.data\.skip=1438: must be below 1438, the training examples"):
        load(digits(skip=1438), None)


def test_first_keeps_what_skip_leaves_out():
    """What a public model was trained on, and what nobody has seen, are all there is, and share nothing."""
    parts = [load(config, None).train.inputs["pixel_values"] for config in (digits(first=400), digits(skip=400))]
    assert torch.equal(torch.cat(parts), load(digits(), None).train.inputs["pixel_values"])
    both, few = load(digits(skip=100, first=400), None), load(digits(first=400, limit=30), None)
    assert torch.equal(both.train.inputs["pixel_values"], parts[0][100:]) and len(both.test) == 359
    rows = {row.numpy().tobytes() for row in parts[0]}
    assert len(few.train) == 30 and {row.numpy().tobytes() for row in few.train.inputs["pixel_values"]} <= rows
    with pytest.raises(ValueError, match=r"task\.data\.first=1439: must be at most 1438, the training examples"):
        load(digits(first=1439), None)
    with pytest.raises(ValueError, match=r"task\.data\.first=100: must be greater than 100"):
        digits(skip=100, first=100)


# the kind of data, known before they are loaded -----------------------------------------------------------------------


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


# known names and the hub ----------------------------------------------------------------------------------------------


def test_known_name_in_the_data_folder(tmp_path):
    csv_file(tmp_path / "sst2", "train.tsv", ["a fine film\t1", "dull\t0"])
    csv_file(tmp_path / "sst2", "test.tsv", ["good\t1"])
    data = load(sst2(), str(tmp_path))
    assert (len(data.train), len(data.test), data.train.labels.tolist()) == (2, 1, [1, 0])
    assert same_data(data, reloaded(sst2(text=(0,), label=1), str(tmp_path)))


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


# real data ------------------------------------------------------------------------------------------------------------


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
    assert same_data(data, reloaded(cifar10(limit=300), data_dir))


@pytest.mark.data
def test_real_cifar10_is_whole(data_dir, tmp_path):
    path = Path(data_dir, "cifar10")
    if not path.is_dir():
        pytest.skip(f"{data_dir} has no cifar10")
    tables, _ = files.tables(cifar10(), data_dir, str(tmp_path))
    assert {split: len(table) for split, table in tables.items()} == {"train": 50_000, "test": 10_000}


@pytest.mark.data
def test_real_sst2(data_dir):
    if not Path(data_dir, "sst2").is_dir():
        pytest.skip(f"{data_dir} has no sst2")
    data = load(sst2(), data_dir)
    assert (data.kind, data.num_classes, len(data.train), len(data.test)) == ("text", 2, 6920, 1821)
    assert decoded(data.test.inputs["input_ids"][0]) == "no movement , no yuks , not much of anything"
    assert data.test.labels[:3].tolist() == [0, 0, 0]
    assert len(load(sst2(test_split="validation"), data_dir).test) == 872
