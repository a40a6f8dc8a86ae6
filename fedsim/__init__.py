"""fedsim: study how many resource-poor participants grow one large transformer together.

`fedsim.run(experiment, out=...)` runs an experiment from a notebook, `fedsim.load(folder)` reads results into pandas.
Ray is imported only by runs that use it.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.results.tables import Results
    from fedsim.storage.place import Place

__version__ = "0.1.0"
__all__ = ["load", "run"]


def load(directory: "Place | str") -> "Results":
    """`.runs`, `.rounds`, `.clients` of a results folder (a path, `s3://...` or `gs://...`), as pandas frames.

    **Raises:** `ValueError` for a folder without results, or naming a file that cannot be read.
    """
    from fedsim.results.tables import load

    return load(directory)


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
) -> "Results":
    """Run one experiment with a progress display, resume it if it was cut, and return its folder's results.

    - `numerics`: `portable` gives the same bits on any x86-64 processor with AVX2; `native` is faster for wide models
      on a CPU. None: portable, unless this process has computed with torch before; a message says so.
    - `resume_anywhere`: go on with a cut run also where its rounds to come have other bits.

    **Raises:** `ValueError` for a request that cannot be met; `fedsim.simulation.RunFailed` for a run that broke.
    """
    from rich.console import Console

    from fedsim.core import environment
    from fedsim.core.numerics import settle
    from fedsim.runtime import Choice
    from fedsim.storage.place import place
    from fedsim.sweeps.runner import check_data, check_folder, locked, run_all

    folder, data_dir, console = place(out), environment.data_dir(), Console()
    numerics = settle(
        numerics, here=runtime == "inline", say=lambda text: console.print(text, highlight=False, markup=False)
    )
    check_data([experiment], data_dir)
    with locked(folder):
        check_folder(folder, [experiment], resume=True)
        failures = run_all(
            [experiment],
            out=folder,
            make_runtime=Choice(runtime, hosts=hosts, address=address, gpus=gpus, numerics=numerics),
            data_dir=data_dir,
            console=console,
            resume_anywhere=resume_anywhere,
        )
    if failures:
        raise failures[0]
    return load(folder)
