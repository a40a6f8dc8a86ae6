"""A client's methods, called by hand: what they ask for is trained, one after another."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fedsim.algorithm import Algorithm, ClientContext, ClientUpdate, Payload
from fedsim.core.tree import State, Tree
from fedsim.learning.objectives import Frozen
from fedsim.learning.steps import run_client
from fedsim.learning.task import Batch
from fedsim.learning.training import Training, train


def client_init(algorithm: Algorithm, ctx: ClientContext) -> State:
    return run_client(ctx, algorithm.client_init(ctx))


def client_update(
    algorithm: Algorithm, payload: Payload, state: State, ctx: ClientContext
) -> tuple[ClientUpdate, State]:
    found: Any = run_client(ctx, algorithm.client_update(payload, state, ctx))
    return found


FUNCTIONS: list[Callable[[Tree, Batch], Tensor]] = []


@dataclasses.dataclass(frozen=True)
class Numbered:
    """An objective that is `FUNCTIONS[number]`: objectives hold no functions."""

    number: int

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return FUNCTIONS[self.number](parameters, batch)


def objective_of(function: Callable[[Tree, Batch], Tensor]) -> Numbered:
    """An objective that is `(parameters, batch) -> loss`, as a test writes it down."""
    FUNCTIONS.append(function)
    return Numbered(len(FUNCTIONS) - 1)


def local_train(
    ctx: ClientContext, objective: Any, parameters: Mapping[str, Tensor], frozen: Any = None, **settings: Any
) -> Tree:
    """The tree after one training by itself."""
    return train(ctx, Training(objective, parameters, frozen or {}, **settings)).parameters


def asked_of(algorithm: Algorithm, payload: Payload, state: State, ctx: ClientContext) -> Training:
    """The first training that a client asks for in a round."""
    steps: Any = algorithm.client_update(payload, state, ctx)
    return next(steps)
