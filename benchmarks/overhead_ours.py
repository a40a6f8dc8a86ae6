"""What of `overhead.py` runs in processes of their own: `python -m benchmarks.overhead_ours PART --help`.

Each begins with nothing imported, ends its Ray, and leaves one JSON object: moments on the clock that all processes of
a machine share, and the hashes of what was computed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import overhead_cases as cases
from fedsim import load
from fedsim.engine.progress import ProgressListener
from fedsim.experiment import Experiment
from fedsim.runtime import Choice
from fedsim.sweeps.runner import locked, run_all


HOSTS = 2
NODES, CPUS_OF_NODE = 2, 2


class Stopwatch(ProgressListener):
    """Notes when each round was finished, with everything that belongs to it."""

    def __init__(self) -> None:
        self.finished_at: list[float] = []

    def finished(self, row: dict[str, Any]) -> None:
        self.finished_at.append(time.monotonic())


def timed(experiment: Experiment, out: Path, choice: Choice) -> dict[str, Any]:
    """Run an experiment. `finished`: when each round was on disk; `wall_seconds`: what its rows say."""
    watch = Stopwatch()
    with locked(out):
        failures = run_all([experiment], out=out, make_runtime=choice, progress=watch)
    if failures:
        raise failures[0]
    rounds = load(out).rounds.sort_values("round")
    return {
        "finished": watch.finished_at,
        "wall_seconds": rounds["wall_seconds"].tolist(),
        "state_sha256": rounds["state_sha256"].tolist(),
    }


def on_two_nodes(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Run an experiment, whose participants ask for a CPU each, with four hosts on two nodes of two CPUs."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_OF_NODE, "include_dashboard": False})
    try:
        for _ in range(NODES - 1):
            cluster.add_node(num_cpus=CPUS_OF_NODE)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = sum(node["Alive"] for node in ray.nodes())
        assert nodes == NODES, f"{nodes} nodes"
        return timed(experiment, out, Choice("ray", hosts=NODES * CPUS_OF_NODE))
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead_ours", description=__doc__)
    parser.add_argument("part", choices=["noop", "bulk", "work", "population", "mixed"])
    parser.add_argument("--data", type=Path, metavar="DIR", help="generated images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results folder")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--participants", type=int, default=100, metavar="N", help="population: how many there are")
    parser.add_argument("--witness", default="", metavar="FILE", help="population: see overhead_cases.NoOp")
    parser.add_argument("--hosts", type=int, default=HOSTS, metavar="N", help="0: inline")
    parser.add_argument("--nodes", action="store_true", help="four hosts on a cluster of two nodes")
    options = parser.parse_args(arguments)
    experiment = chosen(options)
    if options.nodes:
        found = on_two_nodes(experiment, options.out)
    else:
        found = timed(
            experiment, options.out, Choice("ray", hosts=options.hosts) if options.hosts else Choice("inline")
        )
    options.json.write_text(json.dumps(found))
    return 0


def chosen(options: argparse.Namespace) -> Experiment:
    if options.part == "mixed":
        return cases.mixed()
    if options.part == "population":
        return cases.population(options.data, options.participants, options.witness)
    return {"noop": cases.noop, "bulk": cases.bulk, "work": cases.work}[options.part](options.data)


if __name__ == "__main__":
    sys.exit(main())
