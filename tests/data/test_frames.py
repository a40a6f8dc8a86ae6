"""Data from Python: frames and data sets in memory become files that an experiment names; paths are given as paths."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from benchmarks.suites import tiny
from fedsim.core.canonical import revived
from fedsim.data import DataConfig, from_frame, load
from fedsim.learning.task import TaskConfig
from tests.support.data_files import csv_file, decoded, picture


FRAME = pd.DataFrame({"review": list("abcdefgh"), "stars": ["one", "two"] * 4}, index=range(8, 16))
READ: dict[str, Any] = {"text": ("review",), "label": "stars", "num_classes": 2}


def test_a_frame_is_read_as_it_is(tmp_path: Path) -> None:
    data = load(from_frame(FRAME, FRAME[:3], folder=tmp_path, **READ), None)
    assert [decoded(row) for row in data.train.inputs["input_ids"]] == list("abcdefgh")
    assert data.class_names == ("one", "two") and data.test.labels.tolist() == [0, 1, 0]
    held_out = load(from_frame(FRAME, folder=str(tmp_path), **READ, test_share=0.25), None)
    assert (len(held_out.train), len(held_out.test)) == (6, 2)


def test_the_same_data_are_the_same_experiment(tmp_path: Path) -> None:
    first = from_frame(FRAME, folder=tmp_path, **READ)
    assert from_frame(FRAME.reset_index(drop=True), folder=tmp_path, **READ) == first
    assert from_frame(FRAME[::-1], folder=tmp_path, **READ) != first
    assert from_frame(FRAME, FRAME, folder=tmp_path, **READ) != first
    assert len([*tmp_path.iterdir()]) == 3, "nothing half-written is left"
    experiment = replace(tiny(), task=TaskConfig(first, "bert"))
    assert revived(json.loads(experiment.canonical_json())).task == experiment.task
    assert pickle.loads(pickle.dumps(experiment)) == experiment and hash(experiment) == hash(replace(experiment))


def test_categories_are_their_values(tmp_path: Path) -> None:
    stars = FRAME.stars.astype(pd.CategoricalDtype(["two", "one"]))
    data = load(from_frame(FRAME.assign(stars=stars), folder=tmp_path, **READ), None)
    assert data.class_names == ("one", "two")


@pytest.mark.parametrize("format_", [None, "numpy", "torch", "pandas"])
def test_data_sets_keep_images_and_names(format_: str | None, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["odd", "even"])})
    rows = {"image": [picture(10 * i) for i in range(6)], "label": [(i + 1) % 2 for i in range(6)]}
    table = datasets.Dataset.from_dict(rows, features=features).with_format(format_)
    every = datasets.DatasetDict({"training": table.select([4, 1, 2]), "val": table.select([3])})
    config = from_frame(every, folder=tmp_path, num_classes=2, class_names=("even", "odd"))
    data = load(config, None)
    assert data.train.inputs["pixel_values"][:, 0, 0, 0].tolist() == [40, 10, 20]
    assert data.train.labels.tolist() == [0, 1, 0] and data.test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (FRAME.to_dict("list"), r"review=list: must be a pandas\.DataFrame, a datasets\.Dataset"),
        (3, r"train=int: must be a pandas"),
        (FRAME.assign(review=[object()] * 8), r"train: must be a frame whose columns hold texts"),
        (FRAME.assign(review=[1, "a"] * 4), r"train: must be a frame whose columns hold texts"),
        (
            FRAME.assign(stars=["one", None] * 4),
            r"label='stars': .*a label in every row; .*train\.parquet, row 1 holds",
        ),
        (FRAME.assign(stars=[1.0, np.nan] * 4), r"label='stars': .*a label in every row; .*row 1 holds None"),
        (FRAME.assign(review=[None, *"bcdefgh"]), r"text=\('review',\): .*train\.parquet, row 0 holds none"),
        (FRAME.assign(review=[np.nan] * 8), r"text=\('review',\): .*train\.parquet, row 0 holds none"),
        (FRAME[:0], r"task\.data\.name=.*must be a source with examples; .*train\.parquet holds none"),
    ],
)
def test_frames_that_are_refused(train: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(from_frame(train, folder=tmp_path, **READ), None)


def test_a_frame_is_no_name() -> None:
    for data in (FRAME, datasets.Dataset.from_pandas(FRAME)):
        with pytest.raises(ValueError, match=r"task\.data\.name='Data.*': must be .*fedsim\.data\.from_frame writes"):
            DataConfig(data)  # pyright: ignore[reportArgumentType]


def test_paths_are_paths_and_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = csv_file(tmp_path, "some.csv", ["text,label", "a,0", "b,1"])
    config = DataConfig(Path(name), text=("text",), num_classes=2)  # pyright: ignore[reportArgumentType]
    assert config == DataConfig(name, text=("text",), num_classes=2) and isinstance(config.name, str)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load(replace(config, name="~/some.csv"), None).train) == 1
    from_frame(FRAME, folder="~/frames", **READ)
    assert (tmp_path / "frames").is_dir()
