"""Data that lie in memory, as a notebook has them, to files that an experiment names."""

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.data import files
from fedsim.data.config import DataConfig


def from_frame(train: Any, test: Any = None, *, folder: str | Path, **fields: Any) -> DataConfig:
    """Write data to parquet files, and name them: `from_frame(frame, folder="data", text=("review",), num_classes=2)`.

    The files lie in a folder within `folder` that is called by their content: the same data are the same experiment.

    **Arguments:**

    - `train`: a `pandas.DataFrame` or a `datasets.Dataset`; or a `datasets.DatasetDict` with all splits.
    - `test`: another one; None: as many are held out as `test_share` says.
    - `folder`: where every host can read.
    - `fields`: of the `DataConfig`.

    **Raises:** `ValueError` for data of another type, or with cells that no column can hold.
    """
    splits = {"train": train} if test is None else {"train": train, "test": test}
    splits = train if test is None and isinstance(train, Mapping) else splits
    folder = Path(folder)
    at = folder.expanduser()
    at.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=at) as scratch, files.offline():
        new, digest = Path(scratch, "data"), hashlib.sha256()
        new.mkdir()
        for split, frame in splits.items():
            dataset = _dataset(split, frame)
            dataset.to_parquet(str(new / f"{split}.parquet"))
            digest.update(f"{split} {dataset.features}\n".encode())
            for batch in dataset.with_format("arrow").iter(1000):  # parquet itself differs from version to version
                digest.update(repr(batch.to_pylist()).encode())
        name = digest.hexdigest()[:16]
        with contextlib.suppress(OSError):  # it is there already
            new.rename(at / name)
    return DataConfig(name=str(folder / name), **fields)


def _dataset(split: str, frame: Any) -> Any:
    import datasets
    import pandas as pd
    import pyarrow as pa

    if isinstance(frame, datasets.Dataset):
        return frame.with_format(None)
    if not isinstance(frame, pd.DataFrame):
        accepted = "a pandas.DataFrame, a datasets.Dataset, or alone a datasets.DatasetDict"
        raise ValueError(f"{split}={type(frame).__name__}: must be {accepted}")
    categories = frame.select_dtypes("category").columns
    try:
        return datasets.Dataset.from_pandas(frame.astype(dict.fromkeys(categories, object)), preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        accepted = "a frame whose columns hold texts, numbers, bytes or lists of them"
        raise ValueError(f"{split}: must be {accepted} ({error})") from error
