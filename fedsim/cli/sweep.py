"""`fedsim sweep` and `fedsim report`: several runs into one folder, and the page about them."""

import argparse
import functools
import os
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedsim.cli.options import SUITES, report_failures
from fedsim.core import environment
from fedsim.core.terminal import say
from fedsim.experiment import Experiment
from fedsim.report.document import write_report
from fedsim.report.readings import finished_runs, referred
from fedsim.report.terminal import print_summary
from fedsim.results.tables import load
from fedsim.storage.place import Place, place
from fedsim.sweeps.fairness import check_fair
from fedsim.sweeps.plan import Machine, print_plan
from fedsim.sweeps.profile import print_profile
from fedsim.sweeps.progress import overview_for
from fedsim.sweeps.runner import check_data, locked, run_all
from fedsim.sweeps.suites import Suites, arguments_of, experiments_of, spelled, suite_at, suites_of
from fedsim.sweeps.tensorboard import Boards, check_tensorboard


LISTED = 0.05  # the scale at which suites are made to list their algorithms: full-size ones may need the hub


def sweep_command(options: argparse.Namespace, console: Console) -> int:
    if options.list:
        return list_suites(suites_of(SUITES))
    if options.jobs < 1:
        raise ValueError(f"--jobs={options.jobs}: must be at least 1")
    if not options.dry_run:
        options.doing("loading experiments and their models")
    wanted = wanted_of(options)
    out, data_dir = (
        place(Path("results", "+".join(wanted)) if options.out is None else options.out),
        environment.data_dir(),
    )
    if options.dry_run:
        machine = Machine(options.runtime, options.hosts, options.jobs, os.cpu_count() or 1)
        print_plan(wanted, out=out, data_dir=data_dir, machine=machine, console=console)
        return 0

    typed = shlex.join(["fedsim", *options.words])
    if options.tensorboard:
        check_tensorboard()
    check_reference(options.reference, [each for experiments in wanted.values() for each in experiments], out)
    options.doing("preparing data")
    for experiments in wanted.values():
        check_fair(experiments, data_dir)
    everything = [experiment for experiments in wanted.values() for experiment in experiments]
    check_data(everything, data_dir, functools.partial(say, console))
    failures = []
    with locked(out, functools.partial(say, console)) as out:
        for suite, experiments in wanted.items():
            failures += run_all(
                experiments,
                out=out,
                make_runtime=options.make_runtime,
                suite=suite,
                data_dir=data_dir,
                console=console,
                overview=Boards(overview_for(console), out) if options.tensorboard else None,
                jobs=options.jobs,
                command=typed,
                profile=options.profile,
                resume_anywhere=options.resume_anywhere,
                keep_updates=options.keep_updates,
                publish=options.publish,
            )
        if any((out / "runs").glob("*.parquet")):  # not even one row is left of a run whose process died early
            results = load(out)
            if options.profile:
                print_profile(results.profile, console)
            reference = options.reference
            if reference is not None and not referred(finished_runs(results), reference):
                say(console, f"--reference={reference!r}: no run of it has finished")
                reference = None
            page = write_report(out, results=results, reference=reference)
            print_summary(results, directory=out, report=page, console=console, reference=reference)
    report_failures(failures, typed, console)
    return 1 if failures else 0


def report_command(options: argparse.Namespace, console: Console) -> int:
    if options.out is not None and not options.out.endswith((".html", ".htm")):
        raise ValueError(f"--out={options.out!r}: must end with .html")
    results = load(*(place(each, "DIR") for each in options.directories))
    out = place(options.out) if options.out is not None else None
    path = write_report(results.directories[0], out, results, options.reference)
    print(path)
    if options.open and not (isinstance(path, Path) and webbrowser.open(path.resolve().as_uri())):
        say(console, "no browser could be opened")
    return 0


def wanted_of(options: argparse.Namespace) -> dict[str, list[Experiment]]:
    """The experiments of each suite that was asked for, by what it is called in results.

    **Raises:** `ValueError` where nothing was asked for, or for what `experiments_of` refuses.
    """
    wanted: dict[str, list[Experiment]] = {}
    if options.suite:
        known = suites_of(SUITES)
        wanted = {spelled(name): experiments_of(known, name, options) for name in options.suite}
    for target in options.targets:
        name, make = suite_at(target)
        if name in wanted:
            raise ValueError(f"MODULE:FUNCTION={target!r}: two suites are called {name!r}")
        wanted[name] = experiments_of({name: make}, name, options)
    if not wanted:
        raise ValueError("MODULE:FUNCTION: name a function that returns a list of experiments, or give --suite NAME")
    return wanted


def check_reference(reference: str | None, experiments: Sequence[Experiment], out: Place) -> None:
    """**Raises:** `ValueError` for a reference that is neither one of the algorithms nor a variant of one.

    - `out`: its runs may be what others are compared with, too.
    """
    names = {experiment.algorithm.name for experiment in experiments}
    if any((out / "runs").glob("*.parquet")):
        names |= {*load(out).runs.algorithm}
    if reference is not None and reference.partition(" ")[0] not in names:
        raise ValueError(f"--reference={reference!r}: must be one of {', '.join(sorted(names))}, or a method of theirs")


def list_suites(known: Suites) -> int:
    """Plain lines: every suite, and every algorithm in one of them that needs nothing to be fetched first."""
    algorithms = set[str]()
    for name, make in known.items():
        print(f"suite {name}")
        if any(name.startswith(f"{other}-") for other in known):  # a variation of that suite: its algorithms
            continue
        try:
            algorithms |= {experiment.algorithm.name for experiment in make(**arguments_of(make, LISTED))}
        except ValueError as error:
            print(f"suite {name}: {error}", file=sys.stderr)
    for name in sorted(algorithms):
        print(f"algorithm {name}")
    return 0
