"""The script that trains public models: on the first images alone, the same from the same seed, as folders that fit."""

import argparse
import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from baselines.fedavg import FedAvg
from benchmarks import ladder
from fedsim.data import fashion_mnist
from fedsim.engine.cohort import check_checkpoints
from fedsim.experiment import Experiment, from_pretrained
from fedsim.learning.task import TaskConfig
from fedsim.models import Form, Like


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")

PUBLIC = 24
FORMS = ladder.LADDERS["fashion_mnist"].forms


def write_images(folder: Path, seed: int) -> None:
    """Of 10 classes; those after the first `PUBLIC` of the training split go by the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for row in range(count):
            rng = np.random.default_rng([row, seed if split == "train" and row >= PUBLIC else 0])
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue()}, "label": row % 10})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_DATA_DIR", str(tmp_path))
    write_images(tmp_path / "fashion_mnist", seed=1)
    return tmp_path / "fashion_mnist"


def test_a_model_of_the_ladder_is_a_tiers_start(images: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "one", data="fashion_mnist", seed=3, epochs=1, public=PUBLIC)
    assert ladder.train_one(options, "vit-32x2").startswith("vit-32x2: test accuracy ")
    write_images(images, seed=2)
    options.out = tmp_path / "two"
    ladder.train_one(options, "vit-32x2")
    one, two = (load_file(tmp_path / name / "vit-32x2" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one), "what is not public has not been seen"

    tier = from_pretrained("phone", "vit", str(tmp_path / "one" / "vit-32x2"))
    assert dataclasses.replace(tier.form, kv_heads=None, head_dim=None, norm_eps=None) == FORMS["vit-32x2"]
    task = TaskConfig(fashion_mnist(skip=PUBLIC), "vit", patch_size=7)
    experiment = Experiment(FedAvg(), task, (tier,), target=Like(width=64, depth=4))
    assert (experiment.target.heads, experiment.target.inner) == (8, 128)
    check_checkpoints(experiment)
    assert f"fashion_mnist(skip={PUBLIC})" in (tmp_path / "one" / "vit-32x2" / "README.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--public", "40"], "--public=40: must be below 40"),
        (["--epochs", "0"], "--epochs=0: must be at least 1"),
    ],
)
def test_wrong_words(words: list[str], message: str, images: Path, capsys: pytest.CaptureFixture) -> None:
    assert ladder.main(["--out", "nowhere", *words]) == 2
    assert message in capsys.readouterr().err


def test_each_grows_into_the_next() -> None:
    forms: list[Form] = [*FORMS.values()]
    assert {form.head_size for form in forms} == {8} and {form.inner / form.width for form in forms} == {2}
    assert all(a.width < b.width and a.depth < b.depth for a, b in itertools.pairwise(forms))
