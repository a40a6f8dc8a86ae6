"""Suites: functions that return the experiments of one comparison. Derive another by calling one and `replace`.

A function annotated `-> list[Experiment]` is a suite (`sweep.py --suite NAME`); one that returns a single Experiment is
for `fedsim run` and `fedsim inspect`. All experiments of a suite share everything but the algorithm, so every method
meets the same federation.
"""

from dataclasses import replace

from baselines.fedavg import FedAvg
from fedgrow_algo.fedgrow import FedGrow
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, digits
from fedsim.experiment import Experiment, Tier
from fedsim.models import Form
from fedsim.task import TaskConfig


def quick() -> list[Experiment]:
    """The demo: Fed-Grow with two presets, the same growth without federation, and FedAvg of the target, on digits.

    Learning rates were chosen on validation scores of seeds outside the demo's (`benchmarks/LOG.md`).
    """
    grow = FedGrow(
        preset="paper",
        lr=1e-2,
        epochs=2,
        local_lr=3e-3,
        local_epochs=15,
        small_lr=3e-3,
        small_epochs=15,
        batch_size=32,
    )
    base = Experiment(
        algorithm=grow,
        task=TaskConfig(digits(), patch_size=4),
        tiers=(
            Tier("phone", Form(24, 1), num_cpus=0.5),
            Tier("tablet", Form(32, 2), num_cpus=0.5),
            Tier("laptop", Form(32, 3), num_cpus=0.5),
        ),
        intermediate=Form(40, 3),
        target=Form(48, 4),
        partition=Partition("dirichlet", alpha=0.5, min_size=40),
        participants=6,
        rounds=10,
        chunk=3,
    )
    algorithms = (
        grow,
        replace(grow, preset="preserving", lr=1e-3),
        replace(grow, lr=1e-3, federate=False),
        replace(grow, preset="preserving", lr=1e-3, federate=False),
        FedAvg(lr=2e-3, epochs=2, batch_size=32),
    )
    return [replace(base, algorithm=algorithm) for algorithm in algorithms]


def tiny() -> Experiment:
    """One Fed-Grow run on digits that takes seconds: what parity, kill and resume checks use."""
    return Experiment(
        algorithm=FedGrow(
            preset="paper",
            lr=3e-3,
            local_lr=3e-3,
            local_epochs=5,
            small_lr=3e-3,
            small_epochs=5,
            batch_size=32,
        ),
        task=TaskConfig(digits(), patch_size=2),
        tiers=(
            Tier("phone", Form(16, 1), num_cpus=0.5),
            Tier("tablet", Form(24, 2), num_cpus=0.5),
            Tier("laptop", Form(24, 3), num_cpus=0.5),
        ),
        intermediate=Form(32, 3),
        target=Form(40, 4),
        partition=Partition("dirichlet", alpha=0.5, min_size=40),
        participants=3,
        rounds=3,
        chunk=2,
    )


def released_ladder() -> Experiment:
    """The sizes of the authors' released code: ViT 256 x {2,3,4} -> 320x4 -> 384x6. For `fedsim inspect`."""
    return _ladder(256, Form(320, 4, 8), Form(384, 6, 8))


def abstract_ladder() -> Experiment:
    """Sizes whose counts give the abstract's two figures, 73.01 % and 59.25 %: ViT 320 x {2,3,4} -> 384x4 -> 480x8."""
    return _ladder(320, Form(384, 4, 8), Form(480, 8, 8))


def _ladder(width: int, intermediate: Form, target: Form) -> Experiment:
    """CIFAR-100 at 224x224 in patches of 16, FFN ratio 1, hyperparameters of the released code."""
    return Experiment(
        algorithm=FedGrow(
            preset="paper",
            lr=5e-4,
            epochs=4,
            local_lr=5e-4,
            local_epochs=50,
            small_lr=5e-4,
            small_epochs=50,
            batch_size=64,
            weight_decay=0.05,
            clip=None,
        ),
        task=TaskConfig(DataConfig("cifar100", image_size=224, channels=3, num_classes=100), patch_size=16),
        tiers=tuple(Tier(f"{depth} layers", Form(width, depth, 8), num_gpus=0.25) for depth in (2, 3, 4)),
        intermediate=intermediate,
        target=target,
        partition=Partition("dirichlet", alpha=0.5),
        participants=12,
        rounds=200,
    )
