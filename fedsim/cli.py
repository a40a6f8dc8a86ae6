"""`fedsim run | inspect | export | clean`. Exit status: 0 done, 1 a run failed, 2 a wrong request, 130 interrupted."""

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedsim import environment
from fedsim.cost import Cost, cost_of
from fedsim.devices import MEBIBYTE
from fedsim.experiment import Experiment, load_experiments, with_settings
from fedsim.export import export
from fedsim.profile import print_profile
from fedsim.progress import OneByOne, label_of
from fedsim.results import load
from fedsim.runner import check_data, check_folder, locked, run_all
from fedsim.runtime import RUNTIMES, Choice
from fedsim.simulation import RunFailed
from fedsim.store import clean, runs_in
from fedsim.tensorboard import Boards
from fedsim.training import StepCost


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command."""
    console = Console()
    options = parser().parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(lambda: options.command(options, console), console)


def exit_status(command: Callable[[], int], console: Console) -> int:
    """Run a command; turn what it raises into a message and an exit status."""
    try:
        return command()
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except OSError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted: every finished round is on disk", highlight=False)
        gc.freeze()  # or Python takes seconds, as it ends, to collect what torch and transformers are made of
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fedsim", description="Study how participants grow a transformer together.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment (or each of a list) into a results folder")
    add_experiment(run)
    add_runtime(run)
    run.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: results/<function>)")
    run.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    run.set_defaults(command=run_command)

    inspect = commands.add_parser("inspect", help="parameters, bytes, FLOPs and memory, before spending anything")
    add_experiment(inspect)
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(command=inspect_command)

    exporting = commands.add_parser("export", help="write a participant's grown model as a Hugging Face folder")
    exporting.add_argument("directory", type=Path, metavar="DIR", help="results folder")
    exporting.add_argument("--run", metavar="RUN_ID", help="which run, when DIR holds several")
    exporting.add_argument("--participant", type=int, required=True, metavar="I")
    exporting.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    exporting.set_defaults(command=export_command)

    cleaning = commands.add_parser("clean", help="delete checkpoints of finished runs; tables stay")
    cleaning.add_argument("directory", type=Path, metavar="DIR", help="results folder")
    cleaning.add_argument("--unfinished", action="store_true", help="also of runs that could be resumed")
    cleaning.set_defaults(command=clean_command)
    return top


def add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="MODULE:FUNCTION", help="a function that returns an Experiment")
    add_settings(command)


def add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field; dotted paths reach inside",
    )


def add_runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runtime", choices=RUNTIMES, default="ray")
    command.add_argument("--address", metavar="auto|HOST:PORT", help="Ray cluster to join (default: RAY_ADDRESS)")
    command.add_argument("--hosts", type=int, metavar="N", help="host processes (default: one a participant that fits)")
    command.add_argument(
        "--gpus", type=int, metavar="N", help="logical GPUs of a private Ray (default: those there are)"
    )
    command.add_argument("--tensorboard", action="store_true", help="also write DIR/tensorboard")
    command.add_argument("--profile", action="store_true", help="also write and print where every round's time went")


def runtime_maker(options: argparse.Namespace, console: Console) -> Choice:
    """What makes the runtime the options ask for, when it is needed."""
    if options.hosts is not None and options.hosts < 1:
        raise ValueError(f"--hosts={options.hosts}: must be at least 1")
    if options.gpus is not None and options.gpus < 0:
        raise ValueError(f"--gpus={options.gpus}: must be at least 0")
    address = options.address or environment.ray_address()
    if address is not None:
        environment.use_ray_token()
    return Choice(
        options.runtime,
        address=address,
        hosts=options.hosts,
        gpus=options.gpus,
        say=lambda text: console.print(text, highlight=False),
    )


def run_command(options: argparse.Namespace, console: Console) -> int:
    experiments = [with_settings(experiment, options.settings) for experiment in load_experiments(options.target)]
    out = options.out or Path("results") / options.target.partition(":")[2]
    make, data_dir, typed = runtime_maker(options, console), environment.data_dir(), ["fedsim", *options.words]
    overview = Boards(OneByOne(console), out) if options.tensorboard else None
    check_data(experiments, data_dir)
    with locked(out):
        check_folder(out, experiments, options.resume)
        suite = options.target.partition(":")[2]
        failures = run_all(
            experiments,
            out=out,
            make_runtime=make,
            suite=suite,
            data_dir=data_dir,
            console=console,
            overview=overview,
            command=shlex.join(typed),
            profile=options.profile,
        )
        if options.profile:
            print_profile(load(out).profile, console)
    report_failures(failures, shlex.join(typed if options.resume else [*typed, "--resume"]), console)
    if not failures:
        console.print(f"results: {out}/runs, {out}/rounds, {out}/clients", highlight=False, soft_wrap=True)
    return 1 if failures else 0


def report_failures(failures: Sequence[RunFailed], command: str, console: Console) -> None:
    """Which runs failed, why, and how to go on."""
    for failure in failures:
        console.print(str(failure), highlight=False, markup=False, soft_wrap=True)
    if failures:
        console.print(f"go on with: {command}", highlight=False, markup=False, soft_wrap=True)


def inspect_command(options: argparse.Namespace, console: Console) -> int:
    experiments = [with_settings(experiment, options.settings) for experiment in load_experiments(options.target)]
    counted: dict[tuple, StepCost] = {}
    costs = [cost_of(experiment, counted) for experiment in experiments]
    if options.json:
        objects = [cost.as_json(experiment) for cost, experiment in zip(costs, experiments, strict=True)]
        print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
        return 0
    for cost, experiment in zip(costs, experiments, strict=True):
        print_cost(cost, experiment, console)
    return 0


def print_cost(cost: Cost, experiment: Experiment, console: Console) -> None:
    """The cost of one experiment in words: totals, then one line a tier."""
    figures = cost.as_json(experiment)
    lines = {
        "target": f"{figures['target_params']:,} parameters ({experiment.target})",
        "upload, mean": f"{figures['upload_params']:,} parameters, {figures['upload_bytes'] / 1e6:.2f} MB",
        "FedAvg upload": f"{figures['fedavg_upload_bytes'] / 1e6:.2f} MB",
        "trained and kept, mean": f"{figures['local_params']:,} parameters",
        "trained, mean": f"{figures['trainable_params']:,} parameters",
        "communication saved": f"{100 * figures['communication_saved']:.2f} % of FedAvg's upload",
        "trainable parameters saved": f"{100 * figures['trainable_saved']:.2f} % of the target's",
        "private state on disk": f"{figures['private_bytes'] / 1e6:.2f} MB for all participants",
        "memory of a step": f"{figures['peak_bytes'] / 1e6:.1f} MB at most, by count",
    }
    console.print(f"{label_of(experiment)}  run {experiment.run_id}", highlight=False)
    for name, text in lines.items():
        console.print(f"  {name:<28}{text}", highlight=False, soft_wrap=True)
    for tier in cost.participants:
        trained = ", ".join(f"{purpose} {count:,}" for purpose, count in tier.trainable.items())
        flops = ", ".join(f"{purpose} {count / 1e6:,.0f}" for purpose, count in tier.flops_per_step.items())
        console.print(f"  {tier.tier}, {tier.count} participants of {tier.form}:", highlight=False)
        console.print(f"    {'own model':<26}{tier.small_params:,} parameters", highlight=False)
        console.print(f"    {'trained':<26}{trained}", highlight=False, soft_wrap=True)
        console.print(f"    {'uploaded':<26}{tier.upload_params:,}", highlight=False)
        console.print(f"    {'MFLOP a step':<26}{flops}", highlight=False, soft_wrap=True)
        device = next(each.simulated for each in experiment.tiers if each.name == tier.tier)
        if device is not None:
            steps = ", ".join(
                f"{purpose} {device.seconds(down=0, flops=count, up=0):.3g}"
                for purpose, count in tier.flops_per_step.items()
            )
            lines = device.seconds(down=tier.download_bytes, flops=0, up=tier.upload_bytes)
            memory = f"{tier.peak_bytes / MEBIBYTE:.1f} MB of {device.memory_mb:g} MB (2^20 bytes)"
            console.print(f"    {'seconds a step':<26}{steps} (simulated)", highlight=False, soft_wrap=True)
            console.print(f"    {'seconds on the line':<26}{lines:.3g} a round (simulated)", highlight=False)
            console.print(f"    {'memory of a step':<26}{memory}", highlight=False)


def export_command(options: argparse.Namespace, console: Console) -> int:
    folder = export(options.directory, options.run, options.participant, options.to)
    console.print(f"written: {folder}", highlight=False, soft_wrap=True)
    return 0


def clean_command(options: argparse.Namespace, console: Console) -> int:
    runs_in(options.directory)  # a folder without results is refused before a lock is made in it
    with locked(options.directory):
        freed = clean(options.directory, unfinished=options.unfinished)
    console.print(f"freed {freed.bytes / 1e6:.1f} MB: checkpoints of {freed.runs} runs", highlight=False)
    if freed.unfinished:
        console.print(f"kept those of {freed.unfinished} unfinished runs (--unfinished deletes them)", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
