"""A method that trains nothing: every client adds a vector of its own to what it receives, and the server averages."""

import dataclasses
from collections.abc import Sequence

import torch

from fedsim.algorithm import Algorithm, ClientUpdate, weighted_mean, weighted_sum
from fedsim.privacy.pair import Pair
from fedsim.privacy.pairs import Around
from fedsim.testing import SMALL, Federation


@dataclasses.dataclass(frozen=True)
class SentNumbers(Algorithm):
    """- `changes`: what each client adds. - `weights`: of their updates; 1 where it is empty."""

    changes: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] = ()

    @property
    def name(self):
        return "sent_numbers"

    def server_init(self, ctx):
        return {"x": torch.full((len(self.changes[0]),), 5.0)}

    def server_broadcast(self, state, cohort, ctx):
        return {client.id: state for client in cohort}

    def combine(self, updates):
        return weighted_sum(updates)

    def server_aggregate(self, state, updates, ctx):
        return weighted_mean(updates, state)

    def client_update(self, payload, state, ctx):
        client = ctx.info.id
        change = torch.tensor(self.changes[client])
        return ClientUpdate(client, {"x": payload["x"] + change}, self.weights[client] if self.weights else 1), state

    def client_model(self, payload, state, ctx):
        raise NotImplementedError("a vector is no model")


def numbers(
    changes: Sequence[Sequence[float]], *pairs: Pair, weights: Sequence[float] = (), seed: int = 0
) -> Federation:
    """A federation of one client for each change; everything begins at 5."""
    method = SentNumbers(tuple(map(tuple, changes)), tuple(weights))
    sizes = (2,) * len(changes)
    return Federation(Around(method, pairs) if pairs else method, (SMALL,) * len(sizes), sizes=sizes, seed=seed)


def moved(federation: Federation) -> list[float]:
    """By how much the server has moved from its start."""
    state = federation.server.get("around.method", federation.server)
    return (state["x"] - 5).tolist()
