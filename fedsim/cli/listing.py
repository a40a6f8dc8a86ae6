"""`fedsim list`: what there is, a line each; `fedsim show`: one run, its cost and its result."""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from fedsim.cli.options import SUITES
from fedsim.core.fields import refuse
from fedsim.core.modules import module_named
from fedsim.core.terminal import say
from fedsim.report.readings import MEGABYTE, records
from fedsim.report.tables import percent, significant
from fedsim.results.tables import load
from fedsim.storage.place import place


METHODS = "benchmarks.methods"  # every method that suites compare is named there
PRESETS = "fedgrow_algo.presets"


def list_command(options: argparse.Namespace, console: Console) -> int:
    lines = dict(globals()[f"_{options.kind}"]())
    widest = max(map(len, lines))
    for name, text in lines.items():
        say(console, f"{name:<{widest}}  {text}")
    return 0


def _methods() -> Iterator[tuple[str, str]]:
    """A function that makes one says what it is; else the module of its class."""
    for name, method in module_named(METHODS, "list methods").named().items():
        module = sys.modules[type(method).__module__]
        yield name, f"{_first(getattr(module, method.name, None) or module)} Leaves: {method.leaves}."


def _presets() -> Iterator[tuple[str, str]]:
    yield from module_named(PRESETS, "list presets").ABOUT.items()


def _families() -> Iterator[tuple[str, str]]:
    from fedsim.models import families

    for name in families():
        yield name, _first(importlib.import_module(f"fedsim.models.{name}"))


def _datasets() -> Iterator[tuple[str, str]]:
    from fedsim.data.config import EMBEDDED, KNOWN

    for name, kind in EMBEDDED.items():
        yield name, f"{kind}, comes with fedsim"
    for name, known in KNOWN.items():
        yield name, f"{known.kind}, in FEDSIM_DATA_DIR/{name}, or on the hub as {known.hub_name}"


def _models() -> Iterator[tuple[str, str]]:
    from fedsim.models.ladders import PUBLIC

    for name, public in PUBLIC.items():
        yield name, f"{public.family} {public.form}, {public.licence}: fedsim models fetch {name}"


def _devices() -> Iterator[tuple[str, str]]:
    from fedsim.devices import PROFILES

    for name, device in PROFILES.items():
        line = f"{device.down_mbps:g} Mbit/s down, {device.up_mbps:g} up"
        yield name, f"{device.flops / 1e9:,.0f} GFLOP/s, {device.memory_mb:,.0f} MB for training, {line}"


def _suites() -> Iterator[tuple[str, str]]:
    from fedsim.sweeps.suites import suites_of

    for name, make in suites_of(SUITES).items():
        yield name, _first(make)


def _first(thing: Any) -> str:
    """The first paragraph of its docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


# one run --------------------------------------------------------------------------------------------------------------


def show_command(options: argparse.Namespace, console: Console) -> int:
    directory = place(options.directory)
    results = load(directory)
    runs = {run["run_id"]: run for run in records(results.runs)}
    last = {row["run_id"]: row for row in records(results.rounds.sort_values("round"))}
    if options.run is None and len(runs) != 1:
        for run in runs.values():
            say(console, f"{run['run_id']}  {_named(run)}: {_state(run, last)}")
        return 0
    found = [run_id for run_id in runs if options.run is None or run_id.startswith(options.run)]
    if len(found) != 1:
        refuse("RUN_ID", options.run, f"a run, or the begin of one alone, of {directory}: {', '.join(runs) or 'none'}")
    run = runs[found[0]]
    say(console, f"{_named(run)}  run {run['run_id']}")
    for name, text in _lines(run, last).items():
        say(console, f"  {name:<24}{text}")
    say(console, json.dumps(json.loads(run["config"]), indent=2))
    return 0


def _named(run: Mapping[str, Any]) -> str:
    return f"{run['method']}, seed {run['seed']}, {run['dataset']}, {run['family']}"


def _state(run: Mapping[str, Any], last: Mapping[str, Mapping[str, Any]]) -> str:
    if run["status"] != "finished":
        return f"{run['status']}: {run['error']}"
    score = last[run["run_id"]]["accuracy_mean"] if run["run_id"] in last else float("nan")
    return f"finished, accuracy {percent(score)} %, {run['wall_seconds']:.0f} s"


def _lines(run: Mapping[str, Any], last: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What it was, what it cost and what came of it."""
    lines = {
        "state": _state(run, last),
        "participants": f"{run['participants']}, {run['cohort']} a round; {run['partition']}",
        "target": f"{run['model']}, {run['target_params']:,} parameters",
        "trained, mean": f"{run['trainable_params']:,.0f} parameters",
        "upload, mean": f"{run['bytes_per_upload'] / MEGABYTE:.3g} MB; leaves: {run['leaves'] or 'not said'}",
    }
    row = last.get(run["run_id"])
    if row is not None:
        lines["rounds"] = f"{row['round']} of {run['rounds']}"
        lines["sent, received"] = (
            f"{row['bytes_up_total'] / MEGABYTE:.3g} MB, {row['bytes_down_total'] / MEGABYTE:.3g} MB"
        )
        worst = f"worst {percent(row['accuracy_min'])} %"
        lines["accuracy"] = f"{percent(row['accuracy_mean'])} % of what participants deploy, mean; {worst}"
        lines["own labels"] = f"{percent(row['accuracy_local_mean'])} %"
        lines["loss"] = significant(row["loss_mean"])
        lines["state_sha256"] = row["state_sha256"]
    lines["computed by"] = run["command"] or "a call of fedsim.run"
    return lines
