"""Labels: numbers from 0 by the names of classes, wherever these come from; rows that fit nowhere are named."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.labels import Labels, numbered
from fedsim.data.source import DataConfig, Dataset, digits, load
from tests.support.data_files import csv_file, decoded


pytestmark = pytest.mark.usefixtures("read_again")

TEXTS: dict[str, Any] = {"text": ("text",), "label": "label", "max_length": 24}


def said(data: Dataset, split: str = "train") -> list[tuple[str, str]]:
    """Each text and the name of its class."""
    part = getattr(data, split)
    rows = zip(part.inputs["input_ids"], part.labels, strict=True)
    return [(decoded(row), data.class_names[label]) for row, label in rows]


def of_texts(folder: Path, train: list[Any], test: list[Any] | None = None) -> str:
    """Csv files with these labels."""
    for split, labels in (("train", train), ("test", test)):
        if labels is not None:
            csv_file(folder, f"{split}.csv", ["text,label", *(f"t{i},{label}" for i, label in enumerate(labels))])
    return str(folder)


def with_names(folder: Path, **splits: tuple[list[str], list[int]]) -> str:
    """Parquet files whose labels are numbers of names, each file's of its own; `__` stands for `-`."""
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    for split, (names, labels) in splits.items():
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": [names[label] if label >= 0 else "?" for label in labels], "label": labels}
        file = folder / f"{split.replace('__', '-')}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return str(folder)


# texts ----------------------------------------------------------------------------------------------------------------


def test_texts_are_numbered_by_class_names_or_as_they_are_sorted(tmp_path: Path) -> None:
    name = of_texts(tmp_path, ["pos", "neg", "Ünsure"], ["neg", "pos"])
    data = load(DataConfig(name, **TEXTS, num_classes=3), None)
    assert data.class_names == ("neg", "pos", "Ünsure")
    assert data.train.labels.tolist() == [1, 0, 2] and data.test.labels.tolist() == [0, 1]
    named = load(DataConfig(name, **TEXTS, num_classes=3, class_names=("pos", "Ünsure", "neg")), None)
    assert named.train.labels.tolist() == [0, 2, 1] and said(named) == said(data)


def test_a_single_split_is_numbered_before_it_is_dealt(tmp_path: Path) -> None:
    name = of_texts(tmp_path, [f"class {i}" for i in range(10)])
    data = load(DataConfig(name, **TEXTS, num_classes=10, test_share=0.3), None)
    assert len(data.test) == 3 and len(data.class_names) == 10
    assert all(text == f"t{name[-1]}" for split in ("train", "test") for text, name in said(data, split))


def test_numbers_in_texts_are_numbers_unless_they_are_the_classes_names(tmp_path: Path) -> None:
    name = of_texts(tmp_path, ["1", "+2", " 1"], ["2"])
    data = load(DataConfig(name, **TEXTS, num_classes=2, label_offset=1), None)
    assert data.train.labels.tolist() == [0, 1, 0] and data.class_names == ()
    by_number = load(DataConfig(name, **TEXTS, num_classes=2, label_offset=1, class_names=("one", "two")), None)
    assert by_number.train.labels.tolist() == [0, 1, 0] and by_number.class_names == ("one", "two")
    name = of_texts(tmp_path / "names", ["5", "3", "5"], ["3"])
    by_name = load(DataConfig(name, **TEXTS, num_classes=2, class_names=("5", "3")), None)
    assert by_name.train.labels.tolist() == [0, 1, 0] and by_name.test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("train", "test", "settings", "message"),
    [
        (["a", "b", ""], ["a"], {}, r"label='label': .*a label in every row; .*train\.csv, row 2 holds ''"),
        (["a", "b"], ["a", " "], {}, r"a label in every row; .*test\.csv, row 1 holds ' '"),
        (["a", "b"], ["b", "c"], {}, r"a column of classes \('a', 'b'\); .*test\.csv, row 1 holds 'c'"),
        (["a", "b"], ["A"], {}, r"test\.csv, row 0 holds 'A'"),
        (["0", "b"], ["0"], {}, r"whole numbers, .*train\.csv, row 1 holds 'b'"),
        (["0", "1"], ["b"], {}, r"whole numbers, .*test\.csv, row 0 holds 'b'"),
        (["a", "b"], ["1"], {}, r"a column of classes .*test\.csv, row 0 holds '1'"),
        (["0.0", "1.0"], ["0.0"], {}, r"whole numbers, .*train\.csv, row 0 holds '0\.0'"),
        (["nan", "b"], ["b"], {}, r"whole numbers, .*train\.csv, row 0 holds 'nan'"),
        (["a", "b", "c"], ["a"], {}, r"num_classes=2: must be 3, the number of classes found: 'a', 'b', 'c'"),
        (["a", "a"], ["a"], {}, r"num_classes=2: must be 1, the number of classes found: 'a'"),
        (["a", "b"], ["a"], {"class_names": ("a", "c")}, r"classes \('a', 'c'\); .*train\.csv, row 1 holds 'b'"),
        (["1", "2"], ["0"], {"label_offset": 1}, r"label 0 less .*label_offset=1 is -1; .*test\.csv, row 0"),
        (["0", "1"], ["-1"], {}, r"label -1 less .*test\.csv, row 0 \(-1 marks a split without labels"),
    ],
)
def test_texts_that_are_no_labels(
    train: list[str], test: list[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    name = of_texts(tmp_path, train, test)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(name, **TEXTS, **{"num_classes": 2, **settings}), None)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (pa.array([0, None]), r"a label in every row; .*train\.parquet, row 1 holds None"),
        (pa.array([0.0, 1.0]), r"whole numbers, .*train\.parquet, row 0 holds 0\.0"),
        (pa.array([0, 2]), r"num_classes=2: label 2 less .*0\.\.1 is accepted; .*train\.parquet, row 1"),
        (pa.array(["a", None]), r"a label in every row; .*train\.parquet, row 1 holds None"),
        (pa.array([[0], [1]]), r"whole numbers, .*row 0 holds \[0\]"),
    ],
)
def test_cells_that_are_no_labels(cells: pa.Array, message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": cells}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(tmp_path), **TEXTS, num_classes=2), None)


def test_truth_values_are_the_numbers_0_and_1(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [True, False]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["c"], "label": [True]}), tmp_path / "test.parquet")
    data = load(DataConfig(str(tmp_path), **TEXTS, num_classes=2), None)
    assert data.train.labels.tolist() == [1, 0] and data.test.labels.tolist() == [1]


# numbers with names ---------------------------------------------------------------------------------------------------


def test_numbers_of_other_files_are_read_by_their_names(tmp_path: Path) -> None:
    name = with_names(
        tmp_path,
        train__0__of__2=(["cat", "dog", "owl"], [0, 1, 2]),
        train__1__of__2=(["owl", "cat", "dog"], [0, 1, 2]),
        test=(["dog", "owl"], [0, 1]),
    )
    config = DataConfig(name, **TEXTS, num_classes=3)
    data = load(config, None)
    assert data.class_names == ("cat", "dog", "owl")
    assert data.train.labels.tolist() == [0, 1, 2, 2, 0, 1] and data.test.labels.tolist() == [1, 2]
    other = load(DataConfig(name, **TEXTS, num_classes=3, class_names=("owl", "dog", "cat")), None)
    for split in ("train", "test"):
        assert all(text == name for text, name in said(data, split) + said(other, split))


def test_an_offset_leaves_out_the_first_names(tmp_path: Path) -> None:
    name = with_names(tmp_path, train=(["none", "a", "b"], [1, 2]), test=(["none", "a", "b"], [2]))
    data = load(DataConfig(name, **TEXTS, num_classes=2, label_offset=1), None)
    assert data.class_names == ("a", "b") and data.train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        (
            {"train": (["a", "b"], [0, 1]), "test": (["a", "c"], [1])},
            {},
            r"'a', 'b'\); .*test\.parquet, row 0 holds 'c'",
        ),
        ({"train": (["a", "b"], [0, -1])}, {}, r"train\.parquet, row 1 holds -1 \(-1 marks a split without labels"),
        ({"train": (["a", "b", "c"], [0, 1])}, {}, r"num_classes=2: must be 3, the number of classes found"),
        ({"train": (["a", "b"], [0, 1])}, {"class_names": ("b", "c")}, r"class_names=\('b', 'c'\): must be the names"),
        ({"train": (["0", "1"], [0, 1])}, {"label_offset": 1}, r"num_classes=2: must be 1, the number of .*: '1'"),
    ],
)
def test_numbers_whose_names_do_not_fit(
    splits: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    name = with_names(tmp_path, **splits)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(name, **TEXTS, num_classes=2, **settings), None)


def test_a_name_in_a_split_that_no_row_has_may_be_another(tmp_path: Path) -> None:
    name = with_names(tmp_path, train=(["a", "b"], [0, 1]), test=(["unknown", "b", "a"], [1, 2]))
    assert load(DataConfig(name, **TEXTS, num_classes=2), None).test.labels.tolist() == [1, 0]


def test_the_names_of_embedded_data_are_those_of_the_config() -> None:
    names = tuple("abcdefghij")
    assert load(digits(), None).class_names == () and load(digits(class_names=names), None).class_names == names


# any labels -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_whatever_the_numbers_a_name_is_a_name(data: st.DataObject) -> None:
    """Parts that number the same names in any order: every cell ends as the place of its own name."""
    names = data.draw(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6, unique=True))
    order = tuple(data.draw(st.permutations(names)))
    config = DataConfig(
        "x.csv", text=("text",), num_classes=len(names), class_names=data.draw(st.sampled_from([order, ()]))
    )
    splits: dict[str, list[Labels]] = {}
    meant: dict[str, list[str]] = {}
    for split in ("train", "test"):
        splits[split], meant[split] = [], []
        for _ in range(data.draw(st.integers(1, 3))):
            own = tuple(data.draw(st.permutations(names)))
            cells = data.draw(st.lists(st.integers(0, len(own) - 1), max_size=5))
            splits[split].append(Labels(cells, own, str))
            meant[split] += [own[cell] for cell in cells]
    numbers, found = numbered("label", splits, config)
    assert {*found} == {*names} and found == (config.class_names or splits["train"][0].names)
    for split in splits:
        assert [found[number] for number in numbers[split]] == meant[split]


def test_a_first_line_that_is_an_example_of_texts_is_no_header(tmp_path: Path) -> None:
    lines = ["a film,good", "another,bad", "a third,good", "the last,bad"]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    config = DataConfig(str(tmp_path / "x.csv"), text=(0,), label=1, num_classes=2, max_length=8)
    with pytest.raises(ValueError, match=r"task\.data\.header=True: must be false, .* has the name 'good'"):
        load(config, None)
    found = load(dataclasses.replace(config, header=False), None)
    assert len(found.train) + len(found.test) == 4 and found.class_names == ("bad", "good")
