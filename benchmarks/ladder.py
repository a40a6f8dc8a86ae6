"""Small public models:  python benchmarks/ladder.py --out DIR [--data NAME] [--seed 0] [--epochs N] [--public N]

Trained on the first training examples of a data set, which then are public: experiments whose participants start from
one say so by `skip`, and nobody holds them. Each is saved as a folder that `transformers` loads, with a README. A seed
and a kind of processor decide all bits.

- fashion_mnist: ViTs of two sizes, on 3,000 images of Fashion-MNIST (`FEDSIM_DATA_DIR/fashion_mnist`).
- pydoc: GPT-2s of two sizes, on 4,000 pieces of CPython's reference text: its first topics.
- digits: one ViT, the smallest of the demo's forms, on 400 digits; `benchmarks/public` holds what this gave.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.options import check_numbers  # noqa: E402
from fedsim.algorithm import ClientContext, ClientInfo  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core import environment, numerics  # noqa: E402
from fedsim.core.fields import path_of, refuse  # noqa: E402
from fedsim.core.seeding import derive  # noqa: E402
from fedsim.core.terminal import say  # noqa: E402
from fedsim.core.tree import Tree, numel  # noqa: E402
from fedsim.data import digits, fashion_mnist, load, pydoc  # noqa: E402
from fedsim.learning.meter import Meter  # noqa: E402
from fedsim.learning.objectives import TaskLoss  # noqa: E402
from fedsim.learning.task import Task, TaskConfig, load_task  # noqa: E402
from fedsim.learning.training import Training, train  # noqa: E402
from fedsim.models import Form  # noqa: E402
from fedsim.results.export import write  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What is trained, and on which data. - `public`: so many first images. - `source`: of the data, for the README."""

    forms: dict[str, Form]
    task: TaskConfig
    public: int
    epochs: int
    batch_size: int
    source: str


LADDERS = {
    "fashion_mnist": Ladder(
        {  # heads of 8 and an FFN of twice the width: each grows into the next
            "vit-24x1": Form(24, 1, heads=3, mlp=48),
            "vit-32x2": Form(32, 2, heads=4, mlp=64),
        },
        TaskConfig(fashion_mnist(), "vit", patch_size=7),  # crops and flips cost so small and short a training accuracy
        public=3000,
        epochs=30,
        batch_size=64,
        source="Fashion-MNIST (Xiao et al., 2017; MIT licence)",
    ),
    "pydoc": Ladder(
        {"gpt2-24x1": Form(24, 1, heads=3, mlp=48), "gpt2-32x2": Form(32, 2, heads=4, mlp=64)},
        TaskConfig(pydoc(max_length=32), "gpt2"),
        public=4000,
        epochs=10,
        batch_size=32,
        source="CPython's reference text, 32 bytes each (PSF licence)",
    ),
    "digits": Ladder(
        {"digits-24x1": Form(24, 1)},
        TaskConfig(digits(), "vit", patch_size=4),
        public=400,
        epochs=60,
        batch_size=32,
        source="scikit-learn's digits (Alpaydin and Kaynak, 1998; CC BY 4.0)",
    ),
}
PROCESSES = 2  # at once, of one thread each
README = """# {name}

A {family}, {form}: {parameters:,} parameters, heads of {form.head_size}, FFN {form.inner} wide{patches}.
Trained on the first {public:,} training examples of {source}, {epochs} epochs.
Accuracy on its {tested:,} test examples: {accuracy:.2%}.

Made by `python benchmarks/ladder.py --data {data} --seed {seed} --epochs {epochs} --public {public}`.
Experiments that start from it leave those images out:

    tier = fedsim.from_pretrained("phone", "{model}", "FOLDER/{name}")
    task = fedsim.TaskConfig(fedsim.data.{data}({more}skip={public}), "{model}"{size})
"""
FAMILIES = {"vit": "Vision Transformer", "gpt2": "GPT-2 that reads bytes"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status as `fedsim`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder a model is written below it")
    parser.add_argument("--data", choices=LADDERS, default="fashion_mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the public examples")
    parser.add_argument("--public", type=int, metavar="N", help="train on the first N training examples")
    options, console = parser.parse_args(arguments), Console()
    return exit_status(lambda: train_all(options, console), console)


def train_all(options: argparse.Namespace, console: Console) -> int:
    ladder = LADDERS[options.data]
    options.epochs = ladder.epochs if options.epochs is None else options.epochs
    options.public = ladder.public if options.public is None else options.public
    check_numbers(options, "seed", least=0)
    check_numbers(options, "epochs", "public", least=1)
    options.out = path_of(options.out, "--out")
    numerics.settle(None, here=False, say=lambda text: say(console, text))
    examples = len(load(ladder.task.data, environment.data_dir()).train)
    if options.public >= examples:
        refuse("--public", options.public, f"below {examples}, or nothing is left for participants")
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:  # the largest begins first
        for line in pool.map(train_one, [options] * len(ladder.forms), reversed(ladder.forms)):
            say(console, line)
    return 0


def train_one(options: argparse.Namespace, name: str) -> str:
    """Train one of the models and write its folder. **Returns:** how good it is, and where."""
    torch.set_num_threads(1)  # decides the order of sums
    logging.disable_progress_bar()
    ladder = LADDERS[options.data]
    task, form = load_task(ladder.task, environment.data_dir()), ladder.forms[name]
    assert task.dataset is not None
    tree = trained(task, form, [*ladder.forms].index(name), ladder.batch_size, options)
    module: Any = task.module(form, tree)
    accuracy = task.score(module, task.dataset.test).accuracy
    about = {"name": name, "form": form, "parameters": numel(tree), "accuracy": accuracy}
    about |= {"source": ladder.source, "tested": len(task.dataset.test)}
    model, patch, length = ladder.task.family, ladder.task.patch_size, ladder.task.data.max_length
    image = model == "vit"
    about |= {"model": model, "family": FAMILIES[model], "patches": f", patches of {patch}" if image else ""}
    about |= {"size": f", patch_size={patch}" if image else "", "more": "" if image else f"max_length={length}, "}
    data = dataclasses.replace(ladder.task.data, class_names=task.dataset.class_names)
    write(module, data, README.format(**about, **vars(options)), options.out / name)
    return f"{name}: test accuracy {accuracy:.2%}, {time.process_time():.0f} s of a core, in {options.out / name}"


def trained(task: Task, form: Form, number: int, batch_size: int, options: argparse.Namespace) -> Tree:
    """The parameters of one of the models."""
    assert task.dataset is not None
    public = task.dataset.train.select(np.arange(options.public))
    info = ClientInfo(number, "public", form, len(public))
    ctx = ClientContext(options.seed, 0, task, form, form, info, public, torch.device("cpu"), Meter({}))
    start = task.fresh(form, derive(options.seed, "ladder", client=number))
    asked = Training(
        TaskLoss(task, form),
        start,
        purpose="ladder",
        lr=2e-3,
        epochs=options.epochs,
        batch_size=batch_size,
        weight_decay=0.05,
        clip=1.0,
        schedule="cosine",
        lr_warmup=0.1,
    )
    parameters = train(ctx, asked).parameters
    return {name: tensor for name, tensor in parameters.items() if isinstance(tensor, torch.Tensor)}


if __name__ == "__main__":
    sys.exit(main())
