"""How long a large results folder takes to become a summary table:  python benchmarks/loading.py [--json FILE]

Writes synthetic runs through the real writer (minutes), reads them back in a fresh process: seconds from `fedsim.load`
to the table, and the process's peak memory.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.options import check_json, check_numbers  # noqa: E402
from benchmarks.suites import baselines  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import path_of  # noqa: E402
from fedsim.experiment import Experiment  # noqa: E402
from fedsim.report.readings import read  # noqa: E402
from fedsim.report.tables import summary  # noqa: E402
from fedsim.results.tables import SCHEMAS, load, write_table  # noqa: E402


def write_runs(directory: Path, runs: int, rounds: int, participants: int) -> None:
    """Finished runs of `baselines` over as many seeds as it takes; every number in them is drawn at random."""
    suite, rng = baselines(), np.random.default_rng(0)
    numbered = itertools.islice(((seed, each) for seed in itertools.count() for each in suite), runs)
    for seed, experiment in track(list(numbered), description="writing", console=Console(stderr=True)):
        about = _about(experiment, seed)
        write_table(directory, "clients", about["run_id"], _clients(about, rounds, participants, rng))
        write_table(directory, "rounds", about["run_id"], _rounds(about, rounds, participants, rng))
        run = about | {"suite": "loading", "status": "finished", "wall_seconds": 1.0, "rounds": rounds, "error": None}
        run |= {"participants": participants, "cohort": participants, "code_sha256": "0" * 64, "versions": "{}"}
        run |= {"hardware": "{}", "bytes_per_upload": 1000, "model": str(experiment.target), "held_bytes": 1}
        run |= {"peak_bytes": 1, "federation_sha256": f"{seed:064x}", "upload_params": 1.0, "trainable_params": 1.0}
        write_table(directory, "runs", about["run_id"], [_filled("runs", run | {"target_params": 10})])


def _about(experiment: Experiment, seed: int) -> dict[str, Any]:
    config = experiment.canonical_json()
    return {
        "run_id": f"{seed:03d}{experiment.run_id}",
        "algorithm": experiment.algorithm.name,
        "preset": experiment.algorithm.preset_name or None,
        "dataset": experiment.task.data.name,
        "family": experiment.task.family,
        "partition": experiment.partition.scheme,
        "alpha": experiment.partition.alpha,
        "seed": seed,
        "config": config,
    }


def _rounds(about: dict[str, Any], rounds: int, participants: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    scores = [name for name in SCHEMAS["rounds"].names if name.startswith(("accuracy", "loss", "train_loss"))]
    rows = []
    for round_ in range(rounds + 1):
        row = {name: about[name] for name in ("run_id", "algorithm", "seed")} | {"round": round_, "retries": 0}
        row |= dict(zip(scores, rng.random(len(scores)).tolist(), strict=True))
        row |= {"stage": "federated" if round_ else "local", "participants": participants, "wall_seconds": 1.0}
        row |= {"bytes_up": 1000, "bytes_down": 1000, "flops": 10**9, "state_sha256": f"{round_:064x}", "failed": 0}
        rows.append(_filled("rounds", row | {f"bytes_{way}_total": 1000 * round_ for way in ("up", "down")}))
    return rows


def _clients(about: dict[str, Any], rounds: int, participants: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for round_, client in itertools.product(range(rounds + 1), range(participants)):
        accuracy, local, loss = rng.random(3).tolist()
        row = {name: about[name] for name in ("run_id", "algorithm", "seed")} | {"round": round_, "client": client}
        row |= {"tier": f"tier {client % 3}", "num_examples": 100, "accuracy": accuracy, "accuracy_local": local}
        row |= {"loss": loss, "bytes_up": 20, "bytes_down": 20, "retries": 0, "host": "0", "stage": "federated"}
        rows.append(_filled("clients", row))
    return rows


def _filled(table: str, row: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(SCHEMAS[table].names) | row


def measured(directory: Path) -> dict[str, float]:
    """Seconds from the files to the summary table, and this process's peak memory."""
    started = time.perf_counter()
    table = summary(read(load(directory)))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"loading_seconds": seconds, "loading_peak_mb": peak / 1e6, "rows": len(table)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, metavar="N")
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--participants", type=int, default=50, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--read", metavar="DIR", help="only read, a folder that is there already")
    options = parser.parse_args(arguments)
    return exit_status(lambda: measure(options), Console())


def measure(options: argparse.Namespace) -> int:
    check_numbers(options, "runs", "rounds", "participants", least=1)
    check_json(options)
    if options.read is not None:
        print(json.dumps(measured(path_of(options.read, "--read"))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), options.runs, options.rounds, options.participants)
        again = [sys.executable, __file__, "--read", folder]  # a process that has not written anything
        found = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
    rows = options.runs * (options.rounds + 1) * options.participants
    Console().print(
        f"{options.runs} runs, {rows:,} client rows: {found['loading_seconds']:.1f} s, peak memory "
        f"{found['loading_peak_mb']:.0f} MB, {found['rows']} methods",
        highlight=False,
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
