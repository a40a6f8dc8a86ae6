"""What the procedures of Fed-Grow do alike: rounds that share Global, and rounds of fine-tuning after them.

    federated round    server: send Global to the cohort; average what comes back
    fine-tuning        participant i, once: receive Global; make T_i = Global(M_i), and keep nothing else
                       participant i, in every such round: train T_i on its own shard; send nothing

The server notes who has made its T_i: Global is sent to nobody twice for it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fedgrow_algo.dual_ligo import of_rank, operator_between
from fedgrow_algo.pretrain import Init
from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    Steps,
    TaskLoss,
    Training,
    weighted_sum,
)
from fedsim.core.fields import refuse
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree, mapped
from fedsim.learning.server_opt import ServerOptimizer, model_of
from fedsim.learning.task import Task
from fedsim.models import Form


FINETUNE = "finetune"  # the stage, and the purpose of its training
TARGET = "target"  # part of a participant's private state: T_i, once it is fine-tuned
GROWN = "grown"  # part of the server's state: who has made its T_i, `(population,)` of bools


def stage_of(round: int, finetune_after: int | None) -> str:
    """The stage of a round after round 0."""
    return "federated" if finetune_after is None or round <= finetune_after else FINETUNE


def check_growth(preset: str, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> Form:
    """The intermediate form. **Raises:** `ValueError` if there is none, or if the preset cannot map every small form
    into it, and it into the target; both forms are named."""
    if intermediate is None:
        refuse("intermediate", None, "a form: small models grow to it, and from it to the target")
    operator_between(preset, task, intermediate, target)
    for form in forms:
        operator_between(preset, task, form, intermediate)
    return intermediate


def first_global(preset: str, ctx: ServerContext | ClientContext, rank: int | None = None) -> Tree:
    """Global before round 1: one draw for the whole run, so a participant can make it without being sent it.

    - `rank`: of its maps; None: full ones.
    """
    return of_rank(rank, preset, ctx.task, ctx.intermediate, ctx.target).init(global_stream(ctx))


def global_stream(ctx: ServerContext | ClientContext) -> torch.Generator:
    """The random stream that Global starts from, and with it what of Global is the same for all and never trained."""
    return generator(ctx.seed, "global")


def local_stream(init: Init, ctx: ClientContext) -> torch.Generator:
    """The random stream that Local_i starts from."""
    return generator(ctx.seed, "local") if init == "common" else ctx.generator("local")


def as_stored(state: State) -> State:
    """The state as a checkpoint gives it back: strides, which files forget, may decide how a sum is rounded."""
    return mapped(torch.Tensor.contiguous, state)


# at the aggregator ----------------------------------------------------------------------------------------------------


def server_state(start: State, server: ServerOptimizer, finetune_after: int | None, ctx: ServerContext) -> State:
    """Global before round 1, `start`, and, where targets will be fine-tuned, that nobody has made its own."""
    state = server.start(start)
    return state if finetune_after is None else state | {GROWN: torch.zeros(len(ctx.clients), dtype=torch.bool)}


def payloads(state: State, cohort: Sequence[ClientInfo], stage: str) -> Mapping[int, Payload]:
    """Global for everyone; when targets are fine-tuned, for those alone that have not made theirs."""
    shared: Tree = {name: tensor for name, tensor in model_of(state).items() if name != GROWN}
    if stage != FINETUNE or GROWN not in state:
        return {client.id: shared for client in cohort}
    nothing: Tree = {}
    return {client.id: nothing if state[GROWN][client.id] else shared for client in cohort}


def combined(updates: Sequence[ClientUpdate]) -> Partial | None:
    """The sum of what is averaged. Updates without tensors pass through: the server reads who they are from."""
    return weighted_sum(updates) if any(update.tree for update in updates) else None


def aggregated(state: State, updates: Iterable[ClientUpdate | Partial], server: ServerOptimizer, stage: str) -> State:
    """A step to the mean of what arrived; when targets are fine-tuned, a note of who has its own."""
    if GROWN not in state:
        return server.after(state, updates)
    grown = state[GROWN].clone()
    if stage != FINETUNE:
        return server.after(state, updates) | {GROWN: grown}
    for update in updates:
        assert isinstance(update, ClientUpdate), "sums do not say whose they are"
        grown[update.client] = True
    return state | {GROWN: grown}


# at a participant -----------------------------------------------------------------------------------------------------


def own_target(state: State) -> Tree | None:
    """T_i as it was fine-tuned so far; None before the first such round."""
    return state.get(TARGET)


def fine_tuned(ctx: ClientContext, target: Tree, **settings: Any) -> Steps[tuple[ClientUpdate, State]]:
    """One round of fine-tuning T_i: nothing to send, and a private state that is T_i alone.

    - `settings`: of `Training`.
    """
    trained = yield Training(TaskLoss(ctx.task, ctx.target), as_stored(target), purpose=FINETUNE, **settings)
    return ClientUpdate(ctx.info.id, {}, ctx.info.num_examples), {TARGET: trained.parameters}
