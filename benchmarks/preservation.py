"""What growth does to a trained model before any further training: `python benchmarks/preservation.py [--json FILE]`.

Small ViTs are trained on all of digits, then grown to the intermediate form and on to the target with operators as they
start, untrained. Accuracy on the test images, and the largest change of any logit.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file only
    sys.path.insert(0, str(ROOT))

from fedgrow_algo.dual_ligo import grown, operator_between  # noqa: E402
from fedgrow_algo.presets import PRESETS  # noqa: E402
from fedsim.algorithm import ClientContext, ClientInfo  # noqa: E402
from fedsim.data.source import digits  # noqa: E402
from fedsim.models import Form  # noqa: E402
from fedsim.seeding import generator  # noqa: E402
from fedsim.task import Task, TaskConfig, load_task  # noqa: E402
from fedsim.training import Meter, local_train  # noqa: E402
from fedsim.tree import Tree  # noqa: E402


SMALL = (Form(24, 1), Form(32, 2), Form(32, 3))
INTERMEDIATE, TARGET = Form(40, 3), Form(48, 4)


def trained(task: Task, form: Form, epochs: int, seed: int = 0) -> Tree:
    """A small model trained on the whole training set."""
    assert task.dataset is not None
    train = task.dataset.train
    info = ClientInfo(0, "", form, len(train.labels))
    context = ClientContext(seed, 0, task, INTERMEDIATE, TARGET, info, train, torch.device("cpu"), Meter("", {}))
    return local_train(
        context,
        lambda tree, batch: task.forward(form, tree, batch),
        task.fresh(form, seed),
        purpose="pretrain",
        lr=3e-3,
        epochs=epochs,
        batch_size=32,
        clip=1.0,
    )


def measured(form: Form, epochs: int) -> list[dict[str, Any]]:
    """One row a preset: accuracy of the small model, of the intermediate and of the target grown from it."""
    task = load_task(TaskConfig(digits(), patch_size=2), None)
    assert task.dataset is not None
    test, small = task.dataset.test, trained(task, form, epochs)
    batch = task.batch(test, torch.arange(len(test.labels)))
    with torch.no_grad():
        before = task.forward(form, small, batch)
    rows = []
    for preset in PRESETS:
        middle = grown_once(task, preset, small, form, INTERMEDIATE)
        large = grown_once(task, preset, middle, INTERMEDIATE, TARGET)
        with torch.no_grad():
            after = task.forward(TARGET, large, batch)
        rows.append(
            {
                "small": str(form),
                "preset": preset,
                "accuracy_small": accuracy(before, batch["labels"]),
                "accuracy_intermediate": task.score(task.module(INTERMEDIATE, middle), test).accuracy,
                "accuracy_target": accuracy(after, batch["labels"]),
                "largest_change_of_a_logit": float((after - before).abs().max()),
            }
        )
    return rows


def grown_once(task: Task, preset: str, tree: Tree, small: Form, large: Form) -> Tree:
    """The grown weights under an operator as it starts."""
    operator = operator_between(preset, task, small, large)
    return grown(operator, operator.init(generator(0, f"{preset} {small} {large}")), tree)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)
    rows = [row for form in SMALL for row in measured(form, options.epochs)]
    table = Table("small", "preset", "small, %", f"{INTERMEDIATE}, %", f"{TARGET}, %", "largest change of a logit")
    for row in rows:
        figures = [f"{100 * row[name]:.1f}" for name in ("accuracy_small", "accuracy_intermediate", "accuracy_target")]
        table.add_row(row["small"], row["preset"], *figures, f"{row['largest_change_of_a_logit']:.1e}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
