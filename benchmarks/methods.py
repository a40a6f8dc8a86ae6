"""The methods that suites compare, and their learning rates, chosen on validation scores (`LOG.md`)."""

import functools
from dataclasses import replace
from typing import Any

from baselines.analytic import Analytic
from baselines.depthfl import DepthFL
from baselines.ensemble_small import EnsembleSmall
from baselines.exclusive import Exclusive
from baselines.fedavg import FedAvg, fedavg_mid, fedavg_small, fedprox
from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedgh import FedGH
from baselines.fedkd import FedKD
from baselines.fedmrl import FedMRL
from baselines.fednova import FedNova
from baselines.fedproto import FedProto
from baselines.fedrolex import FedRolex
from baselines.fedsb import FedSB
from baselines.fedtgp import FedTGP
from baselines.fjord import FjORD
from baselines.flora import FLoRA
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.heterofl import HeteroFL, heterofl_clean
from baselines.lg_fedavg import LGFedAvg
from baselines.local_only import LocalOnly
from baselines.lora import fedit, ffa_lora, hetlora
from baselines.progfed import ProgFed
from baselines.scaffold import Scaffold
from fedgrow_algo.analytic import FedGrowAnalytic
from fedgrow_algo.anchored import FedGrowAnchored
from fedgrow_algo.core import FedGrowCore
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.fused import FedGrowFused
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.matched import FedGrowMatched
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm


RATE = {"analytic": "gamma"}  # what is tuned of a method that has no learning rate
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Learning rate of every method in `baselines`, by the name and preset it is reported under: the best of
# `baselines_grid` (`LOG.md`, 2026-11-21; of sub-models, adapters by device and the newest methods, 2026-11-30).
DIGITS = {
    "fedgrow paper": 1e-2,
    "fedgrow preserving": 1e-3,
    "fedgrow_lowrank preserving": 1e-2,
    "fedgrow_residual preserving": 3e-3,
    "fedgrow_anchored preserving": 3e-4,
    "fedgrow_matched preserving": 3e-4,
    "fedgrow_joint preserving": 3e-4,
    "fedgrow_no_federation paper": 1e-3,
    "fedgrow_no_federation preserving": 1e-4,
    "fedgrow_released_code paper": 1e-2,
    "fedgrow_analytic preserving": 3e-4,
    "fedgrow_core preserving": 1e-2,
    "fedgrow_core_warm preserving": 1e-2,  # as `fedgrow_core`: not tried by itself
    "fedgrow_fused preserving": 1e-2,
    "fedavg": 3e-3,
    "fedavg_small": 3e-2,
    "fedavg_mid": 3e-3,
    "fedprox": 3e-3,
    "scaffold": 3e-2,  # these two by SGD (`LOG.md`, 2026-11-29)
    "fednova": 1e-1,
    "heterofl": 3e-3,
    "heterofl_clean": 1e-3,
    "fedrolex": 3e-2,
    "fjord": 3e-3,
    "federated_dropout": 1e-2,
    "fedbrb_like": 3e-2,
    "depthfl": 3e-3,
    "progfed": 1e-2,
    "grow_then_fedavg preserving": 3e-3,
    "exclusive": 3e-3,
    "ensemble_small": 1e-2,
    "local_only": 1e-2,
    "lg_fedavg": 3e-3,
    "fedproto": 3e-3,
    "fedtgp": 3e-3,
    "fedgh": 3e-4,
    "fedit": 3e-3,
    "ffa_lora": 3e-3,
    "flora": 1e-2,
    "hetlora": 1e-2,
    "fedsb": 1e-2,
    "analytic": 1e-4,
    "fedkd": 1e-3,
    "fedmrl": 1e-3,
}
# Where everyone begins with the public digits-24x1 (`federations.from_public`), chosen on `quick_grid`
# (`LOG.md`, 2026-11-30). Fed-Grow's small models stay as they are brought, so that intermediate models are the same.
PUBLIC_DIGITS = {
    "fedgrow preserving": 1e-3,
    "fedgrow_no_federation preserving": 1e-3,
    "fedavg": 3e-4,
    "heterofl": 3e-3,
    "fedit": 1e-2,
    "local_only": 3e-4,
}
# Of every method in `cifar_subset`, chosen on `cifar_subset_grid`.
CIFAR = {
    "fedgrow paper": 1e-3,
    "fedgrow preserving": 1e-2,
    "fedavg": 3e-4,
    "fedavg_small": 1e-3,
    "fedavg_mid": 3e-4,
    "heterofl_clean": 1e-2,
    "fedbrb_like": 3e-3,
    "fedit": 1e-3,
}
# Of the methods in `text`, chosen on `text_grid`: sentences (SST-2; untried on AG News) and next tokens (pydoc).
SENTENCES = {
    "fedgrow paper": 1e-2,
    "fedgrow preserving": 1e-2,
    "fedgrow_no_federation paper": 1e-3,
    "fedgrow_no_federation preserving": 1e-3,
    "fedavg": 3e-4,
    "fedavg_small": 1e-3,
    "local_only": 3e-4,
    "hetlora": 1e-3,
    "fedit": 3e-2,
}
TOKENS = {
    "fedgrow paper": 1e-3,
    "fedgrow preserving": 3e-4,
    "fedgrow_no_federation paper": 3e-3,
    "fedgrow_no_federation preserving": 1e-3,
    "fedavg": 3e-3,
    "fedavg_small": 3e-2,
    "local_only": 3e-3,
    "hetlora": 1e-2,
    "fedit": 3e-3,
}


def methods(rates: dict[str, float]) -> list[Algorithm]:
    """Every method in `rates`, with its learning rate; `analytic` has none, and takes a gamma."""
    return [replace(named()[name], **{RATE.get(name, "lr"): rate}) for name, rate in rates.items()]  # type: ignore


@functools.cache
def named() -> dict[str, Algorithm]:
    """All of them, by name and preset."""
    local: dict[str, Any] = {"epochs": 2, "batch_size": 32}
    small: dict[str, Any] = {"small_lr": 3e-3, "small_epochs": 15}
    staged: dict[str, Any] = local | small | {"local_lr": 3e-3, "local_epochs": 15}
    adapters: dict[str, Any] = local | {"rank": 4, "alpha": 8.0}
    methods: list[Algorithm] = [
        FedGrow(preset="paper", **staged),
        FedGrow(preset="preserving", **staged),
        FedGrow(preset="preserving", rank=8, **staged),
        FedGrowResidual(preset="preserving", **staged),
        FedGrowAnchored(preset="preserving", **local, **small, local_lr=1e-3),
        FedGrowMatched(preset="preserving", **staged),
        FedGrowJoint(preset="preserving", **local, **small, local_lr=1e-3),
        FedGrow(preset="paper", federate=False, **staged),
        FedGrow(preset="preserving", federate=False, **staged),
        FedGrow(preset="preserving", federate=False, rank=8, **staged),
        FedGrowReleasedCode(preset="paper", **staged),
        FedGrowAnalytic(preset="preserving", rank=8, **staged),
        FedGrowCore(preset="preserving", **local),
        FedGrowCore(preset="preserving", warm_rounds=5, **local),
        FedGrowFused(preset="preserving", rank=8, **staged),
        FedAvg(**local),
        fedavg_small(**local),
        fedavg_mid(**local),
        fedprox(**local),
        Scaffold(**local),
        FedNova(**local),
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
        LGFedAvg(**local),
        FedProto(**local),
        FedTGP(weight=1.0, **local),
        FedGH(**local),
        fedit(**adapters),
        ffa_lora(**adapters),
        FLoRA(**adapters),
        hetlora(**adapters),
        FedSB(rank=16, **local),
        Analytic(random_features=128),
        FedKD(**local),
        FedMRL(**local),
    ]
    return {f"{method.name} {method.preset_name}".strip(): method for method in methods}
