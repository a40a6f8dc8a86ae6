"""What `fedsim.load`, `fedsim.run` and `fedsim.sweep` return: the tables, and the questions one asks them first."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsim.experiment import nearest
from fedsim.report.comparison import BUDGETS, Difference, differences
from fedsim.report.readings import Readings, by_method, by_setting, read, records
from fedsim.report.tables import summary
from fedsim.results import tables
from fedsim.results.tables import Results
from fedsim.storage.place import Place


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Study(Results):
    """`.runs`, `.rounds`, `.clients`: pandas frames (`fedsim.results.columns` says what they hold).

    Runs are compared within a *setting*: one suite, data set, population and partition. Where a folder holds several,
    methods take `setting`, a part of its name.
    """

    @functools.cached_property
    def _readings(self) -> Readings:
        return read(self)

    def table(self, reference: str | None = None) -> pd.DataFrame:
        """One row a method: means over seeds at equal rounds, bytes and FLOPs; intervals; differences to a reference.

        - `reference`: an algorithm or a method; None: Fed-Grow, or without it the first method.

        **Raises:** `ValueError` for a reference that no finished run has.
        """
        return summary(self._readings if reference is None else read(self, reference=reference))

    def plot(self, y: str = "accuracy_mean", against: str = "rounds", setting: str = "") -> "Figure":
        """A column of `rounds`, one line a method: the mean over seeds, with a 95 % interval as a band.

        - `against`: "rounds", "MB" sent and received by all participants so far, or "FLOPs" computed so far.

        **Raises:** `ValueError` for a column that is not there or holds no numbers, or a setting that is not one.
        """
        from matplotlib.figure import Figure  # takes a second, and most ask for tables

        from fedsim.report.figures import AMOUNTS, curve, label_of

        columns = [name for name, kind in self.rounds.dtypes.items() if pd.api.types.is_numeric_dtype(kind)]
        if y not in columns:
            raise ValueError(f"y={y!r}: must be a column of numbers in rounds{nearest(y, [str(c) for c in columns])}")
        if against not in AMOUNTS:
            raise ValueError(f"against={against!r}: must be one of {', '.join(AMOUNTS)}")
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        shown = self._of(setting)
        if not any(row[y] == row[y] for run in shown for row in self._readings.rounds[run["run_id"]]):
            raise ValueError(f"y={y!r}: no round of these runs has it")
        for method, runs in by_method(shown).items():
            x, means, low, high = curve([self._readings.rounds[run["run_id"]] for run in runs], against, y)
            (line,) = axes.plot(x, means, label=label_of(method))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel=f"{against}{'' if against == 'rounds' else ', all participants, so far'}", ylabel=y)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return figure

    def compare(self, a: str, b: str, at: str = "rounds", setting: str = "") -> Difference:
        """Accuracy of `a` minus `b`, seed by seed, with a 95 % interval and the p-value of a paired t-test.

        - `at`: equal "rounds", or equal "bytes" or "FLOPs": what `b` spent, seed by seed.

        **Raises:** `ValueError` for a method or a budget that is not there, or a method compared with itself.
        """
        methods = list(by_method(self._of(setting)))
        for name, method in (("a", a), ("b", b)):
            if method not in methods:
                raise ValueError(f"{name}={method!r}: must be a method{nearest(method, methods)}")
        if a == b:
            raise ValueError(f"a={a!r}, b={b!r}: must be two methods")
        runs = self._of(setting, read(self, reference=b))
        if at not in BUDGETS:
            raise ValueError(f"at={at!r}: must be one of {', '.join(BUDGETS)}")
        return differences([run for run in runs if run["method"] in (a, b)], BUDGETS[at], b)[a]

    def best(self, algorithm: str | None = None, setting: str = "") -> dict[str, Any]:
        """The finished run with the highest validation accuracy after its last round, as its row of `runs`.

        Validation accuracy is the only score that choosing may look at.

        **Raises:** `ValueError` if there is no such run.
        """
        runs = [run for run in self._of(setting) if algorithm in (None, run["algorithm"], run["method"])]
        validated = [run for run in runs if not math.isnan(run["accuracy_val"])]
        if not validated:
            there = ", ".join(by_method(self._of(setting)))
            raise ValueError(f"algorithm={algorithm!r}: no finished run of it was validated; there are {there}")
        chosen = max(validated, key=lambda run: run["accuracy_val"])
        return next(row for row in records(self.runs) if row["run_id"] == chosen["run_id"])

    def _of(self, setting: str, readings: Readings | None = None) -> list[Any]:
        """The runs of one setting: the one of that name, or the only one that it is a part of."""
        settings = by_setting((readings or self._readings).runs)
        named = [setting] if setting in settings else [name for name in settings if setting in name]
        if len(named) != 1:
            raise ValueError(f"setting={setting!r}: must be a part of exactly one of {'; '.join(settings) or 'none'}")
        return settings[named[0]]


def load(*directories: Place | str) -> Study:
    """The results of folders (paths, `s3://...`, `gs://...`). **Raises:** `ValueError`, see `fedsim.results.tables`."""
    found = tables.load(*directories)
    return Study(found.directories, found.runs, found.rounds)
