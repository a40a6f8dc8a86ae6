"""Numbers that a method wants in the tables."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.experiment import Experiment
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run


VALUES = {"half": 0.5, "nan": float("nan"), "inf": float("inf"), "text": "fast", "tensor": torch.ones(1), "bool": True}


@dataclasses.dataclass(frozen=True)
class Reporting(Algorithm):
    """Trains nothing and reports its id, and one of `VALUES` at client 1."""

    more: str = "half"

    @property
    def name(self) -> str:
        return "reporting"

    def server_init(self, ctx: Any) -> Any:
        return {}

    def server_broadcast(self, state: Any, cohort: Any, ctx: Any) -> Any:
        return {client.id: state for client in cohort}

    def server_aggregate(self, state: Any, updates: Any, ctx: Any) -> Any:
        assert [update.metrics for update in updates] == [{}] * 3, "no server reads them"
        return state

    def client_update(self, payload: Any, state: Any, ctx: Any) -> Any:
        metrics = {"id": ctx.info.id} | ({"more": VALUES[self.more]} if ctx.info.id == 1 else {})
        return ClientUpdate(ctx.info.id, {}, weight=ctx.info.id, metrics=metrics), state

    def client_model(self, payload: Any, state: Any, ctx: Any) -> Any:
        return ctx.task.module(ctx.info.form, ctx.task.fresh(ctx.info.form, 0))


def test_metrics_are_in_the_tables(tmp_path: Path, tiny_experiment: Experiment) -> None:
    """Of clients 0, 1 and 2, weighted by 0, 1 and 2: (1 * 1 + 2 * 2) / 3; what one alone reports is its own."""
    experiment = dataclasses.replace(tiny_experiment, algorithm=Reporting())
    found = fedsim.run(experiment, out=tmp_path, runtime="inline", numerics="native")
    assert found.rounds.metrics.isna().tolist() == [True, False, False], "nobody trains in round 0"
    assert json.loads(found.rounds.metrics[1]) == pytest.approx({"id": 5 / 3, "more": 0.5})
    clients = found.clients[found.clients["round"] == 1].metrics.map(json.loads).tolist()
    assert clients == [{"id": 0}, {"id": 1, "more": 0.5}, {"id": 2}]


@pytest.mark.parametrize("kind", [kind for kind in VALUES if kind != "half"])
def test_what_is_no_number_is_refused(kind: str, tmp_path: Path, tiny_experiment: Experiment) -> None:
    experiment = dataclasses.replace(tiny_experiment, algorithm=Reporting(more=kind))
    with pytest.raises(RuntimeError, match=r"ClientUpdate\.metrics\['more'\]=.*must be a finite number"):
        run(experiment, runtime=InlineRuntime(), out=tmp_path)
