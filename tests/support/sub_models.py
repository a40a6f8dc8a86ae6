"""Federations of partial training: participants whose own forms are those of their sub-models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fedsim.testing
from baselines.fedavg import FedAvg
from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL, heterofl_clean
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.submodel import Cut, ScatterMean
from fedsim.core.tree import Tree
from fedsim.data.config import digits
from fedsim.data.dataset import Split
from fedsim.learning.coverage import covered_of, model_of, start
from fedsim.learning.rates import sub_form
from fedsim.learning.server_opt import AVERAGE
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import Form
from tests.support.cutting import Kept, kept_by
from tests.support.family_rows import ROWS, examples


VIT = TaskConfig(digits(limit=36), patch_size=4)
TARGET = Form(16, 2, heads=2, mlp=24)
RATES = (1.0, 1 / 2, 1 / 4)
LOCAL: dict[str, Any] = {"lr": 1e-2, "epochs": 1, "batch_size": 8, "rates": RATES}


def local(**changes: Any) -> dict[str, Any]:
    """Fields of local training."""
    return LOCAL | changes


METHODS: dict[str, Algorithm] = {
    "heterofl": HeteroFL(**LOCAL),
    "heterofl_clean": heterofl_clean(**LOCAL),
    "fedrolex": FedRolex(**LOCAL),
    "fedrolex-back": FedRolex(**LOCAL, step=-3, by_examples=True),
    "fjord": FjORD(**LOCAL),
    "federated_dropout": FederatedDropout(**LOCAL),
    "federated_dropout-half": FederatedDropout(**LOCAL, keep=0.5),
    "fedbrb_like": FedBRBLike(**LOCAL),
    "fedbrb_like-spread": FedBRBLike(**LOCAL, clock="spread", broadcast=0.0),
}
FEDAVG = FedAvg(**{name: value for name, value in LOCAL.items() if name != "rates"})


class Federation(fedsim.testing.Federation):
    """Participants of some rates, whose own forms are those of their sub-models. Shards of 6, 12, 18 digits in turn."""

    def __init__(
        self,
        algorithm: Algorithm,
        rates: Sequence[float] = RATES,
        task: Task | None = None,
        target: Form = TARGET,
        shards: Sequence[Split] | None = None,
        seed: int = 0,
    ) -> None:
        task = task or load_task(VIT, None)
        self.rates, self.forms = rates, [sub_form(task, target, rate) for rate in rates]
        shards = shards or shards_of_digits(task, len(rates))
        super().__init__(algorithm, self.forms, target, target, task=task, shards=shards, seed=seed)

    def payloads(self, round: int, cohort: Sequence[int] | None = None, state: Tree | None = None) -> dict[int, Tree]:
        chosen = [self.clients[id_] for id_ in (range(len(self.clients)) if cohort is None else cohort)]
        server = self.server if state is None else state
        sent = self.algorithm.server_broadcast(server, chosen, self.at_server(round))
        return {id_: dict(payload) for id_, payload in sent.items()}

    def model(self) -> Tree:
        return model_of(self.server)

    def kept(self, round: int, client: int) -> Kept:
        """Which coordinates a client has in a round, read off what it is sent."""
        form = sub_form(self.task, self.target, self.rate(client))
        extract = lambda tree: self.payloads(round, [client], start(tree, AVERAGE))[client]  # noqa: E731
        return kept_by(self.task, self.target, form, extract)

    def rate(self, client: int) -> float:
        keep = getattr(self.algorithm, "keep", None)
        return self.rates[client] if keep is None else keep

    def form(self, client: int) -> Form:
        return sub_form(self.task, self.target, self.rate(client))

    def pretend(self, round: int, values: Mapping[int, float]) -> None:
        """A round in which all that a client sends is one number."""
        sent = self.payloads(round, [*values])
        trees = {id_: {name: torch.full_like(t, values[id_]) for name, t in sent[id_].items()} for id_ in values}
        self.server = self.aggregate(round, [ClientUpdate(id_, trees[id_], self.weight(id_)) for id_ in values])

    def weight(self, client: int) -> int:
        """In a mean: examples, but for the methods whose papers count participants."""
        return self.clients[client].num_examples if getattr(self.algorithm, "by_examples", True) else 1

    def pretended_coverage(self, rounds: int) -> list[Tree]:
        """What was trained in each round, where everyone takes part and trains all it has."""
        state, covered = self.server, []
        for round in range(1, rounds + 1):
            updates = [ClientUpdate(id_, tree, 1.0) for id_, tree in self.payloads(round).items()]
            covered.append(covered_of(self.algorithm.server_aggregate(state, iter(updates), self.at_server(round))))
        return covered


def shards_of_digits(task: Task, number: int) -> list[Split]:
    assert task.dataset is not None
    index = torch.arange(36).numpy()
    parts = (index[:6], index[6:18], index[18:])
    return [task.dataset.train.select(parts[id_ % 3]) for id_ in range(number)]


def of_row(name: str, algorithm: Algorithm, rates: Sequence[float] = RATES, **fields: Any) -> Federation:
    """A federation of a row of families, in which everyone has the row's examples."""
    row = ROWS[name]
    shards = fields.pop("shards", [examples(row.task)] * len(rates))
    return Federation(algorithm, rates, row.task, fields.pop("target", row.larger), shards, **fields)


def close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], atol: float, but: str = " ") -> bool:
    assert left.keys() == right.keys()
    return all(torch.allclose(left[n], right[n], rtol=0, atol=atol) for n in left if but not in n)


def masks_of(cut: Cut, tree: Mapping[str, Tensor]) -> Tree:
    """1 where the sub-model has a coordinate, 0 elsewhere."""
    mean = ScatterMean(tree, cut.specs, cut.axes)
    mean.add(cut, cut.extract(tree), 1.0)
    return {name: mask.double() for name, mask in mean.covered().items()}
