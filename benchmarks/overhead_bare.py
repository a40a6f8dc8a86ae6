"""The training of `overhead_cases.work` without a simulator: `python -m benchmarks.overhead_bare DIR --json FILE`.

Two processes with one thread each build the same Hugging Face ViT and train it for half of the participants, one after
another, each from the same start: the same batches in the same order, the same optimiser. What they give is not sent
anywhere, averaged or stored. Time: from a barrier at which both are ready to the end of the later one.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.overhead_cases import work
from fedsim.algorithm import LocalTraining
from fedsim.core.seeding import generator
from fedsim.data.source import Split
from fedsim.engine.cohort import members
from fedsim.experiment import Experiment
from fedsim.learning.task import Task, load_task
from fedsim.models import get_family


PROCESSES = 2
ROUND = 2  # whose batches these are: the round of ours that is measured
READY_SECONDS = 300


def export(experiment: Experiment, folder: Path) -> None:
    """Write what can be trained without fedsim: examples in order of participants, start weights, settings."""
    task = load_task(experiment.task, None)
    assert task.dataset is not None
    shards = [task.dataset.train.select(member.train) for member in members(experiment, task)]
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", torch.cat([shard.inputs["pixel_values"] for shard in shards]).numpy())
    np.save(folder / "labels.npy", torch.cat([shard.labels for shard in shards]).numpy())
    start: dict[str, Any] = {name: tensor.numpy() for name, tensor in task.fresh(experiment.target, 0).items()}
    np.savez(folder / "start.npz", **start)
    config = get_family(experiment.task.family).config(experiment.target, task.inputs)
    bounds = np.cumsum([0, *(len(shard.labels) for shard in shards)]).tolist()
    about = {"config": config.to_dict(), "bounds": bounds, "training": training_of(experiment)}
    (folder / "work.json").write_text(json.dumps(about))


def training_of(experiment: Experiment) -> dict[str, Any]:
    """Learning rate, epochs, batch size and weight decay."""
    algorithm = experiment.algorithm
    assert isinstance(algorithm, LocalTraining) and algorithm.clip is None, "bare training does not clip gradients"
    return {name: getattr(algorithm, name) for name in ("lr", "epochs", "batch_size", "weight_decay")}


def train(
    model: nn.Module,
    start: Mapping[str, Tensor],
    task: Task,
    shard: Split,
    order: torch.Generator,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    weight_decay: float,
) -> None:
    """Train a model's parameters from `start`, as `fedsim.learning.training.train` trains a tree."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    total = 0.0
    for _ in range(epochs):
        for index in torch.randperm(len(shard.labels), generator=order).split(batch_size):
            batch = task.batch(shard, index)
            loss = F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index)  # as in any loop that reports its loss


def half(folder: Path, number: int, ready: Any) -> tuple[float, float]:
    """What one process does; when it began and when it ended."""
    torch.set_num_threads(1)
    experiment = work(folder)
    task, training = Task(experiment.task), training_of(experiment)
    model = get_family(experiment.task.family).build(experiment.target, task.inputs)
    images, labels = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("images", "labels"))
    start = {name: torch.from_numpy(array) for name, array in np.load(folder / "start.npz").items()}
    bounds = json.loads((folder / "work.json").read_text())["bounds"]
    todo = []
    for id_ in np.array_split(np.arange(len(bounds) - 1), PROCESSES)[number].tolist():
        rows = slice(bounds[id_], bounds[id_ + 1])
        shard = Split({"pixel_values": images[rows]}, labels[rows])
        todo.append((shard, generator(experiment.seed, "target/order", ROUND, id_)))

    few = Split({"pixel_values": images[:64]}, labels[:64])
    train(model, start, task, few, torch.Generator(), **training)  # what happens only once has then happened
    ready.wait(READY_SECONDS)
    begun = time.monotonic()
    for shard, order in todo:
        train(model, start, task, shard, order, **training)
    return begun, time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead_bare", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `export` has written")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, concurrent.futures.ProcessPoolExecutor(PROCESSES, spawn) as pool:
        ready = manager.Barrier(PROCESSES)
        tasks = [pool.submit(half, options.folder, number, ready) for number in range(PROCESSES)]
        times = [task.result() for task in tasks]
    seconds = max(end for _, end in times) - min(begun for begun, _ in times)
    options.json.write_text(json.dumps({"seconds": seconds, "each": [end - begun for begun, end in times]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
