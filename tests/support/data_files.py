"""Data files that tests write, and what was read of them."""

from pathlib import Path

import torch
from PIL import Image

from fedsim.data.source import DataConfig, Dataset, _loaded, load


def same_data(first: Dataset, second: Dataset) -> bool:
    return first is not second and first.fingerprint == second.fingerprint


def reloaded(config: DataConfig, data_dir: str | None = None) -> Dataset:
    _loaded.cache_clear()
    return load(config, data_dir)


def csv_file(folder: Path, name: str, lines: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def decoded(row: torch.Tensor) -> str:
    return bytes(value for value in row.tolist() if value < 256).decode()


def picture(value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 0))
