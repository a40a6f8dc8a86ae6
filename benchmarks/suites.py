"""Suites: functions that return the experiments of one comparison. Derive another by calling one and `replace`."""

from dataclasses import replace

from baselines.fedavg import FedAvg
from fedgrow_algo.fedgrow import FedGrow, fedgrow_no_federation
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, digits
from fedsim.experiment import Experiment, Tier
from fedsim.models import Form
from fedsim.task import TaskConfig


def tiny() -> Experiment:
    """One Fed-Grow run on digits that takes seconds: what parity, kill and resume checks use."""
    return Experiment(
        algorithm=FedGrow(
            preset="paper",
            lr=2e-3,
            local_lr=2e-3,
            local_epochs=2,
            small_lr=2e-3,
            small_epochs=3,
            batch_size=32,
        ),
        task=TaskConfig(digits(limit=400), patch_size=2),
        tiers=(
            Tier("small", Form(16, 1), num_cpus=0.5),
            Tier("medium", Form(24, 2), num_cpus=0.5),
            Tier("large", Form(24, 3), num_cpus=0.5),
        ),
        intermediate=Form(32, 3),
        target=Form(40, 4),
        partition=Partition("dirichlet", alpha=0.5, min_size=20),
        participants=3,
        rounds=3,
        chunk=2,
    )
