"""A run's manifest: which round was finished last, and the seals of the files that belong to it.

What it does not vouch for never happened; what it vouches for must be there as it was written.
"""

from typing import Any

from fedsim.core.sealed import Damaged, read_sealed_json
from fedsim.storage.place import Place


Manifest = dict[str, Any]
# By path in the results folder: seals of tables, hashes of files of a tokenizer. Earlier versions of fedsim had none.
FILES = "files"


def read(directory: Place, run_id: str) -> Manifest | None:
    """A run's manifest; None if it has none. **Raises:** `Damaged` naming a file that is not as it was written."""
    path = directory / "checkpoints" / run_id / "manifest.json"
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = read_sealed_json(data, sealed_if=FILES)
        if found.get("run_id") != run_id or not isinstance(found.get("round"), int):
            raise ValueError(f"it is not that of run {run_id}")
        return found
    except ValueError as error:
        raise Damaged(
            f"{path}: not readable (cut off or damaged): {error}; put back a copy of it, or delete {path.parent}: a "
            "finished run keeps its tables and cannot be exported, another one is computed anew"
        ) from error


def table_file(table: str, run_id: str) -> str:
    """As manifests name it."""
    return f"{table}/{run_id}.parquet"


def damaged(what: str, directory: Place, run_id: str) -> Damaged:
    """The error for a file of a run, with what can be done about it."""
    return Damaged(
        f"{what}; put back a copy of it, or compute run {run_id} anew: delete {directory}/*/{run_id}.parquet and "
        f"{directory}/checkpoints/{run_id} first"
    )
