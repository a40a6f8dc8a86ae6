"""fedsim: study how many resource-poor participants grow one large transformer together.

    import fedsim
    results = fedsim.sweep(experiments, out="results/mine", seeds=(0, 1, 2))  # or fedsim.run(experiment, out=...)
    results.table()                                                           # .runs .rounds .clients: pandas frames

Nothing is imported before it is used: Ray only by runs that are computed on it.
"""

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pathlib import Path

    from fedsim.data import DataConfig, Partition
    from fedsim.experiment import Experiment, Tier, from_pretrained
    from fedsim.learning.task import TaskConfig
    from fedsim.models import Form, Like
    from fedsim.models.checkpoint import Checkpoint
    from fedsim.report.frames import Study
    from fedsim.storage.place import Place

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "DataConfig",
    "Experiment",
    "Form",
    "Like",
    "Partition",
    "TaskConfig",
    "Tier",
    "export",
    "from_pretrained",
    "load",
    "run",
    "sweep",
]

_FROM = {
    "Checkpoint": "fedsim.models.checkpoint",
    "DataConfig": "fedsim.data",
    "Experiment": "fedsim.experiment",
    "Form": "fedsim.models",
    "Like": "fedsim.models",
    "Partition": "fedsim.data",
    "TaskConfig": "fedsim.learning.task",
    "Tier": "fedsim.experiment",
    "from_pretrained": "fedsim.experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(*directories: "Place | str") -> "Study":
    """`.runs`, `.rounds`, `.clients` of results folders (paths, `s3://...` or `gs://...`), as pandas frames.

    **Raises:** `ValueError` for a folder without results, or naming a file that cannot be read.
    """
    from fedsim.report.frames import load

    return load(*directories)


def export(
    directory: "Place | str", participant: int, to: "os.PathLike[str] | str", *, run: str | None = None
) -> "Path":
    """Write the model that a participant would deploy after a finished run, as a Hugging Face folder.

    - `run`: which, where the results folder holds several. Its algorithm may have been typed into this notebook.

    **Raises:** `ValueError` naming what is not there.
    """
    from fedsim.core.fields import path_of
    from fedsim.results.export import export
    from fedsim.storage.place import place

    return export(place(directory, "directory"), run, participant, path_of(to, "to"))


def run(
    experiment: "Experiment",
    *,
    out: "Place | str",
    runtime: str = "inline",
    hosts: int | None = None,
    address: str | None = None,
    gpus: int | None = None,
    numerics: str | None = None,
    resume_anywhere: bool = False,
    keep_updates: bool = False,
    publish: bool = False,
) -> "Study":
    """Run one experiment with a progress display, resume it if it was cut, and return its folder's results.

    - `numerics`: `portable` gives the same bits on any x86-64 processor with AVX2; `native` is faster for wide models
      on a CPU. None: portable, unless this process has computed with torch before; a message says so.
    - `resume_anywhere`: go on with a cut run also where its rounds to come have other bits.
    - `keep_updates`: keep what every participant receives and sends, for `fedsim audit`; no part of the run's id.
    - `publish`: leave what tells of participants' data out of the tables and the report (`docs/privacy.md`), so that
      these may be given away, and nothing else of the folder; no part of the run's id either.

    **Raises:** `ValueError` for a request that cannot be met, or a folder that holds another experiment (`sweep` takes
    several); `fedsim.simulation.RunFailed` for a run that broke.
    """
    from fedsim.sweeps.runner import run_in

    run_in(
        [experiment],
        out=out,
        alone=True,
        runtime=runtime,
        hosts=hosts,
        address=address,
        gpus=gpus,
        numerics=numerics,
        resume_anywhere=resume_anywhere,
        keep_updates=keep_updates,
        publish=publish,
    )
    return load(out)


def sweep(
    experiments: "Sequence[Experiment]",
    *,
    out: "Place | str",
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    suite: str = "sweep",
    runtime: str = "inline",
    hosts: int | None = None,
    address: str | None = None,
    gpus: int | None = None,
    numerics: str | None = None,
    resume_anywhere: bool = False,
    keep_updates: bool = False,
    publish: bool = False,
) -> "Study":
    """Compute what is missing of some experiments in one folder, and return its results.

    What the folder holds already is kept: finished runs are not computed again, cut ones are resumed.

    - `seeds`: every experiment runs once with each; None: each with its own.
    - `jobs`: runs computed at once, each in a process of its own. A script that asks for several must do so under
      `if __name__ == "__main__"`.
    - `suite`: what the results call them; runs of one suite are compared with each other.
    - Others: as of `run`.

    **Raises:** `ValueError` for a request that cannot be met; `fedsim.simulation.RunFailed` for the first run that
    broke, after the others were computed.
    """
    from fedsim.sweeps.runner import run_in

    run_in(
        experiments,
        out=out,
        seeds=seeds,
        jobs=jobs,
        suite=suite,
        runtime=runtime,
        hosts=hosts,
        address=address,
        gpus=gpus,
        numerics=numerics,
        resume_anywhere=resume_anywhere,
        keep_updates=keep_updates,
        publish=publish,
    )
    return load(out)
