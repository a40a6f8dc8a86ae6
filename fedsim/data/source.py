"""From the few settings that name a data set to the tensors of its training and test examples.

Shape legend: N examples, L tokens, C channels, H = W pixels. A name is one of the embedded sets, a known set looked up
under the data folder, or any local file or folder; nothing is fetched from the network unless `hub` is True.
"""

import hashlib
import json
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from fedsim.core.canonical import canonical
from fedsim.core.environment import located
from fedsim.data import bpe, embedded, files, labels, prepared, vision
from fedsim.data.config import EMBEDDED, PER_TOKEN, DataConfig, cifar10, digits, fashion_mnist, pydoc, sst2
from fedsim.data.content import Stamp, stamp
from fedsim.data.conversion import convert, limited, token_ids
from fedsim.data.dataset import Dataset, Split


__all__ = ["DataConfig", "Dataset", "Split", "cifar10", "digits", "fashion_mnist", "load", "pydoc", "sst2"]

# What is prepared from files depends on these, too.
READERS = ("datasets", "numpy", "pandas", "pillow", "pyarrow", "tokenizers", "transformers")


def load(config: DataConfig, data_dir: str | None) -> Dataset:
    """Load a data set; as long as its files stay, a second call in the same process returns the same object.

    **Arguments:**

    - `data_dir`: the folder that holds one folder a known name, or None.

    **Raises:** `ValueError` if there are no such data, or they are not what `config` promises.
    """
    if config.sha256 is not None:
        return _pinned(config, data_dir)
    return _loaded(config, data_dir, stamp(*paths(config, data_dir)))


def paths(config: DataConfig, data_dir: str | None) -> list[Path]:
    """The files and folders on this machine that a data set is read from, a tokenizer's among them."""
    if config.name in EMBEDDED:
        return []
    named = [files.path_of(config, data_dir)]
    named += [Path(located(config.tokenizer))] if config.kind != "image" else []
    return [path for path in named if path.exists()]


@lru_cache(maxsize=8)
def _pinned(config: DataConfig, data_dir: str | None) -> Dataset:
    """The content is known to be right once it was held against its hash: files are not looked at again."""
    assert config.sha256 is not None
    if config.name not in EMBEDDED and (folder := prepared.opened(_settings(config), config.sha256)) is not None:
        return _dataset(config, folder)
    found = load(replace(config, sha256=None), data_dir)
    if found.fingerprint != config.sha256:
        raise ValueError(
            f"task.data.name={config.name!r}: its content has changed: sha256 {config.sha256} then, "
            f"{found.fingerprint} now"
        )
    return found


@lru_cache(maxsize=8)
def _loaded(config: DataConfig, data_dir: str | None, stamp: Stamp) -> Dataset:
    if config.name in EMBEDDED:
        splits = _embedded(config)
        classes = 1 if config.kind in PER_TOKEN else config.num_classes
        return Dataset(
            kind=config.kind,
            train=splits["train"],
            test=splits["test"],
            num_classes=classes,
            vocab_size=config.vocab_size,
            fingerprint=_fingerprint(splits, token_ids(config)),
            class_names=config.class_names,
        )
    make, anew = partial(convert, config, data_dir), _fetches(config, data_dir)
    return _dataset(config, prepared.prepared(_settings(config), repr(stamp), config.name, make, anew))


def _fetches(config: DataConfig, data_dir: str | None) -> bool:
    """Whether data or a tokenizer come from the hub: what it has now is not known here."""
    here = config.kind == "image" or config.tokenizer == "bytes" or bpe.parsed(config.tokenizer) is not None
    here = here or Path(located(config.tokenizer)).is_dir()
    return config.hub and not (here and files.path_of(config, data_dir).exists())


def _settings(config: DataConfig) -> str:
    """What decides the bytes that are prepared from files: fields, our own code, and the libraries that read them."""
    plain = replace(config, image_mean=(), image_std=(), sha256=None)
    return json.dumps([canonical(plain), _code()])


@cache
def _code() -> str:
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return f"{hashlib.sha256(sources).hexdigest()} {[version(name) for name in READERS]}"


def _dataset(config: DataConfig, folder: prepared.Folder) -> Dataset:
    """What was prepared, as this config hands it out."""
    look = prepared.Look(config.image_size, config.max_length, folder.about["ids"][1])
    splits = {}
    for split in ("train", "test"):
        labels = torch.from_numpy(folder.whole[f"{split}.labels"])
        groups = None if (found := folder.whole.get(f"{split}.groups")) is None else torch.from_numpy(found)
        splits[split] = Split(folder.examples(split, look), labels, groups)
    own = folder.whole.get("tokenizer")
    return Dataset(
        kind=config.kind,
        train=splits["train"],
        test=splits["test"],
        num_classes=1 if config.kind in PER_TOKEN else config.num_classes,
        vocab_size=folder.about["ids"][0],
        fingerprint=folder.fingerprint,
        tokenizer=None if own is None else bpe.tokenizer(own.tobytes().decode(), masks=config.kind == "mlm"),
        class_names=tuple(folder.about["class_names"]),
        made=f"{len(splits['train']):,} + {len(splits['test']):,} {folder.made}",
    )


def _embedded(config: DataConfig) -> dict[str, Split]:
    if config.name == "digits":
        images, targets, is_test = embedded.digits(config.test_share)
        found = [labels.Labels(targets.tolist(), (), "digits, row {}".format)]
        numbers, _ = labels.numbered("label", {"train": found}, config)
        shown = vision.pixels(images.numpy(), config.image_size, config.channels)
        everything = Split({"pixel_values": shown}, torch.from_numpy(numbers["train"]))
    else:
        inputs, topics, is_test = embedded.pydoc(config.max_length, config.test_share)
        everything = Split(inputs, torch.zeros_like(topics), topics)

    splits = {}
    for split, flags in (("train", ~is_test), ("test", is_test)):
        rows = np.flatnonzero(flags.numpy())
        splits[split] = everything.select(rows[limited(len(rows), config, split)])
    return splits


def _fingerprint(splits: dict[str, Split], ids: tuple[int | None, ...]) -> str:
    digest = hashlib.sha256(f"{ids}\n".encode())
    for name, split in sorted(splits.items()):
        # Pairs, not a dict: token classes have labels among the inputs as well.
        tensors = [*split.inputs.items(), ("labels", split.labels)]
        if split.groups is not None:
            tensors.append(("groups", split.groups))
        for key, tensor in sorted(tensors, key=lambda pair: pair[0]):
            digest.update(f"{name}/{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
