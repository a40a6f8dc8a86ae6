"""Run what is missing of one or more suites, and report: `python benchmarks/sweep.py --suite quick --out DIR`."""

import argparse
import inspect
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks import suites  # noqa: E402
from benchmarks.report import print_summary, write_report  # noqa: E402
from fedsim import environment, load  # noqa: E402
from fedsim.cli import add_runtime, add_settings, exit_status, report_failures, runtime_maker  # noqa: E402
from fedsim.cost import cost_of  # noqa: E402
from fedsim.experiment import Experiment, nearest, with_settings  # noqa: E402
from fedsim.progress import label_of  # noqa: E402
from fedsim.runner import check_data, locked, run_all  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    console = Console()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(lambda: sweep(parser().parse_args(words), words, console), console)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="benchmarks/sweep.py", description=__doc__)
    command.add_argument("--suite", nargs="+", default=["quick"], metavar="NAME")
    command.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: results/<suite>)")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    command.add_argument("--only", nargs="+", metavar="ALGORITHM", help="leave the other algorithms out")
    add_runtime(command)
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once; only 1 so far")
    add_settings(command)
    command.add_argument("--list", action="store_true", help="print the suites and algorithms there are")
    command.add_argument("--dry-run", action="store_true", help="print what would be run, and what it costs")
    return command


def sweep(options: argparse.Namespace, words: Sequence[str], console: Console) -> int:
    if options.list:
        for name in known_suites():
            print(f"suite {name}")
        for name in sorted({experiment.algorithm.name for make in known_suites().values() for experiment in make()}):
            print(f"algorithm {name}")
        return 0
    if options.jobs != 1:
        raise ValueError(f"--jobs={options.jobs}: must be 1: runs are computed one after another")
    wanted = {name: experiments_of(name, options) for name in options.suite}
    if options.dry_run:
        print_plan(wanted, console)
        return 0

    out, data_dir = options.out or Path("results") / "+".join(options.suite), environment.data_dir()
    make_runtime = runtime_maker(options, console)
    check_data([experiment for experiments in wanted.values() for experiment in experiments], data_dir)
    failures = []
    with locked(out):
        for suite, experiments in wanted.items():
            failures += run_all(
                experiments, out=out, make_runtime=make_runtime, suite=suite, data_dir=data_dir, console=console
            )
        results = load(out)
        print_summary(results, directory=out, report=write_report(out, results=results), console=console)
    report_failures(failures, shlex.join(["python", "benchmarks/sweep.py", *words]), console)
    return 1 if failures else 0


def known_suites() -> dict[str, Callable[[], list[Experiment]]]:
    """Name -> function, for every function of `benchmarks.suites` that returns a list of experiments."""
    functions = inspect.getmembers(suites, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if not name.startswith("_") and inspect.signature(function).return_annotation == list[Experiment]
    }


def experiments_of(name: str, options: argparse.Namespace) -> list[Experiment]:
    """The experiments of a suite for all seeds, with `--only` and `--set` applied.

    **Raises:** `ValueError` for an unknown suite or algorithm, and for a setting that one of the experiments refuses.
    """
    if name not in known_suites():
        raise ValueError(f"--suite={name!r}: no such suite{nearest(name, list(known_suites()))}")
    base = known_suites()[name]()
    if options.only:
        names = [experiment.algorithm.name for experiment in base]
        for algorithm in options.only:
            if algorithm not in names:
                raise ValueError(f"--only={algorithm!r}: not in suite {name!r}{nearest(algorithm, names)}")
        base = [experiment for experiment in base if experiment.algorithm.name in options.only]
    experiments = []
    for seed in dict.fromkeys(options.seeds):
        for experiment in base:
            try:
                experiments.append(with_settings(replace(experiment, seed=seed), options.settings))
            except ValueError as error:
                raise ValueError(f"suite {name!r}, {label_of(experiment)}: {error}") from error
    return experiments


def print_plan(wanted: dict[str, list[Experiment]], console: Console) -> None:
    """What a sweep would compute: runs, rounds, bytes, by count."""
    for suite, experiments in wanted.items():
        console.print(f"suite {suite}: {len(experiments)} runs", highlight=False)
        for experiment in experiments:
            cost = cost_of(experiment, COUNTED)
            a_round = (cost.mean("upload_bytes") + cost.mean("download_bytes")) * (
                experiment.cohort or experiment.participants
            )
            console.print(
                f"  {label_of(experiment)}: run {experiment.run_id}, {experiment.rounds} rounds, "
                f"{a_round * experiment.rounds / 1e6:.1f} MB",
                highlight=False,
                soft_wrap=True,
            )


COUNTED: dict = {}  # costs of training steps, shared by the runs of a plan

if __name__ == "__main__":
    sys.exit(main())
