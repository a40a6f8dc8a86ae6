"""Run what is missing of one or more suites, and report: `python benchmarks/sweep.py --suite quick --out DIR`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks import suites  # noqa: E402
from fedsim.sweep.fairness import check_fair  # noqa: E402
from fedsim.sweep.plan import Machine, print_plan  # noqa: E402
from fedsim.report.document import write_report  # noqa: E402
from fedsim.report.tables import print_summary  # noqa: E402
from fedsim import load  # noqa: E402
from fedsim.cli.options import (  # noqa: E402
    add_resume_anywhere,
    add_runtime,
    add_settings,
    choose_numerics,
    exit_status,
    report_failures,
    runtime_maker,
)
from fedsim.core import environment  # noqa: E402
from fedsim.storage.place import place  # noqa: E402
from fedsim.sweep.profile import print_profile  # noqa: E402
from fedsim.sweep.progress import overview_for  # noqa: E402
from fedsim.sweep.runner import check_data, locked, run_all  # noqa: E402
from fedsim.sweep.suites import arguments_of, experiments_of, spelled, suites_in  # noqa: E402
from fedsim.sweep.tensorboard import Boards, check_tensorboard  # noqa: E402


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
        suites_there_are = suites_in(suites)
        for name in suites_there_are:
            print(f"suite {name}")
        listed = [experiment for make in suites_there_are.values() for experiment in make(**arguments_of(make, LISTED))]
        for name in sorted({experiment.algorithm.name for experiment in listed}):
            print(f"algorithm {name}")
        return 0
    if options.jobs < 1:
        raise ValueError(f"--jobs={options.jobs}: must be at least 1")
    wanted = {spelled(name): experiments_of(suites_in(suites), name, options) for name in options.suite}
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


LISTED = 0.05  # the scale at which suites are made to list their algorithms: full-size ones may need the hub

if __name__ == "__main__":
    sys.exit(main())
