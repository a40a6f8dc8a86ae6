"""Suites: functions that return the experiments of one comparison. Derive another by calling one and `replace`.

A function annotated `-> list[Experiment]` is a suite (`sweep.py --suite NAME`); one that returns a single Experiment is
for `fedsim run` and `fedsim inspect`. All experiments of a suite share everything but the algorithm (`baselines` has
two partitions), so every method meets the same federation.
"""

from dataclasses import replace
from typing import Any

from baselines.depthfl import DepthFL
from baselines.ensemble_small import EnsembleSmall
from baselines.exclusive import Exclusive
from baselines.fedavg import FedAvg, fedavg_mid, fedavg_small, fedprox
from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.flora import FLoRA
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.heterofl import HeteroFL, heterofl_clean
from baselines.local_only import LocalOnly
from baselines.lora import fedit, ffa_lora, hetlora
from baselines.progfed import ProgFed
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedsim.algorithm import Algorithm
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, digits
from fedsim.experiment import Experiment, Tier
from fedsim.models import Form
from fedsim.task import TaskConfig


def quick() -> list[Experiment]:
    """The demo: Fed-Grow with two presets, growth without federation, FedAvg, HeteroFL and FedBRB-like, on digits.

    Learning rates are those of `baselines`, chosen on validation scores of other seeds (`benchmarks/LOG.md`).
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
        replace(grow, preset="preserving", lr=1e-4, federate=False),
        FedAvg(lr=3e-3, epochs=2, batch_size=32),
        HeteroFL(lr=3e-3, epochs=2, batch_size=32),
        heterofl_clean(lr=3e-2, epochs=2, batch_size=32),
        FedBRBLike(lr=1e-3, epochs=2, batch_size=32),
    )
    return [replace(base, algorithm=algorithm) for algorithm in algorithms]


def baselines() -> list[Experiment]:
    """Every method on digits, with labels dealt unevenly (alpha 0.5) and evenly (alpha 100)."""
    base = replace(quick()[0], chunk=6)
    partitions = [Partition("dirichlet", alpha=alpha, min_size=40) for alpha in (0.5, 100.0)]
    return [
        replace(base, algorithm=algorithm, partition=partition)
        for partition in partitions
        for algorithm in _methods(_RATES)
    ]


def baselines_grid() -> list[Experiment]:
    """The learning rates tried for `baselines`: eight for every method; `benchmarks/tune.py` reads what they gave.

    Run it on other seeds than `baselines`. Fed-Grow's private stages have the rates of `quick`.
    """
    base = replace(quick()[0], chunk=6)
    return [
        replace(base, algorithm=each) for lr in (3e-5, *_GRID, 1e-1) for each in _methods(dict.fromkeys(_RATES, lr))
    ]


_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Learning rate of every method in `baselines`, by the name and preset it is reported under: the best of
# `baselines_grid` (`LOG.md`, 2026-11-21).
_RATES = {
    "fedgrow paper": 1e-2,
    "fedgrow preserving": 1e-3,
    "fedgrow_joint preserving": 3e-4,
    "fedgrow_no_federation paper": 1e-3,
    "fedgrow_no_federation preserving": 1e-4,
    "fedgrow_released_code paper": 1e-2,
    "fedavg": 3e-3,
    "fedavg_small": 3e-2,
    "fedavg_mid": 3e-3,
    "fedprox": 3e-3,
    "heterofl": 3e-3,
    "heterofl_clean": 3e-2,
    "fedrolex": 3e-2,
    "fjord": 3e-3,
    "federated_dropout": 3e-3,
    "fedbrb_like": 1e-3,
    "depthfl": 3e-3,
    "progfed": 1e-2,
    "grow_then_fedavg preserving": 3e-3,
    "exclusive": 3e-3,
    "ensemble_small": 1e-2,
    "local_only": 1e-2,
    "fedit": 3e-3,
    "ffa_lora": 3e-3,
    "flora": 1e-2,
    "hetlora": 1e-2,
}


def _methods(rates: dict[str, float]) -> list[Algorithm]:
    """Every method in `rates`, with its learning rate."""
    local: dict[str, Any] = {"epochs": 2, "batch_size": 32}
    small: dict[str, Any] = {"small_lr": 3e-3, "small_epochs": 15}
    staged: dict[str, Any] = local | small | {"local_lr": 3e-3, "local_epochs": 15}
    adapters: dict[str, Any] = local | {"rank": 4, "alpha": 8.0}
    methods: list[Algorithm] = [
        FedGrow(preset="paper", **staged),
        FedGrow(preset="preserving", **staged),
        FedGrowJoint(preset="preserving", **local, **small, local_lr=1e-3),
        FedGrow(preset="paper", federate=False, **staged),
        FedGrow(preset="preserving", federate=False, **staged),
        FedGrowReleasedCode(preset="paper", **staged),
        FedAvg(**local),
        fedavg_small(**local),
        fedavg_mid(**local),
        fedprox(**local),
        HeteroFL(**local),
        heterofl_clean(**local),
        FedRolex(**local),
        FjORD(**local),
        FederatedDropout(**local),
        FedBRBLike(**local),
        DepthFL(**local),
        ProgFed(**local),
        GrowThenFedAvg(preset="preserving", **local),
        Exclusive(share=0.3, **local, **small),
        EnsembleSmall(**local),
        LocalOnly(**local),
        fedit(**adapters),
        ffa_lora(**adapters),
        FLoRA(**adapters),
        hetlora(**adapters),
    ]
    named = {f"{method.name} {method.preset_name}".strip(): method for method in methods}
    return [replace(named[name], lr=lr) for name, lr in rates.items()]  # type: ignore[call-arg]


def cifar_subset() -> list[Experiment]:
    """The methods that matter most, on 3,000 images of CIFAR-10 (from FEDSIM_DATA_DIR)."""
    return [replace(_cifar(), algorithm=algorithm) for algorithm in _methods(_CIFAR_RATES)]


def cifar_subset_grid() -> list[Experiment]:
    """The learning rates tried for `cifar_subset`, as `baselines_grid`; scored after the last round alone."""
    base = replace(_cifar(), eval_every=10)
    return [replace(base, algorithm=each) for lr in _GRID for each in _methods(dict.fromkeys(_CIFAR_RATES, lr))]


# Learning rate of every method in `cifar_subset`, chosen on `cifar_subset_grid`.
_CIFAR_RATES = {
    "fedgrow paper": 1e-3,
    "fedgrow preserving": 1e-2,
    "fedavg": 3e-4,
    "fedavg_small": 1e-3,
    "fedavg_mid": 3e-4,
    "heterofl_clean": 1e-2,
    "fedbrb_like": 3e-2,
    "fedit": 1e-3,
}


def _cifar() -> Experiment:
    """What the runs of `cifar_subset` share."""
    data = DataConfig("cifar10", image_size=32, channels=3, num_classes=10, limit=3000)
    return replace(
        quick()[0],
        task=TaskConfig(data, patch_size=8),
        tiers=(Tier("phone", Form(32, 2)), Tier("tablet", Form(48, 2)), Tier("laptop", Form(48, 3))),
        intermediate=Form(64, 4),
        target=Form(96, 6, mlp=192),
        partition=Partition("dirichlet", alpha=0.5, min_size=100),
        participants=6,
        rounds=10,
        eval_every=2,
        chunk=6,
    )


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
