"""The rules of `docs/data.md`, each as a row of a table: what lies on the disk, and what becomes of it."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import files
from fedsim.data.labels import _is_number
from fedsim.data.source import DataConfig, Dataset, load
from tests.support.data_files import csv_file, decoded, picture


pytestmark = pytest.mark.usefixtures("read_again")

IMAGES: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 2}
TEXTS: dict[str, Any] = {"text": ("text",), "label": "label", "num_classes": 2, "max_length": 24}


def tree(folder: Path, *names: str) -> str:
    """Files under a folder: images whose grey is 10 times a number in their names; others hold their names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        number = "".join(letter for letter in path.stem if letter.isdigit())
        if path.suffix.lower() == ".png" and number:
            picture(10 * int(number)).save(path)
        else:
            path.write_text(path.name)
    return str(folder)


def greys(data: Dataset, split: str = "train") -> list[tuple[int, str]]:
    """Each image's number and the name of its class."""
    part = getattr(data, split)
    numbers = part.inputs["pixel_values"][:, 0, 0, 0] // 10
    return [(int(number), data.class_names[label]) for number, label in zip(numbers, part.labels, strict=True)]


def said(data: Dataset, split: str = "train") -> list[tuple[str, str]]:
    """Each text and the name of its class."""
    part = getattr(data, split)
    rows = zip(part.inputs["input_ids"], part.labels, strict=True)
    return [(decoded(row), data.class_names[label]) for row, label in rows]


# image folders --------------------------------------------------------------------------------------------------------

BOTH = ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")
READ: dict[str, tuple[tuple[str, ...], list[int], list[int]]] = {
    "splits of classes": (BOTH, [1, 2], [3, 4]),
    "hidden files and litter": (
        (*BOTH, ".git/x", "train/.DS_Store", "train/a/Thumbs.db", "train/__MACOSX/a/5.png", "train/a/.6.png", ".cache"),
        [1, 2],
        [3, 4],
    ),
    "a notice beside classes": ((*BOTH, "README.md", "train/LICENSE.txt", "notes.pdf"), [1, 2], [3, 4]),
    "names in other letters": (("Train/a/1.png", "TRAIN.txt", "Train/b/2.png", "TEST/a/3.png"), [1, 2], [3]),
    "training and testing": (("training/a/1.png", "training/b/2.png", "Testing/b/3.png"), [1, 2], [3]),
    "test goes before validation": ((*BOTH, "val/a/5.png", "val/b/6.png"), [1, 2], [3, 4]),
    "exact names before others": ((*BOTH, "Training/a/5.png", "testing/a/6.png"), [1, 2], [3, 4]),
    "a class called like a split": (("train/train/1.png", "train/b/2.png", "test/train/3.png"), [1, 2], [3]),
    "endings in capitals": (("train/a/1.png", "train/b/2.PNG", "test/a/3.png"), [1, 2], [3]),
} | {
    name: (("train/a/1.png", "train/b/2.png", f"{name}/a/3.png"), [1, 2], [3])
    for name in ("validation", "Valid", "val", "dev", "EVAL")
}


@pytest.mark.parametrize("how", READ)
def test_image_folders_that_are_read(how: str, tmp_path: Path) -> None:
    names, train, test = READ[how]
    folder = tree(tmp_path, *names)
    data = load(DataConfig(folder, **IMAGES), None)
    assert sorted(number for number, _ in greys(data)) == train
    assert sorted(number for number, _ in greys(data, "test")) == test
    for split in ("train", "test"):
        for number, name in greys(data, split):
            assert any(f"/{name}/{number}." in file for file in names), (number, name)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "an image in no class": ((*BOTH, "train/5.png"), r"train/5\.png lies in no class"),
    "images in no class at all": (("train/1.png", "test/2.png"), r"train/1\.png lies in no class"),
    "an image beside splits": ((*BOTH, "9.png"), r"9\.png lies in no split"),
    "a table beside classes": ((*BOTH, "train/metadata.csv"), r"train/metadata\.csv lies in no class"),
    "folders in a class": ((*BOTH, "test/a/deep/5.png"), r"task\.data\.train_split='train'.*test/a/deep is a folder"),
    "splits of no usual name": (("Trainset/a/1.png", "Testset/a/2.png"), r"train_split='train'.*Testset/a is a folder"),
    "no image": ((*BOTH, "test/b/notes.txt"), r"test/b/notes\.txt is none"),
    "a pdf": ((*BOTH, "test/b/page.pdf"), r"test/b/page\.pdf is none, as the ending '\.pdf' says"),
    "a class called train": (
        ("train/1.png", "bus/2.png"),
        r"test_split='test'.*\['bus', 'train'\] \(where classes are called like splits, task\.data\.train_split='whole",
    ),
    "classes called train and test": (
        ("train/1.png", "test/2.png"),
        r"train/1\.png lies in no class \(where classes are called like splits, task\.data\.train_split='whole'",
    ),
    "no ending": ((*BOTH, "test/b/picture"), r"test/b/picture is none"),
    "an empty class": ((*BOTH, "train/b/.hidden", "train/c/.hidden"), r"train/c holds none"),
    "an empty split": (("train/a/1.png", "train/b/2.png", "test/.hidden"), r"folders of classes; .*test holds none"),
    "a class that is not trained on": ((*BOTH, "test/zebra/5.png"), r"'a', 'b'.*/test, row 2 holds 'zebra'"),
    "test images alone": (("test/a/1.png", "test/b/2.png"), r"task\.data\.train_split='train'.*\['test'\]"),
    "two stand-ins for test": (
        ("train/a/1.png", "train/b/2.png", "val/a/3.png", "dev/b/4.png"),
        r"task\.data\.test_split='test'.*\['dev', 'val'\]",
    ),
    "train twice": (("Train/a/1.png", "training/b/2.png"), r"task\.data\.train_split='train'.*\['Train', 'training'\]"),
    "a test set of another name": (
        ("train/a/1.png", "train/b/2.png", "holdout/a/3.png"),
        r"task\.data\.test_split='test'.*no share of 'train' is held out where \['holdout'\] lie",
    ),
    "other number of classes": ((*BOTH, "train/c/5.png"), r"task\.data\.num_classes=2: must be 3.*'a', 'b', 'c'"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_image_folders_that_are_refused(how: str, tmp_path: Path) -> None:
    names, message = REFUSED[how]
    folder = tree(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(folder, **IMAGES), None)


def test_a_folder_of_classes_is_one_split(tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for number, name in enumerate(["b", "a", "b-c"] * 4, start=1)]
    data = load(DataConfig(tree(tmp_path, *names), **{**IMAGES, "num_classes": 3}, test_share=0.25), None)
    assert data.class_names == ("a", "b", "b-c") and (len(data.train), len(data.test)) == (9, 3)
    found = {f"{name}/{number}.png" for split in ("train", "test") for number, name in greys(data, split)}
    assert found == {*names}


@pytest.mark.parametrize("other", ["bus", "test"])
def test_classes_may_be_called_like_splits(other: str, tmp_path: Path) -> None:
    folder = tree(tmp_path, *(f"{name}/{number}.png" for number, name in enumerate(["train", other] * 4, start=1)))
    unlike: dict[str, Any] = {"train_split": "whole", **({"test_split": "none"} if other == "test" else {})}
    data = load(DataConfig(folder, **IMAGES, **unlike), None)
    assert data.class_names == tuple(sorted(("train", other))) and (len(data.train), len(data.test)) == (6, 2)


def test_classes_are_sorted_by_their_bytes_and_numbered_by_class_names(tmp_path: Path) -> None:
    names = ["B", "a", "Z10", "Z2", "é", "z"]
    folder = tree(tmp_path, *(f"{split}/{name}/{i}.png" for split in ("train", "test") for i, name in enumerate(names)))
    config = DataConfig(folder, **{**IMAGES, "num_classes": 6})
    data = load(config, None)
    assert data.class_names == tuple(sorted(names, key=lambda name: name.encode()))
    assert {*greys(data), *greys(data, "test")} == {*enumerate(names)}
    other = load(DataConfig(folder, **{**IMAGES, "num_classes": 6}, class_names=tuple(names)), None)
    assert other.class_names == tuple(names) and other.train.labels.tolist() != data.train.labels.tolist()
    assert {*greys(other)} == {*enumerate(names)}
    wrong = ("Z3", *names[1:])
    with pytest.raises(ValueError, match=r"task\.data\.class_names=\('Z3', .*must be the names that the data give"):
        load(DataConfig(folder, **{**IMAGES, "num_classes": 6}, class_names=wrong), None)


def test_links_are_followed_and_broken_ones_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "far", "cats/1.png", "2.png")
    tree(tmp_path / "data", "train/b/3.png", "test/b/4.png")
    (tmp_path / "data/train/a").symlink_to(tmp_path / "far/cats", target_is_directory=True)
    (tmp_path / "data/test/a").mkdir()
    (tmp_path / "data/test/a/2.png").symlink_to(tmp_path / "far/2.png")
    config = DataConfig(str(tmp_path / "data"), **IMAGES)
    circle = tmp_path / "data/train/b/again"
    circle.symlink_to(tmp_path / "data", target_is_directory=True)
    with pytest.raises(ValueError, match="train/b/again is a folder in a class"):
        load(config, None)
    circle.unlink()
    data = load(config, None)
    assert greys(data) == [(1, "a"), (3, "b")] and greys(data, "test") == [(2, "a"), (4, "b")]
    picture(50).save(tmp_path / "far/cats/1.png")
    assert greys(load(config, None)) == [(5, "a"), (3, "b")], "files behind links are looked at again"
    (tmp_path / "far/2.png").unlink()
    with pytest.raises(ValueError, match=r"task\.data\.name=.*test/a/2\.png is a link to what is not there"):
        load(config, None)


def test_folders_and_files_of_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "images", *BOTH)
    assert greys(load(DataConfig("images", **IMAGES), None)) == [(1, "a"), (2, "b")]
    tables(tmp_path / "texts", "train.csv", "test.csv")
    assert len(load(DataConfig("texts", **TEXTS), None).train) == 2


def test_images_are_read_in_the_order_that_datasets_reads_them_in(tmp_path: Path) -> None:
    import datasets

    names = [f"{name}/{number}.png" for number, name in enumerate(["b", "a-b", "a", "B", "a.c"] * 2, start=1)]
    folder = tree(tmp_path, *(f"train/{name}" for name in names), "test/a/1.png")
    data = load(DataConfig(folder, **{**IMAGES, "num_classes": 5}), None)
    found = {"train": f"{folder}/train/**"}
    with files.offline():
        theirs: Any = datasets.load_dataset("imagefolder", data_files=found, cache_dir=str(tmp_path / "cache"))["train"]
    assert data.class_names == tuple(theirs.features["label"].names)
    assert data.train.labels.tolist() == theirs["label"][:]
    assert [number for number, _ in greys(data)] == [np.asarray(image)[0, 0] // 10 for image in theirs["image"]]


# splits of tables -----------------------------------------------------------------------------------------------------


def tables(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        separator = "\t" if name.lower().endswith("tsv") else ","
        csv_file(folder, name, [separator.join(row) for row in (("text", "label"), (f"t{number}", "0"), ("u", "1"))])
    return str(folder)


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (("Train.csv", "TEST.csv", "other.csv"), "t0", "t1"),
        (("training.TSV", "dev.tsv"), "t0", "t1"),
        (("train.csv", "valid.csv", "notes.txt", ".test.csv"), "t0", "t1"),
        (("train-00000-of-00002.csv", "train-00001-of-00002.csv", "eval-0-of-1.csv"), "t0", "t2"),
        (("train-0-of-11.csv", *(f"train-{n}-of-11.csv" for n in range(1, 11)), "test.csv"), "t0", "t11"),
    ],
)
def test_tables_by_the_usual_names(names: tuple[str, ...], train: str, test: str, tmp_path: Path) -> None:
    data = load(DataConfig(tables(tmp_path, *names), **TEXTS), None)
    assert decoded(data.train.inputs["input_ids"][0]) == train
    assert decoded(data.test.inputs["input_ids"][0]) == test
    if len(names) > 10:
        texts = [decoded(row) for row in data.train.inputs["input_ids"][::2]]
        assert texts == [f"t{number}" for number in range(11)], "files are in the order of their numbers"


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (("train.csv", "held_out.csv"), {}, r"task\.data\.test_split='test'.*\['held_out'\] lie"),
        (("train.csv", "val.csv", "dev.csv"), {}, r"task\.data\.test_split='test'.*\['dev', 'val'\]"),
        (("data.csv",), {}, r"task\.data\.train_split='train'.*\['data\.csv'\]"),
        (("train-00000-of-00002.csv", "test.csv"), {}, r"all files of a split; there are \['train-00000-of-00002\.csv"),
        (("train-1-of-2.csv", "train-2-of-2.csv"), {}, r"all files of a split"),
        (("train.csv", "train-00000-of-00001.csv"), {}, r"one file, or one set of files, a split"),
        (("train.csv", "train/a.csv"), {}, r"one file, or one set of files, a split"),
        (("train.csv", "link to train as test.csv"), {}, r"splits lie apart; .*train\.csv', '.*test\.csv'"),
        (("train.csv", "val.csv"), {"train_split": "val"}, r"task\.data\.test_split='test'.*\['train'\] lie"),
    ],
)
def test_tables_of_other_names_are_refused(
    names: tuple[str, ...], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name in names:
        if name.startswith("link"):
            (tmp_path / name.split()[-1]).symlink_to(tmp_path / "train.csv")
        else:
            tables((tmp_path / name).parent, Path(name).name)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(tmp_path), **{**TEXTS, **settings}), None)


def test_saved_sets_by_the_usual_names(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made: Any = {
        name: datasets.Dataset.from_dict({"text": [name], "label": [0]}) for name in ("Training", "Val", "extra")
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path))
    data = load(DataConfig(str(tmp_path), **TEXTS), None)
    assert decoded(data.train.inputs["input_ids"][0]) == "Training"
    assert decoded(data.test.inputs["input_ids"][0]) == "Val"
    shutil.rmtree(tmp_path / "Val")
    with pytest.raises(ValueError, match=r"task\.data\.test_split='test'.*\['extra'\] lie"):
        load(DataConfig(str(tmp_path), **TEXTS), None)


def test_a_saved_set_is_read_whatever_format_it_was_left_in(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    plain = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1], "by": [5, 6, 5]})
    for name, rows in (("plain", plain), ("numpy", plain.with_format("numpy")), ("torch", plain.with_format("torch"))):
        rows.save_to_disk(str(tmp_path / name))
    found = [
        load(DataConfig(str(tmp_path / name), **TEXTS, group="by"), None).fingerprint
        for name in ("plain", "numpy", "torch")
    ]
    assert found[0] == found[1] == found[2]


# columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_are_joined_by_name_from_file_to_file(ending: str, tmp_path: Path) -> None:
    files = {
        "train-0-of-2": {"text": ["a", "b"], "label": [0, 1], "stars": [4, 4]},
        "train-1-of-2": {"stars": [4, 4], "label": [1, 0], "text": ["c", "d"]},
        "test": {"more": [9], "label": [1], "text": ["e"]},  # a column that nobody reads may be missing
    }
    for name, columns in files.items():
        if ending == "csv":
            lines = [",".join(map(str, row)) for row in (columns, *zip(*columns.values(), strict=True))]
            csv_file(tmp_path, f"{name}.csv", lines)
        else:
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    by_name = DataConfig(str(tmp_path), **TEXTS)
    for config in (by_name, DataConfig(str(tmp_path), **{**TEXTS, "text": (0,), "label": 1})):
        data = load(config, None)
        assert [decoded(row) for row in data.train.inputs["input_ids"]] == ["a", "b", "c", "d"]
        assert data.train.labels.tolist() == [0, 1, 1, 0] and data.test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            {"text": ["a"], "label": [0]},
            {"text": ["b"], "kind": [0]},
            r"the column 'label'; .*test\.parquet has \['text'",
        ),
        (
            {"text": ["a"], "label": [0]},
            {"text": ["b"], "label": [0.0]},
            r"whole numbers in .*train\.parquet, float64 in",
        ),
        (
            {"text": ["a"], "label": [0]},
            {"text": ["b"], "label": ["0"]},
            r"whole numbers in .*texts in .*test\.parquet",
        ),
        (
            {"text": ["a"], "label": [0]},
            {"text": [1], "label": [0]},
            r"kind of 'text': texts in .*whole numbers in .*test",
        ),
    ],
)
def test_files_that_do_not_go_together_are_named(
    train: dict[str, list], test: dict[str, list], message: str, tmp_path: Path
) -> None:
    for name, columns in (("train", train), ("test", test)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=rf"task\.data\.name=.*{message}"):
        load(DataConfig(str(tmp_path), **TEXTS), None)


def test_a_header_that_is_an_example_and_names_that_are_given_twice(tmp_path: Path) -> None:
    name = csv_file(tmp_path, "data.csv", ["good,1", "bad,0", "fine,1"])
    positions = {"text": (0,), "label": 1, "num_classes": 2}
    with pytest.raises(ValueError, match=r"task\.data\.header=True: must be false, .*data\.csv .*the name '1'"):
        load(DataConfig(name, **positions), None)
    assert len(load(DataConfig(name, **positions, header=False), None).train) == 2
    twice = csv_file(tmp_path, "twice.csv", ["text,label,label", "a,0,1", "b,1,0"])
    with pytest.raises(ValueError, match=r"names of their own; .*twice\.csv has \['text', 'label', 'label'\]"):
        load(DataConfig(twice, **TEXTS), None)


NAMES = st.lists(st.text("abcXYZ 019-é", min_size=1).filter(str.strip), min_size=2, max_size=4, unique=True)


@settings(max_examples=25)
@given(st.data())
def test_every_text_keeps_its_class_however_files_are_laid_out(data: st.DataObject) -> None:
    """Any order of columns in any file, other columns between them, any format: `text` says what `label` says."""
    names = data.draw(NAMES.filter(lambda names: not any(map(_is_number, names))))
    ending = data.draw(st.sampled_from(["csv", "tsv", "parquet"]))
    class_names = data.draw(st.sampled_from([(), tuple(reversed(names))]))
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train-0-of-2", "train-1-of-2", "test"):
            order = data.draw(st.permutations(["text", "label", *data.draw(st.sets(st.sampled_from(["a", "b"])))]))
            rows = (
                names
                if split == "train-0-of-2"
                else data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
            )
            frame = pd.DataFrame(
                {column: rows if column in ("text", "label") else ["x"] * len(rows) for column in order}
            )
            path = f"{folder}/{split}.{ending}"
            if ending == "parquet":
                frame.to_parquet(path)
            else:
                frame.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
        config = DataConfig(folder, **{**TEXTS, "num_classes": len(names), "max_length": 64}, class_names=class_names)
        found = load(config, None)
    assert found.class_names == (class_names or tuple(sorted(names)))
    assert all(text == name for split in ("train", "test") for text, name in said(found, split))
