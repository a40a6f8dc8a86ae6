"""Whom tests of learning train: one participant that has all the data, or three that have little."""

import dataclasses

import pytest
import torch

from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.learning.meter import Meter, StepCost
from fedsim.learning.task import load_task
from tests.support.one_participant import CONFIG, FORM
from tests.support.small_federation import Federation
from tests.support.small_trainings import SLOW


@pytest.fixture(scope="module")
def counted() -> dict[tuple, StepCost]:
    return {}


@pytest.fixture
def ctx(counted: dict[tuple, StepCost]) -> ClientContext:
    task = load_task(CONFIG, None)
    assert task.dataset is not None
    return ClientContext(
        seed=0,
        round=1,
        task=task,
        intermediate=FORM,
        target=FORM,
        info=ClientInfo(0, "phone", FORM, len(task.dataset.train)),
        train=task.dataset.train,
        device=torch.device("cpu"),
        meter=Meter(counted),
    )


@pytest.fixture
def bf16(ctx: ClientContext) -> ClientContext:
    return dataclasses.replace(ctx, precision="bf16", meter=Meter(ctx.meter.counted))


@pytest.fixture
def federation(uncounted: None) -> Federation:
    return Federation(FedAvg(**SLOW))
