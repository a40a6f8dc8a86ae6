"""What DP-SGD costs: seconds of local training with it over seconds without. `python -m benchmarks.private_steps`

On digits, the demo's forms, batches of 32, one thread; processor time, the least of several, alternating.
"""

import time

import torch

from benchmarks.federations import on_digits
from benchmarks.methods import DIGITS, methods
from benchmarks.study import AS_BROUGHT, changed
from fedsim.algorithm import Algorithm
from fedsim.learning.task import load_task
from fedsim.privacy import Around, ExampleDP
from fedsim.testing import Federation


NAMES = (
    "fedavg",
    "fedavg_small",
    "fedit",
    "fedgrow preserving",
    "fedgrow_lowrank preserving",
    "fedgrow_core preserving",
)
TRIES, EXAMPLES, EPOCHS = 5, 256, 5


def seconds(federation: Federation, round: int) -> float:
    before = time.process_time()
    federation.update(round, 0)
    return time.process_time() - before


def measured(method: Algorithm) -> tuple[float, float]:
    """Milliseconds of a step, plain and private: of what more epochs take, so that what a call begins with is out."""
    base = on_digits()
    task, pair = load_task(base.task, None), ExampleDP(1.0, 1.0, 1e-5)
    few, more = (changed(method, {"epochs": epochs}) for epochs in (1, EPOCHS))
    federations = [
        Federation(each, (base.tiers[0].form,), base.target, base.middle, (EXAMPLES,), task)
        for each in (few, more, Around(few, (pair,)), Around(more, (pair,)))
    ]
    times = [[seconds(federation, round) for federation in federations] for round in range(1, 2 + TRIES)]
    least = [min(column) for column in zip(*times[1:], strict=True)]  # the first makes private states
    steps = (EPOCHS - 1) * -(-EXAMPLES // 32)
    return 1000 * (least[1] - least[0]) / steps, 1000 * (least[3] - least[2]) / steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| method | plain, ms a step | DP-SGD | ratio |\n|---|---:|---:|---:|")
    for method in methods({name: DIGITS[name] for name in NAMES}):
        plain, private = measured(changed(method, {**AS_BROUGHT, "batch_size": 32}))
        print(f"| {method.name} | {plain:.1f} | {private:.1f} | {private / plain:.1f} |", flush=True)
