"""What leaks from what is sent, and what noise costs: the suites `leakage` and `leakage_epsilon` (`LOG.md`).

    fedsim sweep --suite leakage --seeds 0 1 2 --keep-updates --runtime inline --out results/leakage
    fedsim audit results/leakage

Everyone begins with one small public model, on three small tasks, and small models stay as they are brought: so what
is trained, and what could leak, is what federated rounds train. `leakage_epsilon` asks the same of five methods on
digits that are dealt evenly, whose participants take private steps (`ExampleDP`): noise is solved for from epsilon.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from benchmarks.federations import from_public, on_digits
from benchmarks.methods import methods
from benchmarks.study import AS_BROUGHT, changed, on_fashion, on_topics
from fedsim.data.partition import Partition
from fedsim.experiment import Experiment
from fedsim.privacy.accounting import noise_multiplier
from fedsim.privacy.example_dp import ExampleDP
from fedsim.privacy.pairs import Around


EPSILONS, DELTA = (8.0, 3.0, 1.0), 1e-3
BATCH, SHARD = 32, 155  # examples of a step in the mean, and of the smallest of six even shards
AS_ONE_EPOCH = AS_BROUGHT | {"epochs": 1, "batch_size": BATCH}
# On digits from the public model (`LOG.md`, 2026-11-30); `anchored` and `paper` as from scratch. Not tuned elsewhere.
RATES = {
    "fedgrow paper": 1e-2,
    "fedgrow preserving": 1e-3,
    "fedgrow_lowrank preserving": 1e-2,
    "fedgrow_residual preserving": 1e-3,
    "fedgrow_anchored preserving": 3e-4,
    "fedgrow_core preserving": 1e-2,
    "fedit": 1e-2,
    "fedavg": 3e-4,
}
NOISED = ("fedgrow preserving", "fedgrow_lowrank preserving", "fedgrow_core preserving", "fedit", "fedavg")


def leakage() -> list[Experiment]:
    """Fed-Grow and its variants, LoRA and FedAvg from one public model, without protection: digits, Fashion, text."""
    tasks: tuple[Callable[[], Experiment], ...] = (digits_from_public, few_images, few_pieces)
    return [
        replace(base(), algorithm=changed(method, AS_ONE_EPOCH))
        for base in tasks
        for method in methods(RATES)
        if method.name != "fedgrow_anchored" or base is not few_pieces  # which needs one class an example
    ]


def leakage_epsilon() -> list[Experiment]:
    """Five of them on digits, by private steps at epsilon 8, 3 and 1 for each participant, and without."""
    base = replace(digits_from_public(), partition=Partition("iid"))
    spent = {"delta": DELTA, "sampling_rate": BATCH / SHARD, "steps": base.rounds * math.ceil(SHARD / BATCH)}
    pairs = [ExampleDP(1.0, noise_multiplier(epsilon=epsilon, **spent), DELTA) for epsilon in EPSILONS]
    plain = [changed(method, AS_ONE_EPOCH) for method in methods({name: RATES[name] for name in NOISED})]
    private = [Around(method, (pair,)) for method in plain for pair in pairs]
    return [replace(base, algorithm=method) for method in [*plain, *private]]


def digits_from_public() -> Experiment:
    return from_public(on_digits())


def few_images() -> Experiment:
    """1,500 images of Fashion-MNIST."""
    base = on_fashion(ancestor=True)
    return replace(base, task=replace(base.task, data=replace(base.task.data, limit=1500, test_limit=1500)))


def few_pieces() -> Experiment:
    """1,500 pieces of CPython's reference text."""
    base = on_topics(ancestor=True)
    data = replace(base.task.data, limit=1500)
    return replace(base, task=replace(base.task, data=data), rounds=6, eval_every=3)
