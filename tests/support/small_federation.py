"""A federation that a test can run by hand: three participants with 6, 12 and 18 digits, of one form or of three."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedsim.simulation
from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate, ServerContext
from fedsim.core.tree import Tree, clone, ordered
from fedsim.data.config import Split, digits
from fedsim.learning.task import TaskConfig, load_task, subset
from fedsim.learning.training import Meter, StepCost
from fedsim.models import Form


SMALL, MEDIUM, MIDDLE, TARGET = (Form(*size, heads=2) for size in ((8, 1), (16, 2), (12, 2), (16, 4)))
ALIKE, UNLIKE = (SMALL,) * 3, (SMALL, MEDIUM, TARGET)
SIZES = (6, 12, 18)
LOCAL: dict[str, Any] = {"lr": 1e-2, "epochs": 1, "batch_size": 8}


def without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a step takes longer than trainings of this size. What stands in for it must not be remembered."""
    monkeypatch.setattr(fedsim.simulation, "COUNTED", {})
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *arguments: StepCost((0, 0), (1, 1))))


class Federation:
    """Participants and a server in one place. As on the platform, what is received, sent and kept is copied.

    - `forms`: of the participants' small models. - `server`: the server's state; a test may put another there.
    """

    def __init__(self, algorithm: Algorithm, forms: Sequence[Form] = ALIKE, target: Form = TARGET) -> None:
        self.algorithm, self.target = algorithm, target
        self.task = load_task(TaskConfig(digits(limit=sum(SIZES)), patch_size=4), None)
        assert self.task.dataset is not None
        index = torch.arange(sum(SIZES)).split(SIZES)
        self.shards = [subset(self.task.dataset.train, part.numpy()) for part in index]
        self.clients = [
            ClientInfo(id_, "phone", form, size) for id_, (form, size) in enumerate(zip(forms, SIZES, strict=True))
        ]
        algorithm.check(self.task, forms, MIDDLE, target)
        self.server = ordered(algorithm.server_init(self.at_server(0)))
        self.private: dict[int, Tree] = {}
        self.work: dict[int, Meter] = {}

    def at_server(self, round: int) -> ServerContext:
        return ServerContext(0, round, self.task, MIDDLE, self.target, self.clients)

    def at_client(self, round: int, client: int, device: str = "cpu", empty: bool = False) -> ClientContext:
        self.work[client] = Meter("", {})
        return ClientContext(
            seed=0,
            round=round,
            task=self.task,
            intermediate=MIDDLE,
            target=self.target,
            info=self.clients[client],
            train=Split({}, torch.zeros(0, dtype=torch.long)) if empty else self.shards[client],
            device=torch.device(device),
            meter=self.work[client],
            forms=tuple({info.form: None for info in self.clients}),
        )

    def state(self, client: int) -> Tree:
        """A participant's private state."""
        if client not in self.private:
            self.private[client] = clone(self.algorithm.client_init(self.at_client(0, client)))
        return self.private[client]

    def payload(self, round: int, client: int) -> Tree:
        sent = self.algorithm.server_broadcast(self.server, [self.clients[client]], self.at_server(round))
        return clone(sent[client])

    def update(self, round: int, client: int) -> ClientUpdate:
        state, context = self.state(client), self.at_client(round, client)
        update, kept = self.algorithm.client_update(self.payload(round, client), state, context)
        self.private[client] = clone(kept)
        return ClientUpdate(client, clone(update.tree), update.weight)

    def aggregate(self, round: int, updates: Sequence[ClientUpdate], chunk: int = 2) -> Tree:
        """The server's next state; as on the platform, updates are first added up in chunks, where they can be."""
        arriving: list[Any] = []
        for start in range(0, len(updates), chunk):
            part = list(updates[start : start + chunk])
            combined = self.algorithm.combine(part)
            arriving += part if combined is None else [combined]
        return ordered(self.algorithm.server_aggregate(self.server, iter(arriving), self.at_server(round)))

    def run(self, round: int, cohort: Sequence[int] = (0, 1, 2)) -> list[ClientUpdate]:
        """One round; what was sent to the server."""
        updates = [self.update(round, client) for client in cohort]
        self.server = self.aggregate(round, updates)
        return updates

    def deployed(self, round: int, client: int) -> nn.Module:
        """What a participant would deploy after a round."""
        context = self.at_client(round, client)
        return self.algorithm.client_model(self.payload(round, client), self.state(client), context)

    def served(self, round: int) -> nn.Module:
        """The server's own model after a round."""
        model = self.algorithm.server_model(self.server, self.at_server(round))
        assert model is not None
        return model

    @functools.cached_property
    def pixels(self) -> Tensor:
        """Ten images nobody trains on."""
        assert self.task.dataset is not None
        return self.task.batch(self.task.dataset.test, torch.arange(10))["pixel_values"]


def weights_of(model: nn.Module) -> Tree:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def drawn_like(tree: Mapping[str, Tensor], seed: int) -> Tree:
    """Random tensors of the names, shapes and dtypes of others."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in sorted(tree.items())}


def mean(trees: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tree:
    """The weighted mean, written out in float64."""
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return {
        name: torch.einsum("k,k...->...", share, torch.stack([tree[name].double() for tree in trees]))
        for name in trees[0]
    }


def assert_same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, differing[:4]


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], atol: float) -> None:
    assert left.keys() == right.keys()
    assert distance(left, right) < atol, distance(left, right)


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest difference between two trees."""
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
