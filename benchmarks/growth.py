"""What growing costs: `python benchmarks/growth.py [--ladder NAME ...] [--preset NAME ...] [--rank R ...] [--json F]`.

One training step of the grown model (grow, forward, backward, AdamW on the operator) against one plain training step of
the target (forward, backward, AdamW on its weights), on the same batch of random data. Time: steps of all variants take
turns in one process, after a warm-up; ratios of medians. Memory: each variant has a process of its own; the high-water
mark of its third step above what the process held before it made any model (on a GPU: of the device's allocations).
"growth" is the growth alone: grow, and back from given gradients of the grown weights to the operator's.

Paths: `planned` is what the project does; `recomputed` keeps nothing of the growth for the backward pass; `pairwise`
widens once per (target, source) pair of blocks, the way to avoid; `rank R` has maps of low rank (`--rank`).
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.options import check_json, check_numbers  # noqa: E402
from fedgrow_algo.dual_ligo import GrownLoss, of_rank, operator_between  # noqa: E402
from fedgrow_algo.ligo import Operator, widen  # noqa: E402
from fedgrow_algo.low_rank import LowRank  # noqa: E402
from fedgrow_algo.presets import PRESETS  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.fields import refuse  # noqa: E402
from fedsim.core.seeding import generator  # noqa: E402
from fedsim.core.submodel import join_fused  # noqa: E402
from fedsim.core.tree import State, Tree, to  # noqa: E402
from fedsim.data.config import DataConfig  # noqa: E402
from fedsim.engine.participant import peak_memory, reset_peak_memory  # noqa: E402
from fedsim.learning.task import Batch, Task, TaskConfig  # noqa: E402
from fedsim.models import Form  # noqa: E402


Step = Callable[[], float]
Variant = tuple[str, str]  # a path and a preset
PLAIN: Variant = ("plain", "")
RANK = "rank "  # begins the path of maps of low rank
PATHS = ("planned", "recomputed", "pairwise")  # the last two for `paper` alone


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A growth to measure: the task, both forms, and the batch size."""

    config: TaskConfig
    small: Form
    large: Form
    batch: int


def images() -> TaskConfig:
    """64 patches and a class token; CIFAR-100's sizes."""
    return TaskConfig(DataConfig("cifar100", image_size=32, channels=3, num_classes=100), "vit", patch_size=4)


def texts(length: int = 128) -> TaskConfig:
    """Tokens of the vocabulary of the released BERT models; AG News' classes."""
    data = DataConfig("ag_news", num_classes=4, max_length=length)
    return TaskConfig(data, "bert", settings=(("vocab_size", 30522), ("max_position_embeddings", 512)))


LADDERS = {
    "vit": Ladder(images(), Form(320, 4, 8), Form(384, 6, 8), 64),
    "bert": Ladder(texts(), Form(320, 4, 8), Form(384, 6, 8), 32),
    "minilm": Ladder(texts(32), Form(384, 6, 12, mlp=1536), Form(384, 8, 12, mlp=1536), 16),
    "bert-small-base": Ladder(texts(), Form(512, 6, 8, mlp=2048), Form(768, 12, 12, mlp=3072), 32),
}


def pairwise(operator: Any, tensors: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> Tree:
    """`W'[k] = sum_l w[k, l] B W[l] A^T`, every term computed apart: L1 x L2 widenings a role."""
    grown: Tree = {}
    for name, spec in operator.large_parts.items():
        dims = [(position, dim) for position, dim in enumerate(spec.parsed, start=1) if dim.axes]
        blocks = stacked[spec.role][:, None] if spec.layer is not None else stacked[name][None, None]
        terms = []
        for source, block in enumerate(blocks):
            for position, dim in dims:
                matrix = operator.matrix(tensors, dim)
                block = widen(block, matrix[source] if matrix.ndim == 3 else matrix, position)
            weight = tensors[f"depth.{spec.module}"][spec.layer, source] if spec.layer is not None else 1.0
            terms.append(weight * block[0])
        grown[name] = torch.stack(terms).sum(0)
    return join_fused(grown, operator.large)


def example(task: Task, size: int, device: torch.device) -> Batch:
    """Random data of the right shapes."""
    batch, draw = task.example(size), generator(0, "example")
    if "pixel_values" in batch:
        batch["pixel_values"] = torch.rand(batch["pixel_values"].shape, generator=draw)
    else:
        vocabulary = dict(task.inputs.settings).get("vocab_size", task.inputs.vocab_size)
        batch["input_ids"] = torch.randint(int(vocabulary or 0), batch["input_ids"].shape, generator=draw)
    batch["labels"] = torch.randint(task.inputs.num_classes, batch["labels"].shape, generator=draw)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def rank_of(variant: Variant) -> int | None:
    return int(variant[0].removeprefix(RANK)) if variant[0].startswith(RANK) else None


def start_of(ladder: Ladder, variant: Variant, device: torch.device) -> tuple[Task, Operator | LowRank, Tree, State]:
    """The operator of a variant, its tensors and the small model it grows."""
    task = Task(ladder.config)
    operator = of_rank(rank_of(variant), variant[1], task, ladder.small, ladder.large)
    small = operator.prepared(operator.stack(task.fresh(ladder.small, 0)), operator.drawn(generator(0, "global")))
    return task, operator, to(operator.init(generator(0, "global")), device), to(small, device)


def step_of(ladder: Ladder, variant: Variant, device: torch.device, bf16: bool, compiled: bool) -> Step:
    """A function that takes one training step and returns its seconds. `variant`: a path and a preset, or `PLAIN`."""
    if variant == PLAIN:
        task = Task(ladder.config)
        tensors = task.fresh(ladder.large, 0)
        forward = lambda tree, batch: task.forward(ladder.large, tree, batch)  # noqa: E731
    else:
        task, operator, tensors, stacked = start_of(ladder, variant, device)
        again = variant[0] == "recomputed"
        grown = GrownLoss(task, variant[1], ladder.small, ladder.large, again, rank_of(variant))
        forward = lambda tree, batch: grown.logits(tree, stacked, batch)  # noqa: E731
        if variant[0] == "pairwise":
            forward = lambda tree, batch: task.forward(ladder.large, pairwise(operator, tree, stacked), batch)  # noqa: E731
    task.skeleton(ladder.large).to(device)
    if compiled:
        forward = torch.compile(forward)
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    batch = example(task, ladder.batch, device)
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-4, fused=True)

    def step() -> float:
        started = now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = task.loss(forward(leaves, batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return now(device) - started

    return step


def growth_of(ladder: Ladder, variant: Variant, device: torch.device, bf16: bool, compiled: bool) -> Step:
    """A function that grows once, forward and backward, and returns its seconds."""
    _, operator, tensors, stacked = start_of(ladder, variant, device)
    grow = (lambda leaves, tree: pairwise(operator, leaves, tree)) if variant[0] == "pairwise" else operator.grow
    grow = torch.compile(grow) if compiled else grow
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with torch.no_grad():
        given = {name: torch.ones_like(tensor) for name, tensor in operator.grow(leaves, stacked).items()}

    def step() -> float:
        started = now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            grown = {name: tensor for name, tensor in grow(leaves, stacked).items() if tensor.requires_grad}
        torch.autograd.backward([*grown.values()], [given[name].to(tensor) for name, tensor in grown.items()])
        elapsed = now(device) - started
        for leaf in leaves.values():
            leaf.grad = None
        return elapsed

    return step


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(taken: Mapping[Variant, Step], steps: int) -> dict[Variant, float]:
    """Median seconds of a step of each variant: in turns, so that whatever else happens meets all of them."""
    noted: dict[Variant, list[float]] = {variant: [] for variant in taken}
    for number in range(steps + 1):
        for variant, step in taken.items():
            elapsed = step()
            if number:
                noted[variant].append(elapsed)
    return {variant: statistics.median(times) for variant, times in noted.items()}


def peak_bytes(ladder_name: str, variant: Variant, options: dict, threads: int) -> int:
    """Memory of one variant's step, measured in a process of its own."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(_peak_bytes_here, (ladder_name, variant, options, threads))


def _peak_bytes_here(ladder_name: str, variant: Variant, options: dict, threads: int) -> int:
    torch.set_num_threads(threads)
    ladder, device = LADDERS[ladder_name], options["device"]
    Task(ladder.config).skeleton(Form(8, 1, 2))  # imports the model's classes
    before = 0 if device.type == "cuda" else resident_bytes()
    step = step_of(ladder, variant, **options)
    for _ in range(2):
        step()
    reset_peak_memory(device)
    step()
    peak = peak_memory(device)
    assert peak is not None
    return peak - before


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def measured(
    name: str, presets: Sequence[str], paths: Sequence[str], steps: int, options: dict
) -> list[dict[str, Any]]:
    """One row a variant of a ladder, ratios against the plain step."""
    ladder, task = LADDERS[name], Task(LADDERS[name].config)
    variants: list[Variant] = [PLAIN]
    for preset in presets:
        try:
            operator_between(preset, task, ladder.small, ladder.large)
        except ValueError as error:
            print(f"{name}: {preset} left out: {error}", file=sys.stderr)
            continue
        variants += [(path, preset) for path in paths if preset == "paper" or path not in ("recomputed", "pairwise")]
    # Before this process has grown: a process counts what the one that started it held as its own high-water mark.
    memory_of = {variant: peak_bytes(name, variant, options, torch.get_num_threads()) for variant in variants}
    time_of = seconds({variant: step_of(ladder, variant, **options) for variant in variants}, steps)
    grown = [variant for variant in variants if variant not in (PLAIN, ("recomputed", "paper"))]
    growth_time_of = seconds({variant: growth_of(ladder, variant, **options) for variant in grown}, steps)
    return [
        {
            "ladder": name,
            "preset": preset,
            "path": path,
            "time_ratio": time_of[path, preset] / time_of[PLAIN],
            "memory_ratio": memory_of[path, preset] / memory_of[PLAIN],
            "seconds": time_of[path, preset],
            "growth_seconds": growth_time_of.get((path, preset)),
            "peak_bytes": memory_of[path, preset],
        }
        for path, preset in variants
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", nargs="+", choices=[*LADDERS], default=[*LADDERS])
    parser.add_argument("--preset", nargs="+", choices=[*PRESETS], default=[*PRESETS])
    parser.add_argument("--path", nargs="+", choices=PATHS, default=[*PATHS])
    parser.add_argument("--rank", nargs="+", type=int, default=[], help="maps of these ranks, too")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each variant")
    parser.add_argument("--threads", type=int, default=0, help="threads on a CPU; 0: as many as torch takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="forward passes under autocast")
    parser.add_argument("--compile", action="store_true", help="forward passes through torch.compile")
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: measure(chosen), Console())


def measure(chosen: argparse.Namespace) -> int:
    check_numbers(chosen, "steps", least=1)
    check_numbers(chosen, "threads", least=0, most=1024)
    for rank in chosen.rank:
        if rank < 1:
            refuse("--rank", rank, "at least 1")
    paths = [*chosen.path, *(f"{RANK}{rank}" for rank in chosen.rank)]
    check_json(chosen)
    device = device_of(chosen.device)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    options = {"device": device, "bf16": chosen.bf16, "compiled": chosen.compile}
    rows = []
    for name in chosen.ladder:
        rows += measured(name, chosen.preset, paths, chosen.steps, options)
    table = Table("ladder", "path", "preset", "seconds", "time", "growth, s", "MB", "memory")
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        growth = "" if row["growth_seconds"] is None else f"{row['growth_seconds']:.3f}"
        figures = (f"{row['seconds']:.3f}", f"{row['time_ratio']:.2f}x", growth, f"{row['peak_bytes'] / 1e6:.0f}")
        table.add_row(row["ladder"], row["path"], row["preset"], *figures, f"{row['memory_ratio']:.2f}x")
    Console(width=100).print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows}, indent=2))
    return 0


def device_of(name: str) -> torch.device:
    """**Raises:** `ValueError` for a device that this machine does not have."""
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        refuse("--device", name, f"a device of this machine that torch computes on ({str(error).splitlines()[0]})")


if __name__ == "__main__":
    sys.exit(main())
