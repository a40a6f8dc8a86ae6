"""What growth does to a trained model before any further training: `python benchmarks/preservation.py [--json FILE]`.

A small model of every family is trained, then grown with every preset's untrained operator: in width by a whole and by
another ratio, in depth, and in all of it. Largest change of any logit that somebody reads (padding left out), and
change of the loss, on the test set.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from benchmarks.options import check_json, check_numbers  # noqa: E402
from fedgrow_algo.dual_ligo import grown, operator_between  # noqa: E402
from fedgrow_algo.presets import PRESETS  # noqa: E402
from fedsim.algorithm import ClientContext, ClientInfo  # noqa: E402
from fedsim.cli import exit_status  # noqa: E402
from fedsim.core.seeding import generator  # noqa: E402
from fedsim.core.tree import Tree  # noqa: E402
from fedsim.data.source import digits, pydoc  # noqa: E402
from fedsim.learning.meter import Meter  # noqa: E402
from fedsim.learning.objectives import TaskLoss  # noqa: E402
from fedsim.learning.task import Task, TaskConfig, load_task  # noqa: E402
from fedsim.learning.training import Training, train  # noqa: E402
from fedsim.models import Form, get_family  # noqa: E402


TEXTS = {"limit": 2000, "max_length": 48}
WINDOW = (("local_attention", 16),)  # of ModernBERT's local blocks: the released one is as long as these texts
TASKS = {
    "vit": TaskConfig(digits(), "vit", patch_size=2),
    "gpt2": TaskConfig(pydoc(**TEXTS), "gpt2"),
    "llama": TaskConfig(pydoc(**TEXTS), "llama"),
    "bert": TaskConfig(pydoc(**TEXTS, objective="masked_token"), "bert"),
    "deberta": TaskConfig(pydoc(**TEXTS, objective="masked_token"), "deberta"),
    "modernbert": TaskConfig(pydoc(**TEXTS, objective="masked_token"), "modernbert", settings=WINDOW),
}
GROWTHS = {
    "width x 2": Form(64, 2, heads=8, mlp=128),
    "width x 1.5": Form(48, 2, heads=6, mlp=96),
    "depth x 2": Form(32, 4, heads=4, mlp=64),
    "width x 1.5, depth x 2": Form(48, 4, heads=6, mlp=96),
}


def sized(family: str, form: Form, norm_eps: float | None = None) -> Form:
    """Llama with half as many heads of keys and values as of queries."""
    form = replace(form, norm_eps=norm_eps)
    return replace(form, kv_heads=form.heads // 2) if family == "llama" else form


def copied_epsilon(family: str, task: Task, small: Form, preset: str) -> float | None:
    """Copies keep a variance, so what is added to it stays; None: the family's own rule, which `preserving` needs."""
    config = get_family(family).config(small, task.inputs)
    return None if preset == "preserving" else get_family(family).form(config).norm_eps


def trained(task: Task, form: Form, epochs: int, seed: int = 0) -> Tree:
    """A small model trained on the whole training set."""
    assert task.dataset is not None
    split = task.dataset.train
    info = ClientInfo(0, "", form, len(split.labels))
    context = ClientContext(seed, 0, task, form, form, info, split, torch.device("cpu"), Meter({}))
    asked = Training(
        TaskLoss(task, form),
        task.fresh(form, seed),
        purpose="pretrain",
        lr=3e-3,
        epochs=epochs,
        batch_size=32,
        clip=1.0,
    )
    return train(context, asked).parameters


def measured(family: str, epochs: int) -> list[dict[str, Any]]:
    """One row a preset and growth of a family."""
    task, form = load_task(TASKS[family], None), sized(family, Form(32, 2, heads=4, mlp=64))
    assert task.dataset is not None
    small = trained(task, form, epochs)
    test = task.dataset.test.select(torch.arange(min(200, len(task.dataset.test))).numpy())
    before, score = logits(task, form, small, test), task.score(task.module(form, small), test)
    rows = []
    for preset in PRESETS:
        for growth, large in GROWTHS.items():
            large = sized(family, large, copied_epsilon(family, task, form, preset))
            row = {"family": family, "preset": preset, "growth": growth}
            try:
                operator = operator_between(preset, task, form, large)
            except ValueError as error:
                rows.append(row | {"refused": str(error)})
                continue
            tree = grown(operator, operator.init(generator(0, preset)), operator.stack(small))
            after = logits(task, large, tree, test)
            loss = task.score(task.module(large, tree), test).loss
            rows.append(
                row
                | {
                    "exact": PRESETS[preset].exact(operator),
                    "largest_change_of_a_logit": float((after - before).abs().max()),
                    "loss_small": score.loss,
                    "change_of_loss": loss - score.loss,
                }
            )
    return rows


@torch.no_grad()
def logits(task: Task, form: Form, tree: Tree, split) -> torch.Tensor:
    """Of every example, and, for texts, every position that holds a token."""
    batch = task.batch(split, torch.arange(len(split)), generator=generator(0, "mask"))
    values = task.forward(form, tree, batch)
    return values[batch["attention_mask"] == 1] if values.ndim == 3 else values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--family", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(arguments)
    return exit_status(lambda: measure(options), Console())


def measure(options: argparse.Namespace) -> int:
    check_numbers(options, "epochs", least=1)
    check_json(options)
    rows = [row for family in options.family for row in measured(family, options.epochs)]
    table = Table("family", "preset", *GROWTHS)
    for family in options.family:
        for preset in PRESETS:
            cells = {row["growth"]: row for row in rows if (row["family"], row["preset"]) == (family, preset)}
            table.add_row(family, preset, *(cell(cells[growth]) for growth in GROWTHS))
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    return 0


def cell(row: dict[str, Any]) -> str:
    """Largest change of a logit, change of the loss; `=` where the preset claims to be exact."""
    if "refused" in row:
        return "refused"
    claimed = " =" if row["exact"] else ""
    return f"{row['largest_change_of_a_logit']:.0e}, {row['change_of_loss']:+.2f}{claimed}"


if __name__ == "__main__":
    sys.exit(main())
