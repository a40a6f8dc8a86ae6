"""Run what is missing of one or more suites, and report: `python benchmarks/sweep.py --suite quick --out DIR`."""

import argparse
import inspect
import os
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
from benchmarks.fairness import check_fair  # noqa: E402
from benchmarks.plan import Machine, print_plan  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.tables import print_summary  # noqa: E402
from fedsim import environment, load  # noqa: E402
from fedsim.cli import (  # noqa: E402
    add_resume_anywhere,
    add_runtime,
    add_settings,
    choose_numerics,
    exit_status,
    report_failures,
    runtime_maker,
)
from fedsim.experiment import Experiment, nearest, with_settings  # noqa: E402
from fedsim.profile import print_profile  # noqa: E402
from fedsim.progress import label_of, overview_for  # noqa: E402
from fedsim.runner import check_data, locked, run_all  # noqa: E402
from fedsim.storage import place  # noqa: E402
from fedsim.tensorboard import Boards, check_tensorboard  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    console = Console()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(lambda: sweep(parser().parse_args(words), words, console), console)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="benchmarks/sweep.py", description=__doc__)
    command.add_argument("--suite", nargs="+", default=["quick"], metavar="NAME")
    command.add_argument("--out", metavar="DIR", help="results folder, s3:// or gs:// (default: results/<suite>)")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    command.add_argument("--only", nargs="+", metavar="ALGORITHM", help="leave the other algorithms out")
    command.add_argument("--data", nargs="+", metavar="NAME", help="leave the other data sets out")
    command.add_argument("--scale", type=float, metavar="S", help="a share of the full size, for suites that take one")
    add_runtime(command)
    add_resume_anywhere(command)
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, each in its own process")
    add_settings(command)
    command.add_argument("--list", action="store_true", help="print the suites and algorithms there are")
    command.add_argument("--dry-run", action="store_true", help="print what would be run, and what it costs")
    return command


def sweep(options: argparse.Namespace, words: Sequence[str], console: Console) -> int:
    if options.list:
        suites_there_are = known_suites()
        for name in suites_there_are:
            print(f"suite {name}")
        listed = [experiment for make in suites_there_are.values() for experiment in make(**arguments_of(make, LISTED))]
        for name in sorted({experiment.algorithm.name for experiment in listed}):
            print(f"algorithm {name}")
        return 0
    if options.jobs < 1:
        raise ValueError(f"--jobs={options.jobs}: must be at least 1")
    wanted = {spelled(name): experiments_of(name, options) for name in options.suite}
    out, data_dir = place(options.out or Path("results") / "+".join(wanted)), environment.data_dir()
    if options.dry_run:
        machine = Machine(options.runtime, options.hosts, options.jobs, os.cpu_count() or 1)
        print_plan(wanted, out=out, data_dir=data_dir, machine=machine, console=console)
        return 0

    choose_numerics(options, console)
    make_runtime, typed = runtime_maker(options, console), shlex.join(["python", "benchmarks/sweep.py", *words])
    if options.tensorboard:
        check_tensorboard()
    for experiments in wanted.values():
        check_fair(experiments, data_dir)
    check_data([experiment for experiments in wanted.values() for experiment in experiments], data_dir)
    failures = []
    with locked(out, lambda text: console.print(text, highlight=False)):
        for suite, experiments in wanted.items():
            failures += run_all(
                experiments,
                out=out,
                make_runtime=make_runtime,
                suite=suite,
                data_dir=data_dir,
                console=console,
                overview=Boards(overview_for(console), out) if options.tensorboard else overview_for(console),
                jobs=options.jobs,
                command=typed,
                profile=options.profile,
                resume_anywhere=options.resume_anywhere,
            )
        if any((out / "runs").glob("*.parquet")):  # not even one row is left of a run whose process died early
            results = load(out)
            if options.profile:
                print_profile(results.profile, console)
            print_summary(results, directory=out, report=write_report(out, results=results), console=console)
    report_failures(failures, typed, console)
    return 1 if failures else 0


def known_suites() -> dict[str, Callable[..., list[Experiment]]]:
    """Name -> function, for every function of `benchmarks.suites` that returns a list of experiments unasked.

    Names have hyphens where those of functions have underscores (`spelled`).
    """
    return {
        spelled(name): function
        for name, function in inspect.getmembers(suites, inspect.isfunction)
        if not name.startswith("_") and _is_suite(inspect.signature(function))
    }


def _is_suite(signature: inspect.Signature) -> bool:
    optional = all(parameter.default is not inspect.Parameter.empty for parameter in signature.parameters.values())
    return optional and signature.return_annotation == list[Experiment]


def spelled(name: str) -> str:
    """How a suite is called in results, whichever way it was typed: `paper-cv`."""
    return name.replace("_", "-")


def experiments_of(name: str, options: argparse.Namespace) -> list[Experiment]:
    """The experiments of a suite for all seeds, with `--scale`, `--only`, `--data` and `--set` applied.

    **Raises:** `ValueError` for an unknown suite, algorithm or data set, for a scale that the suite does not take, and
    for a setting that one of the experiments refuses.
    """
    known, suite = known_suites(), spelled(name)
    if suite not in known:
        raise ValueError(f"--suite={name!r}: no such suite{nearest(suite, list(known))}")
    base = _chosen(known[suite](**_given_scale(known[suite], options.scale, suite)), suite, options)
    experiments = []
    for seed in dict.fromkeys(options.seeds):
        for experiment in base:
            try:
                experiments.append(with_settings(replace(experiment, seed=seed), options.settings))
            except ValueError as error:
                raise ValueError(f"suite {suite!r}, {label_of(experiment)}: {error}") from error
    return experiments


def _chosen(base: list[Experiment], suite: str, options: argparse.Namespace) -> list[Experiment]:
    """What `--only` and `--data` leave of a suite."""
    for option, asked, names in (
        ("--only", options.only, [experiment.algorithm.name for experiment in base]),
        ("--data", options.data, [experiment.task.data.name for experiment in base]),
    ):
        for each in asked or ():
            if each not in names:
                raise ValueError(f"{option}={each!r}: not in suite {suite!r}{nearest(each, [*dict.fromkeys(names)])}")
    left = [
        experiment
        for experiment in base
        if experiment.algorithm.name in (options.only or [experiment.algorithm.name])
        and experiment.task.data.name in (options.data or [experiment.task.data.name])
    ]
    if not left:
        raise ValueError(f"--only={options.only}, --data={options.data}: suite {suite!r} has no such experiment")
    return left


def _given_scale(make: Callable[..., list[Experiment]], scale: float | None, suite: str) -> dict[str, float]:
    """The arguments of a suite's function, where `--scale` may be given or not."""
    if scale is None:
        return {}
    if not 0 < scale <= 1:
        raise ValueError(f"--scale={scale}: must be above 0 and at most 1")
    arguments = arguments_of(make, scale)
    if not arguments:
        others = ", ".join(name for name, each in known_suites().items() if arguments_of(each, scale))
        raise ValueError(f"--scale={scale}: suite {suite!r} has one size only; scales are for {others}")
    return arguments


def arguments_of(make: Callable[..., list[Experiment]], scale: float) -> dict[str, float]:
    """The arguments of a suite's function; none where it takes no scale."""
    return {"scale": scale} if "scale" in inspect.signature(make).parameters else {}


LISTED = 0.05  # the scale at which suites are made to list their algorithms: full-size ones may need the hub

if __name__ == "__main__":
    sys.exit(main())
