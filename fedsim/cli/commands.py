"""What the commands of `fedsim` do. They import torch; the command line itself (`fedsim.cli`) does not."""

import argparse
import functools
import json
import shlex
from pathlib import Path

from rich.console import Console

from fedsim.cli.options import SUITES, address_of, report_failures
from fedsim.cluster.doctor import PROBLEM, as_json, examine, print_findings
from fedsim.core import environment
from fedsim.core.fields import path_of
from fedsim.core.modules import module_named
from fedsim.core.terminal import say
from fedsim.devices import MEBIBYTE
from fedsim.engine.cost import Cost, cost_of
from fedsim.experiment import Experiment, load_experiments, with_settings
from fedsim.learning.meter import StepCost
from fedsim.results.export import export
from fedsim.results.store import clean, runs_in
from fedsim.results.tables import load
from fedsim.runtime import Choice
from fedsim.storage.place import place
from fedsim.sweeps.profile import print_profile
from fedsim.sweeps.progress import label_of, overview_for
from fedsim.sweeps.runner import check_data, check_folder, locked, run_all
from fedsim.sweeps.suites import experiments_of, suites_of
from fedsim.sweeps.tensorboard import Boards


def run_command(options: argparse.Namespace, console: Console) -> int:
    options.doing(f"loading {options.target} and its models")
    experiments = [with_settings(experiment, options.settings) for experiment in load_experiments(options.target)]
    out = place(Path("results", options.target.partition(":")[2]) if options.out is None else options.out)
    data_dir, typed = environment.data_dir(), ["fedsim", *options.words]
    overview = Boards(overview_for(console), out) if options.tensorboard else None
    options.doing("preparing data")
    check_data(experiments, data_dir, functools.partial(say, console))
    with locked(out, functools.partial(say, console)) as out:
        check_folder(out, experiments, options.resume)
        suite = options.target.partition(":")[2]
        failures = run_all(
            experiments,
            out=out,
            make_runtime=options.make_runtime,
            suite=suite,
            data_dir=data_dir,
            console=console,
            overview=overview,
            command=shlex.join(typed),
            profile=options.profile,
            resume_anywhere=options.resume_anywhere,
            keep_updates=options.keep_updates,
            publish=options.publish,
        )
        if options.profile:
            print_profile(load(out).profile, console)
    report_failures(failures, shlex.join(typed if options.resume else [*typed, "--resume"]), console)
    if not failures:
        say(console, f"results: {out}/runs, {out}/rounds, {out}/clients")
    return 1 if failures else 0


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
        "scored": f"{figures['scored_models']:,} models in all (scored={experiment.scored}, eval_every="
        f"{experiment.eval_every}), {figures['score_flops_per_example'] / 1e6:,.1f} MFLOP a test example for one as "
        "large as the target; of equal ones a host scores one",
    }
    say(console, f"{label_of(experiment)}  run {experiment.run_id}")
    for name, text in lines.items():
        say(console, f"  {name:<28}{text}")
    for tier in cost.participants:
        trained = ", ".join(f"{purpose} {count:,}" for purpose, count in tier.trainable.items())
        flops = ", ".join(f"{purpose} {count / 1e6:,.0f}" for purpose, count in tier.flops_per_step.items())
        say(console, f"  {tier.tier}, {tier.count} participants of {tier.form}:")
        say(console, f"    {'own model':<26}{tier.small_params:,} parameters")
        say(console, f"    {'trained':<26}{trained}")
        say(console, f"    {'uploaded':<26}{tier.upload_params:,}")
        say(console, f"    {'MFLOP a step':<26}{flops}")
        device = next(each.simulated for each in experiment.tiers if each.name == tier.tier)
        if device is not None:
            steps = ", ".join(
                f"{purpose} {device.seconds(down=0, flops=count, up=0):.3g}"
                for purpose, count in tier.flops_per_step.items()
            )
            lines = device.seconds(down=tier.download_bytes, flops=0, up=tier.upload_bytes)
            memory = f"{tier.peak_bytes / MEBIBYTE:.1f} MB of {device.memory_mb:g} MB (2^20 bytes)"
            say(console, f"    {'seconds a step':<26}{steps} (simulated)")
            say(console, f"    {'seconds on the line':<26}{lines:.3g} a round (simulated)")
            say(console, f"    {'memory of a step':<26}{memory}")


def export_command(options: argparse.Namespace, console: Console) -> int:
    modules = [module_named(name, f"--import={name!r}") for name in options.modules]
    directory, to = place(options.directory, "DIR"), path_of(options.to, "--to")
    folder = export(directory, options.run, options.participant, to, modules)
    say(console, f"written: {folder}")
    return 0


def clean_command(options: argparse.Namespace, console: Console) -> int:
    directory = place(options.directory, "DIR")
    runs_in(directory)  # a folder without results is refused before a lock is made in it
    with locked(directory):
        freed = clean(directory, unfinished=options.unfinished)
    say(console, f"freed {freed.bytes / 1e6:.1f} MB: checkpoints of {freed.runs} runs")
    if freed.unfinished:
        say(console, f"kept those of {freed.unfinished} unfinished runs (--unfinished deletes them)")
    if freed.foreign:
        say(console, f"left alone {freed.foreign} folders in {directory}/checkpoints that no manifest says are a run's")
    return 0


def experiments_for(options: argparse.Namespace) -> list[Experiment]:
    """What `fedsim submit` will run: of MODULE:FUNCTION, or of suites at one seed, for all seeds ask for the same."""
    if options.target is not None:
        return [with_settings(each, options.settings) for each in load_experiments(options.target)]
    known = suites_of(SUITES)
    chosen = argparse.Namespace(**{**vars(options), "seeds": [(options.seeds or [0])[0]]})
    return [each for name in options.suite for each in experiments_of(known, name, chosen)]


def submit_command(options: argparse.Namespace, console: Console) -> int:
    environment.use_ray_token()  # Ray reads what this says when it is imported
    from fedsim.cluster.submit import submit

    return submit(options, console, lambda: experiments_for(options))


def doctor_command(options: argparse.Namespace, console: Console) -> int:
    if options.cluster:
        if options.json or options.address:
            raise ValueError(f"--cluster={options.cluster!r}: not with --json or --address")
        environment.use_ray_token()
        from fedsim.cluster.submit import examine as examine_cluster

        return examine_cluster(options, console)
    out = place(options.out) if options.out is not None else None
    runtime = Choice("ray", address=address_of(options))()
    try:
        findings = examine(runtime, out)
    finally:
        runtime.close()
    if options.json:
        print(json.dumps(as_json(findings), indent=2))
    else:
        print_findings(findings, console)
    return 1 if any(found.level == PROBLEM for found in findings) else 0
