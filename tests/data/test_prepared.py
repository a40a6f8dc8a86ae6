"""Prepared data: the same as the source whatever happens to the files, or an error; and read row by row."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from fedsim.core.sealed import Damaged
from fedsim.data import DataConfig, Dataset, Partition, conversion, load, prepared, source, vision
from fedsim.data.examples import Examples
from tests.support.data_files import reloaded


TEXTS = ["a", "some more", "much more than that"]  # 2, 10 and 20 tokens by bytes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_again: None) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path, cache: Path) -> DataConfig:
    folder = tmp_path / "texts"
    folder.mkdir()
    frame = pd.DataFrame({"text": TEXTS * 4, "label": [0, 1, 0] * 4, "who": [1, 2, 2] * 4})
    for split in ("train", "test"):
        frame.to_parquet(folder / f"{split}.parquet")
    return DataConfig(str(folder), text=("text",), label="label", group="who", num_classes=2, max_length=24)


@pytest.fixture
def images(tmp_path: Path, cache: Path) -> DataConfig:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return DataConfig(str(tmp_path / "images"), image_size=6, channels=3, num_classes=2)


def content(data: Dataset) -> list[Any]:
    """All that is in a data set."""
    splits = [data.train, data.test]
    tensors = [{name: tensor.tolist() for name, tensor in split.inputs.items()} for split in splits]
    groups = [None if split.groups is None else split.groups.tolist() for split in splits]
    return [tensors, [split.labels.tolist() for split in splits], groups, data.fingerprint, data.class_names]


def no_source(*arguments: Any, **settings: Any) -> Any:
    raise AssertionError("the source is read again")


# what is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_the_second_time_the_source_is_not_read(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = request.getfixturevalue(kind)
    first = content(load(config, None))
    monkeypatch.setattr(conversion.files, "tables", no_source)
    assert content(reloaded(config)) == first
    pinned = replace(config, sha256=first[3])
    assert content(reloaded(pinned)) == first, "hosts find it by its content"
    with pytest.raises(AssertionError, match="read again"):
        reloaded(replace(config, max_length=30, image_size=7))


def test_the_same_content_is_kept_once_and_another_one_beside_it(texts: DataConfig, tmp_path: Path) -> None:
    first = load(texts, None)
    os.utime(tmp_path / "texts" / "train.parquet", (1, 1))
    assert reloaded(texts).fingerprint == first.fingerprint and len(prepared.kept()) == 1
    pd.DataFrame({"text": TEXTS, "label": [1, 1, 0], "who": [1, 2, 2]}).to_parquet(tmp_path / "texts" / "test.parquet")
    assert reloaded(texts).fingerprint != first.fingerprint and len(prepared.kept()) == 2


def test_a_file_that_is_overwritten_keeping_size_and_time_is_read_again(texts: DataConfig, tmp_path: Path) -> None:
    lines = "text,label\n" + "one,0\ntwo,1\n" * 5
    file = tmp_path / "lines.csv"
    file.write_text(lines)
    before, config = file.stat(), replace(texts, name=str(file), group=None)
    first = load(config, None)
    file.write_text(lines.replace("one", "six"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (
        (before.st_size, before.st_mtime_ns, before.st_ino)
    )
    assert reloaded(config).fingerprint != first.fingerprint


def test_images_that_a_table_names_by_path_count(images: DataConfig, tmp_path: Path) -> None:
    paths = [str(tmp_path / "images" / "train" / "b" / f"{number}.png") for number in range(3)]
    frame = pd.DataFrame({"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1, 0]})
    frame.to_parquet(tmp_path / "named.parquet")
    config = replace(images, name=str(tmp_path / "named.parquet"), test_share=0.4)
    first = load(config, None)
    assert reloaded(config).fingerprint == first.fingerprint and len(prepared.kept()) == 1
    for path in paths:
        Image.new("RGB", (5, 6), (7, 7, 7)).save(path)
    again = reloaded(config)
    assert again.train.inputs["pixel_values"].unique().tolist() == [7] and again.fingerprint != first.fingerprint
    Path(paths[1]).unlink()
    with pytest.raises(ValueError, match=r"images/train/b/1.png"):
        reloaded(config)
    frame["image"] = [{"bytes": None, "path": "1.png"}] * 3
    frame.to_parquet(tmp_path / "named.parquet")
    with pytest.raises(ValueError, match=r"named.parquet, row \d: the path '1.png'"):
        reloaded(config)


def test_images_keep_their_size_and_are_enlarged_in_the_batch(images: DataConfig, tmp_path: Path) -> None:
    """5 x 6 pixels, kept so, are enlarged to 6 x 6 and to 20 x 20; 4 x 4 is smaller than they are."""
    original = Image.open(tmp_path / "images" / "train" / "b" / "1.png")
    for size in (4, 6, 20):
        split = reloaded(replace(images, image_size=size)).train
        kept = split.examples(torch.tensor([4]))["pixel_values"]
        assert kept.shape == ((1, 3, 4, 4) if size == 4 else (1, 3, 6, 5))
        expected = torch.from_numpy(np.asarray(original.resize((size, size), Image.Resampling.BILINEAR)).copy())
        assert torch.equal(split.inputs["pixel_values"][4], expected.permute(2, 0, 1))
    assert len({row.nbytes for row in prepared.kept()}) == 2, "6 and 20 keep the same images"


def test_images_of_several_sizes_are_brought_to_one(images: DataConfig, tmp_path: Path) -> None:
    Image.new("RGB", (3, 3), (9, 9, 9)).save(tmp_path / "images" / "train" / "b" / "9.png")
    train = load(replace(images, image_size=20), None).train
    assert train.examples(torch.arange(7))["pixel_values"].shape == (7, 3, 20, 20)
    assert train.inputs["pixel_values"][6].unique().tolist() == [9]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_enlarged_bit_by_bit_as_pillow_does(height: int, width: int, more: int, channels: int, seed: int) -> None:
    size = max(height, width) + more
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    expected = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).resize((size, size), 2)
    found = vision.resized(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], size)[0]
    assert np.array_equal(
        found.permute(1, 2, 0).numpy().reshape(size, size, -1).squeeze(), np.asarray(expected).squeeze()
    )


def test_texts_are_padded_to_the_longest_of_a_batch_and_all_at_once_to_the_longest_there_may_be(
    texts: DataConfig,
) -> None:
    train = load(texts, None).train
    some = train.examples(torch.tensor([1, 0]))
    assert some["input_ids"].shape == some["attention_mask"].shape == (2, 10)
    assert some["input_ids"][1].tolist() == [97, 257, *[256] * 8] and some["attention_mask"].sum(1).tolist() == [10, 2]
    assert train.examples(torch.tensor([0]))["input_ids"].tolist() == [[97, 257]]
    assert train.inputs["input_ids"].shape == (12, 24)
    assert torch.equal(train.inputs["input_ids"][[1, 0], :10], some["input_ids"])


def test_a_shard_reads_its_own_rows_alone(images: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train, read = load(images, None).train, list[tuple[int, int]]()
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append((size, at)) or real(file, size, at))
    shard = train.select(np.array([5, 1, 2]))
    assert read == [] and shard.labels.tolist() == [1, 0, 0]
    shard.examples(torch.tensor([2, 0]))
    assert read == [(90, 180), (90, 450)]


def test_a_shard_stays_what_it_is_and_where_it_is(images: DataConfig) -> None:
    rows = np.array([3, 1])
    shard = load(images, None).train.select(rows)
    expected = shard.examples(torch.arange(2))["pixel_values"]
    rows[:] = 0
    assert isinstance(shard.inputs, Examples)
    with pytest.raises(ValueError, match="read-only"):
        shard.inputs.numbers[:] = 0
    assert torch.equal(shard.examples(torch.arange(2))["pixel_values"], expected)
    with pytest.raises(TypeError, match="prepared data do not travel"):
        pickle.dumps(shard)


def test_what_is_handed_out_may_be_written_to(images: DataConfig) -> None:
    train = load(images, None).train
    before = train.inputs["pixel_values"].clone()
    train.examples(torch.arange(6))["pixel_values"].zero_()
    train.inputs["pixel_values"].zero_()
    assert torch.equal(train.inputs["pixel_values"], before) and before.any()


# what happens to it ---------------------------------------------------------------------------------------------------


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_no_damage_gives_other_data(kind: str, how: str, request: pytest.FixtureRequest, cache: Path) -> None:
    """Of every file there is: prepared anew before it is used, or refused when a row is read."""
    config, refused = request.getfixturevalue(kind), set[str]()
    expected = content(load(config, None))
    names = [path.relative_to(cache) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(names) >= 8
    for name in names:
        damaged(cache / name, how)
        try:
            found = content(reloaded(config))
        except Damaged as error:
            assert str(cache / name) in str(error) and "row" in str(error) and "fedsim data clean" in str(error)
            refused.add(name.name)
            prepared.clean()
            found = content(reloaded(config))
        assert found == expected, name
    rows = {"train.input_ids", "test.input_ids"} if kind == "texts" else {"train.pixel_values", "test.pixel_values"}
    assert refused == (rows if how == "flipped" else set())


def test_a_flipped_row_stops_a_run_that_drops_participants(texts: DataConfig, cache: Path, tmp_path: Path) -> None:
    """It is nobody's fault who takes part."""
    from fedsim.cli import main
    from fedsim.cli.options import report_failures
    from fedsim.runtime.inline import InlineRuntime
    from fedsim.simulation import RunFailed, run
    from tests.support.disturbed import small

    task = replace(small().task, data=replace(texts, group=None), family="bert")
    experiment = replace(small(), task=task, on_error="drop", participants=3, partition=Partition("iid"))
    data = load(experiment.task.data, None)
    file = cache / "prepared" / data.fingerprint / "train.input_ids"
    damaged(file, "flipped")
    with pytest.raises(RunFailed, match=r"row \d+ is not as it was written") as failed:
        run(experiment, out=tmp_path / "out", runtime=InlineRuntime())
    said = Console(file=StringIO(), width=9999)
    report_failures([failed.value], "fedsim run --resume", said)
    cleaning = f"fedsim data clean {data.fingerprint[:12]}"
    assert f"go on with: {cleaning} && fedsim run --resume\n" in said.file.getvalue()  # type: ignore[attr-defined]
    assert main(cleaning.split()[1:]) == 0
    source._loaded.cache_clear()  # as in another process
    source._pinned.cache_clear()
    run(experiment, out=tmp_path / "out", runtime=InlineRuntime())


PREPARING = """
import sys, time
from pathlib import Path
from fedsim.data import prepared, DataConfig, load, conversion
folder, slowly = Path(sys.argv[2]), sys.argv[3] == "slowly"
real = prepared.Writer.rows
def rows(self, name, rows, ragged=False):
    with (folder / "begun").open("a") as file:
        file.write(name + "\\n")
    real(self, name, rows, ragged)
    time.sleep(60 if slowly else 0.5)
prepared.Writer.rows = rows
settings = dict(text=("text",), label="label", group="who", num_classes=2, max_length=24)
print(load(DataConfig(sys.argv[1], **settings), None).fingerprint)
"""


def preparing(texts: DataConfig, folder: Path, how: str = "at once") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARING, texts.name, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_left_is_not_used(texts: DataConfig, cache: Path, tmp_path: Path) -> None:
    killed = preparing(texts, tmp_path, "slowly")
    while not (tmp_path / "begun").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list((cache / "making").glob("*.d"))) == 1 and not list((cache / "prepared").iterdir())
    assert load(texts, None).train.labels.tolist() == [0, 1, 0] * 4
    assert not list((cache / "making").glob("*.d"))


def test_what_a_killed_process_left_is_listed_and_freed(
    texts: DataConfig, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsim.cli import main

    killed = preparing(texts, tmp_path, "slowly")
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    assert prepared.left() == 0 and prepared.clean() == 0, "it lives"
    assert len(list((cache / "making").glob("*.d"))) == 1
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert main(["data", "list"]) == 0
    size, said = prepared.left(), capsys.readouterr().out
    assert size > 0 and "MB that killed processes left unfinished: `fedsim data clean` frees them" in said
    assert main(["data", "clean"]) == 0 and prepared.left() == 0
    assert {path.name for path in (cache / "making").iterdir()} <= {prepared.PUBLISHING}


def test_cleaning_stops_nobody_who_prepares(texts: DataConfig, cache: Path, tmp_path: Path) -> None:
    working = preparing(texts, tmp_path)
    while working.poll() is None:
        prepared.clean()
        time.sleep(0.02)
    said = working.communicate()[0]
    assert working.returncode == 0 and said == f"{load(texts, None).fingerprint}\n"
    assert [row.fingerprint for row in prepared.kept()] == [said.strip()]


def test_of_processes_that_prepare_at_once_one_does_and_the_others_wait(texts: DataConfig, tmp_path: Path) -> None:
    processes = [preparing(texts, tmp_path) for _ in range(3)]
    answers = {process.communicate()[0] for process in processes}
    assert len(answers) == 1 and answers == {f"{load(texts, None).fingerprint}\n"}
    assert (tmp_path / "begun").read_text().splitlines() == ["train.input_ids", "test.input_ids"]


SIZED = """
import sys
from fedsim.data import DataConfig, load
print(load(DataConfig(sys.argv[1], image_size=int(sys.argv[2]), channels=3, num_classes=2), None).fingerprint)
"""


def test_processes_whose_settings_make_the_same_of_the_same(images: DataConfig) -> None:
    commands = [[sys.executable, "-c", SIZED, images.name, str(size)] for size in (6, 7, 8)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert len({process.communicate()[0] for process in processes}) == len(prepared.kept()) == 1
    assert all(process.returncode == 0 for process in processes)


LIMITED = """
import resource, sys
from fedsim.data import DataConfig, load
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
load(DataConfig(sys.argv[1], image_size=6, channels=3, num_classes=2), None)
"""


def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(images: DataConfig, cache: Path) -> None:
    command = [sys.executable, "-c", LIMITED, images.name]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (
        f"{cache}: cannot be written (File too large); FEDSIM_CACHE_DIR names" in ended.stderr.strip().splitlines()[-1]
    )
    assert not list((cache / "making").glob("*.d")) and not list((cache / "prepared").iterdir())


def test_a_cache_that_cannot_be_written_to(texts: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(load(texts, None))
    monkeypatch.setattr(prepared.filelock, "FileLock", no_source)  # what is there is used without writing anything
    assert content(reloaded(texts)) == expected
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"file/prepared: cannot be written \(Not a directory\); FEDSIM_CACHE_DIR names the folder"
    ):
        reloaded(texts)


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(
    texts: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", f"{texts.name}/train.parquet")

    monkeypatch.setattr(conversion.files, "tables", denied)
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] Permission denied: '.*train.parquet'$"):
        load(texts, None)


def test_wrong_data_leave_nothing(texts: DataConfig, cache: Path) -> None:
    with pytest.raises(ValueError, match="num_classes"):
        load(replace(texts, num_classes=3, class_names=("a", "b", "c"), label_offset=1), None)
    assert not list(cache.rglob("*.d")) and not list((cache / "prepared").iterdir())


def files_of(folder: Path, **frames: Any) -> str:
    folder.mkdir()
    for split, frame in frames.items():
        pd.DataFrame(frame).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_what_was_made_is_said(images: DataConfig, texts: DataConfig, tmp_path: Path) -> None:
    assert load(images, None).made == "6 + 6 images, 5x6 colour -> 6x6 colour"
    assert load(replace(images, image_size=4, channels=1), None).made == "6 + 6 images, 5x6 colour -> 4x4 grey"
    assert {row.made for row in prepared.kept()} == {
        ("images, 5x6 colour -> 6x6 colour",),
        ("images, 5x6 colour -> 4x4 grey",),
    }
    Image.new("L", (20, 30)).save(tmp_path / "images" / "test" / "a" / "9.png")
    assert reloaded(images).made == "6 + 7 images, 5x6 to 20x30 colour and grey -> 6x6 colour"
    made = {"text": ["abc", "a", "b"], "label": [0, 1, 0], "who": [1, 1, 1]}
    name = files_of(tmp_path / "some", train=made, test={key: cells[:1] for key, cells in made.items()})
    cut = replace(texts, name=name, max_length=3)
    assert load(cut, None).made == reloaded(cut).made == "3 + 1 texts; 50.0 % reach 3 tokens, where they are cut"
    pieces = replace(cut, objective="next_token")
    assert load(pieces, None).made == "3 + 1 pieces of up to 3 tokens"
    assert load(DataConfig(), None).made == ""


def test_a_test_split_that_is_the_training_split_is_said(texts: DataConfig) -> None:
    """The frames of the fixture are the same."""
    assert load(texts, None).made.endswith("; the test split holds the same examples as the training split")


# the command ----------------------------------------------------------------------------------------------------------


def test_what_is_prepared_is_listed_and_freed(
    texts: DataConfig, images: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsim.cli import main

    first, second = load(texts, None), load(images, None)
    assert main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert first.fingerprint[:12] in said and second.fingerprint[:12] in said and "2 prepared data sets" in said
    assert main(["data", "clean", first.fingerprint[:8]]) == 0
    assert [row.fingerprint for row in prepared.kept()] == [second.fingerprint]
    for word in ("nonsense", ""):
        assert main(["data", "clean", word]) == 2 and f"FINGERPRINT={word!r}" in capsys.readouterr().err
    assert main(["data", "clean"]) == 0 and prepared.kept() == []
    assert isinstance(reloaded(texts).train.inputs, Examples)


def test_data_of_experiments_are_prepared_ahead(images: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    from fedsim.cli import main

    settings = [f"task.data.name={images.name}", "task.data.image_size=6", "task.data.channels=3"]
    command = ["data", "prepare", "benchmarks.suites:tiny", "--set", *settings, "task.data.num_classes=2"]
    assert main(command) == 0
    assert f"{images.name}: 6 + 6 images, 5x6 colour -> 6x6 colour; " in capsys.readouterr().out
    assert [row.examples for row in prepared.kept()] == [{"train": 6, "test": 6}]
    assert json.loads((next(Path(os.environ["FEDSIM_CACHE_DIR"]).glob("prepared/*")) / "about.json").read_text())
