"""What simulating costs beside the work itself: `python benchmarks/overhead.py [--only PART ...] [--json FILE]`.

This project, Flower's simulation and bare PyTorch are measured in turn, each in processes of its own, with two hosts
(actors, processes) of one thread. Of ours every round is hashed, checkpointed and stored, as always. Flower is
installed with pip into an environment of its own, which is kept for the next time.

- noop: 1,000 participants who send back 10 KB. - bulk: 20 who send back 40 MB; and memory.
- work: 50 who take 20 steps of a ViT, 6x128, on batches of 32. - first: from the command to the end of the first round.
- population: 100 participants a round, of 10,000 and of 100; and memory.
- nodes: whether four hosts on two nodes, one host, and inline give the same bits.

Seconds of a round: from one that is finished and on disk to the next, median over all but the first and the last of the
federated rounds. Nothing else should be running.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks import overhead_cases as cases  # noqa: E402
from benchmarks.options import check_json, check_numbers  # noqa: E402
from benchmarks.overhead_bare import export  # noqa: E402
from benchmarks.overhead_bench import Bench, flower_python, grown_mb, imports_mb, peak_mb  # noqa: E402
from benchmarks.overhead_cases import KILOBYTES_10, MEGABYTES_40, SHARD, WORKERS, write_images  # noqa: E402
from benchmarks.overhead_figures import POPULATIONS, Found, figures_of, lines_of, table_of  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import path_of, refuse  # noqa: E402
from fedsim.results.machine import versions  # noqa: E402
from fedsim.results.provenance import git_commit, hardware  # noqa: E402


DRIVER_IMPORTS = ("fedsim.simulation", "fedsim.runtime.ray_runtime")
AGGREGATOR_IMPORTS = ("fedsim.engine.aggregator", "fedsim.runtime.ray_runtime")


# measuring ------------------------------------------------------------------------------------------------------------


def noop(bench: Bench) -> Found:
    """1,000 participants of each."""
    ours = bench.ours("noop", "noop", "--data", small(bench))
    flower = bench.beside("noop", "--clients", "1000", "--numel", str(KILOBYTES_10), "--rounds", "8")
    return {"ours": steady(ours), "rows": rows(ours), "flower": steady(flower)} | about(flower)


def bulk(bench: Bench) -> Found:
    """20 participants of each; memory in runs of their own, for looking at it takes time."""
    words = ("--clients", "20", "--numel", str(MEGABYTES_40), "--rounds", "6")
    ours, flower = bench.ours("bulk", "bulk", "--data", small(bench)), bench.beside("bulk", *words)
    found: Found = {"ours": steady(ours), "rows": rows(ours), "flower": steady(flower)} | about(flower)
    ours = bench.ours("bulk, memory", "bulk", "--data", small(bench), memory=True)
    imports = {"driver": imports_mb(DRIVER_IMPORTS), "aggregator": imports_mb(AGGREGATOR_IMPORTS)}
    found["memory"] = {role: of_process(ours, role) | {"imports": imports[role]} for role in imports}
    flower = bench.beside("bulk, memory", *words, memory=True)
    if flower is not None:
        found["memory"]["flower"] = of_process(flower, "driver")
    return found


def work(bench: Bench) -> Found:
    """The same steps three times."""
    images, folder = bench.folder / "large", bench.folder / "work"
    if not folder.exists():
        bench.say("work: data")
        write_images(images, WORKERS * SHARD, 32, 3)
        export(cases.work(images), folder)
    ours = bench.ours("work", "work", "--data", str(images))
    bare = bench.bare("work", str(folder))
    flower = bench.beside("work", "--clients", str(WORKERS), "--work", str(folder), "--rounds", "3")
    return {"ours": steady(ours), "bare": [bare["seconds"]], "flower": steady(flower)} | about(flower)


def first(bench: Bench) -> Found:
    """Seconds from the command to the end of round 0, when everything is up, and to the end of round 1."""
    flower = bench.beside("first", "--clients", "20", "--numel", str(KILOBYTES_10), "--rounds", "1")
    found = {"ours": bench.first("without_model"), "vit": bench.first("with_vit")}
    return found | {"flower": flower and flower["finished"][1] - flower["started"]} | about(flower)


def population(bench: Bench) -> Found:
    """Rounds of both populations, then the larger one's memory."""
    found: Found = {}
    for size in POPULATIONS:
        words = ("--data", small(bench), "--participants", str(size))
        ours = bench.ours(f"population of {size:,}", "population", *words)
        found |= {f"of_{size}": steady(ours), "last": ours["finished"][-1] - ours["finished"][-2]}
    witness, size = bench.folder / "witness", POPULATIONS[-1]
    words = ("--data", small(bench), "--participants", str(size), "--witness", str(witness))
    ours = bench.ours(f"population of {size:,}, memory", "population", *words, memory=True)
    imports = {"driver": (*DRIVER_IMPORTS, "fedsim.models.vit"), "aggregator": AGGREGATOR_IMPORTS}
    found["memory"] = {role: of_process(ours, role) | {"imports": imports_mb(imports[role])} for role in imports}
    return found | {"witness": witness.read_text()}


def nodes(bench: Bench) -> Found:
    """The hashes of all rounds, however they were computed."""
    ways = {"two nodes": ("--nodes",), "one host": ("--hosts", "1"), "inline": ("--hosts", "0")}
    return {way: bench.ours(f"nodes, {way}", "mixed", *words)["state_sha256"] for way, words in ways.items()}


PARTS: Mapping[str, Callable[[Bench], Found]] = {
    part.__name__: part for part in (noop, bulk, work, first, population, nodes)
}


def small(bench: Bench) -> str:
    """The folder with two 8x8 images for each of the largest population; written when it is first asked for."""
    folder = bench.folder / "small"
    if not folder.exists():
        write_images(folder, 2 * max(POPULATIONS), 8, 1)
    return str(folder)


def steady(found: Found | None) -> list[float] | None:
    """Seconds of the federated rounds but the first and the last; `finished[r]`: when round r was."""
    if found is None:
        return None
    ends = found["finished"]
    return [ends[round] - ends[round - 1] for round in range(2, len(ends) - 1)]


def rows(found: Found) -> list[float]:
    """What the results say of the same rounds: rows cannot count the time that it takes to store them."""
    return found["wall_seconds"][2:-1]


def of_process(found: Found, role: str) -> dict[str, Any]:
    """MB of a process at its peak, and what it grew by since the first federated round began."""
    series = found["samples"][role]
    return {"peak": peak_mb(series), "grown": grown_mb(series, found["finished"][0])}


def about(flower: Found | None) -> Found:
    return {} if flower is None else {"flower_versions": flower["versions"]}


# the command ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    console = Console(width=120)
    options = parser().parse_args(arguments)
    return exit_status(lambda: measure(options, console), console)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="benchmarks/overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--only", nargs="+", default=[*PARTS], metavar="PART", help=f"some of {', '.join(PARTS)}")
    command.add_argument("--repeat", type=int, default=1, metavar="N", help="measure so many times, in turn")
    command.add_argument("--without-flower", action="store_true", help="leave Flower out")
    command.add_argument("--flower-env", default=".scratch/flower", metavar="DIR")
    command.add_argument("--json", metavar="FILE")
    return command


def measure(options: argparse.Namespace, console: Console) -> int:
    """Measure the chosen parts; a part that fails is reported at the end and stops no other."""
    check(options)
    errors = Console(stderr=True)

    def say(text: str) -> None:
        errors.print(text, highlight=False, markup=False, soft_wrap=True)

    before, failures = os.getloadavg()[0], []
    flower = None if options.without_flower else flower_python(options.flower_env, say)
    found: dict[str, list[Found]] = {part: [] for part in options.only}
    with tempfile.TemporaryDirectory(prefix="fedsim-overhead-") as folder:
        bench = Bench(Path(folder), flower, say)
        for _ in range(options.repeat):
            for part in found:
                try:
                    found[part].append(PARTS[part](bench))
                except ChildProcessError as error:
                    failures.append(f"{part}: {error}")
    figures = figures_of(found)
    console.print(table_of([line for line in lines_of(figures) if line.ours is not None]))
    if options.json is not None:
        about = {"git_commit": git_commit(), "versions": versions(), "hardware": hardware(), "load_before": before}
        options.json.write_text(json.dumps({**figures, "found": found, **about}, indent=2))
    for failure in failures:
        say(failure)
    return 1 if failures else 0


def check(options: argparse.Namespace) -> None:
    """**Raises:** `ValueError` for a bad argument, before anything is measured."""
    for part in options.only:
        if part not in PARTS:
            refuse("--only", part, f"one of {', '.join(PARTS)}")
    check_numbers(options, "repeat", least=1)
    check_json(options)
    options.flower_env = path_of(options.flower_env, "--flower-env")


if __name__ == "__main__":
    sys.exit(main())
