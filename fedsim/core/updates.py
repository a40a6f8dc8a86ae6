"""What clients upload, and weighted sums and means of it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from fedsim.core import tree as trees
from fedsim.core.tree import State, Tree


# What leaves a participant, from the least to the most. Up to the auxiliary model, no model of its own does.
Leaves = Literal["nothing", "statistics", "operator", "adapter", "head", "auxiliary model", "sub-model", "model"]
PRIVATE: tuple[Leaves, ...] = ("nothing", "statistics", "operator", "adapter", "head", "auxiliary model")


@dataclasses.dataclass(frozen=True)
class Trainings:
    """All trainings of a participant whose results it has sent. - `examples`: of its shard.

    - `epochs`: of all trainings together that have a batch size: pairs (batch size, epochs).
    """

    examples: int
    epochs: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class ClientUpdate:
    """What one client uploads.

    - `weight`: its weight in a mean (usually its number of examples).
    - `metrics`: numbers by name for the tables (column `metrics`); the round's row has their weighted means. No part of
      what is sent, and read by no server.
    """

    client: int
    tree: State
    weight: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Partial:
    """A sum over a fixed chunk of clients: `tree` is sum(weight * update) in float64, flat; `weight` is sum(weight)."""

    tree: Tree
    weight: float

    def mean(self, like: State) -> State:
        """The sum over its weight. `like` gives the dtypes; empty: all float32. Takes the sum's memory: only once."""
        assert self.tree or not trees.flat(like), "the mean of a sum that was used up"
        dtypes = trees.flat(like) or dict.fromkeys(self.tree, torch.empty(0))
        if unknown := sorted(self.tree.keys() - dtypes.keys()):
            raise ValueError(f"clients sent {unknown[:4]}, which are no names of what their mean is to be like")
        return trees.nested(trees.quotient(self.tree, self.weight, dtypes))


def weighted_sum(updates: Sequence[ClientUpdate]) -> Partial:
    """`(sum_k w_k theta_k, sum_k w_k)` in the order given: what `combine` returns for methods that average."""
    total: Tree | None = None
    for update in updates:
        try:
            total = trees.scaled_sum(total, trees.flat(update.tree), update.weight)
        except ValueError as error:
            raise ValueError(f"the update of participant {update.client} after those before it: {error}") from None
    assert total is not None
    return Partial(total, sum(update.weight for update in updates))


def whole_sum(updates: Iterable[ClientUpdate | Partial]) -> Partial | None:
    """The sum of all that arrives, in one accumulator, in the order of the iterator; None if nobody contributed."""
    total: Tree | None = None
    weight = 0.0
    for update in updates:
        partial = update if isinstance(update, Partial) else weighted_sum([update])
        total, weight = trees.accumulated(total, partial.tree), weight + partial.weight
    return None if total is None else Partial(total, weight)


def weighted_mean(updates: Iterable[ClientUpdate | Partial], like: State) -> State:
    """`sum_k w_k theta_k / sum_k w_k` (FedAvg, McMahan et al. 2017, Algorithm 1, over the sampled clients only).

    `like` gives the dtypes (empty: all float32) and is returned if nobody contributed.
    """
    total = whole_sum(updates)
    return like if total is None else total.mean(like)
