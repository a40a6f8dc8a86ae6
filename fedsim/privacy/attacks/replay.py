"""A participant's round, as somebody replays it who knows the method and some private state.

    asked       what the method, given what was received and that state, trains: objective, start, frozen
    change      start - sent, of what was trained: lr times a gradient, where it was one step of SGD
    gradient    of the objective on any examples

What an attacker knows is that state and no more (`knowledge`), so one attack is run at every level, on every method.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.algorithm import Algorithm, ClientContext, State, Training
from fedsim.core import tree as trees
from fedsim.core.seeding import derive
from fedsim.core.tree import Tree, flat, nested
from fedsim.data.source import Split
from fedsim.learning.steps import run_client
from fedsim.learning.task import Batch


SHARED, ANCESTOR, INTERMEDIATE = "shared", "ancestor", "intermediate"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What one participant received and sent in a round."""

    round: int
    client: int
    received: State
    sent: State


@dataclasses.dataclass(frozen=True)
class Replay:
    """An exchange, seen by one who takes `state` for the participant's private one. `ctx` has no data."""

    algorithm: Algorithm
    exchange: Exchange
    state: State
    ctx: ClientContext

    def asked(self, ctx: ClientContext | None = None) -> Training | None:
        """The first thing that the method trains, if there is one."""
        asking = self.algorithm.client_update(self.exchange.received, self.state, ctx or self.ctx)
        if not isinstance(asking, Generator):
            return None
        try:
            request = next(asking)
            return request if isinstance(request, Training) else request[1]
        except StopIteration:
            return None
        finally:
            asking.close()

    def model(self, tensors: State) -> nn.Module:
        """The model that the participant would deploy if it had received these."""
        return self.algorithm.client_model(tensors, self.state, self.ctx)

    @property
    def sends_what_it_receives(self) -> bool:
        """Whether what is sent has the names and shapes of what is received: a model can then be made of it."""
        return _alike(self.exchange.received, self.exchange.sent)


def change(asked: Training, sent: State) -> Tree | None:
    """`start - sent`, by the flat names of `start`; None where what was sent is not what was trained.

    A method that keeps some of what it trains sends one part of it.
    """
    start = flat(asked.start)
    parts = {"": asked.start} | {f"{n}{trees.PATH}": p for n, p in asked.start.items() if isinstance(p, Mapping)}
    for prefix, part in parts.items():
        if _alike(part, sent):
            return {prefix + name: start[prefix + name] - tensor for name, tensor in flat(sent).items()}
    return None


def loss(asked: Training, parameters: Tree, batch: Batch) -> Tensor:
    """What is minimised, of flat parameters; can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        return asked.objectives[0](nested(parameters), asked.frozen, batch)


def gradient(asked: Training, names: list[str], batch: Batch) -> Tensor:
    """Of the objective at the start, with respect to some of its tensors, as one vector."""
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in flat(asked.start).items()}
    found = torch.autograd.grad(loss(asked, parameters, batch), [parameters[name] for name in names])
    return torch.cat([part.flatten() for part in found])


@torch.no_grad()
def seen_by(layer: nn.Module, model: nn.Module, inputs: Batch) -> Tensor:
    """What a layer of a model reads of some inputs; what comes after it is not computed."""

    class Reached(Exception):
        pass

    seen: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise Reached

    hook = layer.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(Reached):
            model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def vector(tree: Tree, names: list[str]) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([tree[name].flatten() for name in names])


def knowledge(algorithm: Algorithm, own: State, ctx: ClientContext) -> dict[str, State]:
    """The private state of a participant, as far as it is known at each level; its true one is `own`.

    - "intermediate": the true one. - "ancestor": as it begins without data, of public models and public random
    numbers. - "shared": the same of the attacker's own random numbers. A level that knows no more than the one below,
    as all do where nothing is private, is left out.

    `ctx` has no data. **Raises:** what `client_init` raises, for a method that cannot begin without data.
    """
    guessing = dataclasses.replace(
        ctx, seed=derive(ctx.seed, "audit/guess"), start=None, info=dataclasses.replace(ctx.info, checkpoint=None)
    )
    makers: dict[str, Callable[[], State]] = {
        SHARED: lambda: run_client(guessing, algorithm.client_init(guessing)),
        ANCESTOR: lambda: run_client(ctx, algorithm.client_init(ctx)),
        INTERMEDIATE: lambda: own,
    }
    found: dict[str, State] = {}
    for level, make in makers.items():
        state = trees.clone(make())
        if level == SHARED and not _alike(state, own):  # the guess would be of another shape: nothing is known
            continue
        if all(trees.sha256(state) != trees.sha256(known) for known in found.values()):
            found[level] = state
    return found


def without_data(ctx: ClientContext) -> ClientContext:
    """The same context, of a participant that holds nothing."""
    return dataclasses.replace(ctx, train=Split({}, torch.zeros(0, dtype=torch.long)))


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    left, right = flat(one), flat(other)
    return left.keys() == right.keys() and all(left[name].shape == right[name].shape for name in left)
