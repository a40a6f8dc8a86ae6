"""What prepared data cost:  python benchmarks/prepared.py [MODULE:FUNCTION] [--set ...] [--images N --size S]

The data of an experiment, or random JPEGs of S x S pixels, N to train and a fifth of them to test, are prepared into a
cache of this measurement's own and read by fresh processes: seconds to prepare, seconds of a second start, the memory
of a process above its imports before and after it has read every row once, and an epoch of training a small ViT over
prepared rows against the same epoch over tensors in memory.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.options import check_json, check_numbers  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core import environment  # noqa: E402
from fedsim.core.seeding import generator  # noqa: E402
from fedsim.data import DataConfig, Split, load, prepared  # noqa: E402
from fedsim.experiment import load_experiments, with_settings  # noqa: E402
from fedsim.learning.task import Task, TaskConfig  # noqa: E402
from fedsim.models import Form  # noqa: E402


BATCH, TRAINED = 32, 960  # examples a step, and of an epoch
REPEATED = 3


def write_jpegs(folder: Path, images: int, size: int) -> DataConfig:
    """Random blots, which compress as photographs do."""
    for split, count in (("train", images), ("test", images // 5)):
        schema, rng = pa.schema({"image": pa.binary(), "label": pa.int64()}), np.random.default_rng(count)
        with pq.ParquetWriter(folder / f"{split}.parquet", schema) as writer:
            for first in range(0, count, 1000):
                rows = range(min(1000, count - first))
                batch = {"image": [_jpeg(rng, size) for _ in rows], "label": rng.integers(0, 10, len(rows))}
                writer.write_table(pa.table(batch, schema))
    return DataConfig(str(folder), image="image", label="label", image_size=size, channels=3)


def _jpeg(rng: np.random.Generator, size: int) -> bytes:
    blots = Image.fromarray(rng.integers(0, 256, (size // 8 + 1, size // 8 + 1, 3), np.uint8))
    buffer = io.BytesIO()
    blots.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def opened(config: DataConfig, data_dir: str | None) -> dict[str, float]:
    """In a fresh process: seconds to have the data, and MB above the imports, then and when all rows were read."""
    torch.set_num_threads(1)
    torch.zeros(8, 8).matmul(torch.zeros(8, 8))  # what computing brings along is no part of the data
    before, started = psutil.Process().memory_full_info().pss, time.perf_counter()
    data = load(config, data_dir)
    seconds, held = time.perf_counter() - started, psutil.Process().memory_full_info().pss
    for split in (data.train, data.test):
        for rows in torch.randperm(len(split)).split(BATCH):
            split.examples(rows)
    read = psutil.Process().memory_full_info().pss
    return {"opened_seconds": seconds, "mb_opened": (held - before) / 1e6, "mb_read": (read - before) / 1e6}


def epochs(config: DataConfig, data_dir: str | None) -> dict[str, float]:
    """In a fresh process: the best of a few epochs over prepared rows, and of the same over tensors in memory."""
    torch.set_num_threads(1)
    patch = max(config.image_size // 8, 1)
    task = Task(TaskConfig(config, "vit" if config.kind == "image" else "bert", patch_size=patch), None)
    data = load(config, data_dir)
    here = data.train.select(np.arange(min(TRAINED, len(data.train))))
    form = Form(64, 2)
    best = {"prepared": float("inf"), "memory": float("inf")}
    for _ in range(REPEATED):  # in turns
        for name, split in (
            ("prepared", here),
            ("memory", Split(dict(here.examples(torch.arange(len(here)))), here.labels)),
        ):
            tree = {key: tensor.requires_grad_() for key, tensor in task.fresh(form, 0).items()}
            optimizer, started = torch.optim.AdamW(tree.values(), fused=True), time.perf_counter()
            for rows in torch.randperm(len(split), generator=generator(0, "epoch")).split(BATCH):
                batch = task.batch(split, rows)
                optimizer.zero_grad()
                task.loss(task.forward(form, tree, batch), batch).backward()
                optimizer.step()
            best[name] = min(best[name], time.perf_counter() - started)
    return {"epoch_prepared": best["prepared"], "epoch_memory": best["memory"]}


def measured(config: DataConfig, data_dir: str | None) -> dict[str, Any]:
    """All figures of one data set, in a cache that is empty."""
    started = time.perf_counter()
    first = _elsewhere("opened", config, data_dir)
    figures: dict[str, Any] = {
        "prepared_seconds": first["opened_seconds"],
        "command_seconds": time.perf_counter() - started,
    }
    figures["mb_on_disk"] = sum(row.nbytes for row in prepared.kept()) / 1e6
    again = [_elsewhere("opened", config, data_dir) for _ in range(REPEATED)]
    figures |= min(again, key=lambda one: one["opened_seconds"]) | _elsewhere("epochs", config, data_dir)
    return figures | {"epoch_ratio": figures["epoch_prepared"] / figures["epoch_memory"]}


def _elsewhere(what: str, config: DataConfig, data_dir: str | None) -> dict[str, float]:
    code = f"import json; from benchmarks.prepared import *; print(json.dumps({what}({config!r}, {data_dir!r})))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(ended.stderr.strip().rpartition("\n")[2].removeprefix("ValueError: "))
    return json.loads(ended.stdout)


def _configs(options: argparse.Namespace, scratch: Path) -> Iterator[DataConfig]:
    if options.target is None:
        yield write_jpegs(scratch, options.images, options.size)
        return
    for experiment in load_experiments(options.target):
        data = with_settings(experiment, options.settings).task.data
        yield replace(data, sha256=None)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found.add_argument("target", nargs="?", metavar="MODULE:FUNCTION", help="whose data; none: random JPEGs")
    found.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="FIELD=VALUE")
    found.add_argument("--images", type=int, default=2000, metavar="N")
    found.add_argument("--size", type=int, default=224, metavar="S", help="pixels a side")
    found.add_argument("--json", metavar="FILE")
    return found


def command(options: argparse.Namespace, console: Console) -> int:
    check_numbers(options, "images", least=100)
    check_numbers(options, "size", least=8, most=1024)
    check_json(options)
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedsim-prepared-") as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        environment.use_cache_dir(f"{scratch}/cache")
        for config in _configs(options, source):
            prepared.clean()
            figures = measured(config, environment.data_dir())
            rows.append(
                {"data": config.name if options.target else f"{options.images} JPEGs of {options.size}"} | figures
            )
            for name, value in rows[-1].items():
                console.print(f"{name:>18}  {value if isinstance(value, str) else f'{value:.2f}'}", highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parser().parse_args(arguments), Console()
    return exit_status(lambda: command(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
