"""A TensorBoard sink: the figures of every finished round, one folder a run, beside whatever else is displayed.

DIR/tensorboard/<label>, <run id>        tensorboard --logdir DIR/tensorboard
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.core.text import printable
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.storage.place import Place
from fedsim.sweeps.progress import Overview, labels_of


# Column of the rounds table -> what TensorBoard calls it: what is before the slash is drawn together.
SCALARS: Mapping[str, str] = {
    "accuracy_mean": "accuracy/mean",
    "accuracy_min": "accuracy/worst participant",
    "accuracy_local_mean": "accuracy/own data",
    "accuracy_val_mean": "accuracy/validation",
    "accuracy_global": "accuracy/server's model",
    "loss_mean": "loss/test",
    "train_loss": "loss/training",
    "bytes_up_total": "bytes/up in total",
    "bytes_down_total": "bytes/down in total",
    "wall_seconds": "time/seconds a round",
    "simulated_seconds": "time/simulated seconds a round",
    "retries": "calls/retries",
    "failed": "calls/failed",
}


def check_tensorboard() -> None:
    """**Raises:** `ValueError` if the package that writes TensorBoard's files is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: needs a package that is not installed: pip install -e '.[tensorboard]'")


class Boards:
    """An overview that also writes what it is told. `inner`: the one that is displayed. `out`: the results folder."""

    def __init__(self, inner: Overview, out: Place) -> None:
        check_tensorboard()
        if not isinstance(out, Path):
            raise ValueError(f"--tensorboard: writes into a folder, and --out is {str(out)!r}")
        self.inner, self.folder = inner, out / "tensorboard"
        self.names: dict[str, str] = {}
        self.boards: dict[str, Board] = {}

    def begin(self, found: Sequence[tuple[Experiment, str]]) -> None:
        labels = labels_of([experiment for experiment, _ in found])
        names = {run_id: printable(f"{label[:80]}, {run_id}") for run_id, label in labels.items()}
        self.names = {run_id: re.sub(r"[/\\\n\t]", "-", name).lstrip(".") for run_id, name in names.items()}
        self.inner.begin(found)

    def of(self, run_id: str) -> ProgressListener:
        if run_id not in self.boards:
            self.boards[run_id] = Board(self.inner.of(run_id), self.folder / self.names[run_id])
        return self.boards[run_id]

    def close(self) -> None:
        self.inner.close()


class Board(ProgressListener):
    """Passes on what it is told of one run, and writes the figures of its rounds.

    - `inner`: told the same. - `folder`: of this run's event files.
    """

    def __init__(self, inner: ProgressListener, folder: Path) -> None:
        self.inner, self.folder = inner, folder
        self.writer: Any = None

    def preparing(self, what: str) -> None:
        self.inner.preparing(what)

    def begin(self, experiment: Experiment, first: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # only here: importing it takes a second

        # Of rounds that are computed again, TensorBoard forgets what it had been told.
        self.writer = SummaryWriter(str(self.folder), purge_step=first)
        self.inner.begin(experiment, first)

    def noted(self, text: str) -> None:
        self.inner.noted(text)

    def within(self, method: str, done: int, total: int) -> None:
        self.inner.within(method, done, total)

    def finished(self, row: dict[str, Any]) -> None:
        for column, tag in SCALARS.items():
            if row[column] is not None:
                self.writer.add_scalar(tag, row[column], row["round"])
        self.writer.flush()
        self.inner.finished(row)

    def failed(self, reason: str) -> None:
        self._done()
        self.inner.failed(reason)

    def end(self) -> None:
        self._done()
        self.inner.end()

    def close(self) -> None:
        self._done()
        self.inner.close()

    def _done(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
