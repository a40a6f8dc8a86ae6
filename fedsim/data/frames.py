"""Data that lie in memory, as a notebook has them, to files that an experiment names."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.data import content, files
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
        new = Path(scratch, "data")
        new.mkdir()
        for split, frame in splits.items():
            _dataset(split, frame).to_parquet(str(new / f"{split}.parquet"))
        name = content.sha256_of(new)[:16]
        if not (at / name).exists():
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
