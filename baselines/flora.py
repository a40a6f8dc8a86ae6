"""FLoRA: adapters are stacked, not averaged, and merged into the model (Wang et al., NeurIPS 2024, arXiv 2409.05976).

    round r, participant k   merge what came into W; train a fresh adapter B_k A_k of rank r_k; send it
    round r, server          B = [B_1 ... B_K], A = [p_1 A_1; ...; p_K A_K], p_k = n_k / sum n, sent to all
                             W <- W + (alpha / rank) B A = W + (alpha / rank) sum_k p_k B_k A_k, exactly

W is the target as the seed gives it, or a checkpoint; everyone holds it (private_bytes) and it changes in every round.
What comes after the blocks (last normalisation and head) is trained as it is and averaged.

Differs from the paper: all matrices of the blocks; AdamW; ranks are given by the device (`rank` times its rate); who
missed a round receives the matrices of W instead of every stack since, and so does everyone where a stack is larger.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
    weighted_mean,
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree, clone, nbytes, to
from fedsim.learning.adapters import HEAD, A, AdapterLoss, B, adapted, applied, check_rank, fresh, rank_of
from fedsim.learning.exits import tail
from fedsim.learning.starts import start_of
from fedsim.learning.task import Task
from fedsim.models import Form
from fedsim.models.checkpoint import Checkpoint


# In the server's state: the rounds of the last two stacks, the later first, and of each client's last update; 0 stands
# for none. `(2 + clients,)`.


@dataclasses.dataclass(frozen=True)
class FLoRA(LocalTraining):
    """Stacked adapters of the target.

    - `rank`: of the adapters of a device that holds the target; others have their rate's part of it.
    - `alpha`: B A counts alpha / rank times, for all ranks.
    - `base`: W at first, a checkpoint of the target's form; None: as the seed gives it.
    """

    rank: int = 8
    alpha: float = 16.0
    base: Checkpoint | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "rank", "alpha", above=0)

    @property
    def name(self) -> str:
        return "flora"

    @property
    def leaves(self) -> Leaves:
        return "adapter"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_rank(task, target, self.rank, forms)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        base = start_of(ctx, ctx.target, self.base)
        matrices = {name: base[name] for name in adapted(ctx.task, ctx.target)}
        head = {name: base[name] for name in tail(ctx.task, ctx.target)}
        since = torch.zeros(2 + len(ctx.clients), dtype=torch.long)
        return {"w": matrices, HEAD: head, "since": since}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        """The stack to those who have all before it; to the others, W after it."""
        stack, matrices = state.get("stack", {}), self._merged(state, ctx)
        before, small = int(state["since"][1]), nbytes(stack) < nbytes(matrices)
        has_all = {client.id: not before or int(state["since"][2 + client.id]) > before for client in cohort}
        short, long = {HEAD: state[HEAD], "stack": stack}, {HEAD: state[HEAD], "w": matrices}
        return {id_: short if small and has_all[id_] else long for id_ in has_all}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        arrived = [update for update in updates if isinstance(update, ClientUpdate)]
        if not arrived:
            return state
        total = sum(update.weight for update in arrived)
        heads = [dataclasses.replace(update, tree={HEAD: update.tree[HEAD]}) for update in arrived]
        stack: State = {A: {}, B: {}}
        for name in adapted(ctx.task, ctx.target):  # one side alone carries p_k
            stack[A][name] = torch.cat([update.weight / total * update.tree[A][name] for update in arrived])
            stack[B][name] = torch.cat([update.tree[B][name] for update in arrived], 1)
        since = state["since"].clone()
        since[1], since[0] = since[0].clone(), ctx.round
        since[[2 + update.client for update in arrived]] = ctx.round
        head = weighted_mean(heads, like={HEAD: state[HEAD]})
        return {"w": clone(self._merged(state, ctx)), "stack": stack, "since": since} | head

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        base = start_of(ctx, ctx.target, self.base)
        return ctx.task.module(ctx.target, base | self._merged(state, ctx) | state[HEAD])

    def _merged(self, state: State, ctx: ServerContext) -> Tree:
        """The matrices of W after the last stack."""
        matrices, stack = state["w"], state.get("stack")
        return applied(matrices, stack, adapted(ctx.task, ctx.target), self.alpha / self.rank) if stack else matrices

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return to(start_of(ctx, ctx.target, self.base), ctx.device)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        base, writes = self._base(payload, state, ctx), adapted(ctx.task, ctx.target)
        rank = rank_of(ctx.task, ctx.target, ctx.info.form, self.rank)
        adapters = to(fresh(base, writes, rank, ctx.generator("adapters")), ctx.device)
        start = adapters | {HEAD: payload[HEAD]}
        objective = AdapterLoss(ctx.task, ctx.target, self.alpha / self.rank)
        trained = yield Training(objective, start, {"model": base}, purpose="adapters", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), base

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, self._base(payload, state, ctx))

    def _base(self, payload: Payload, state: State, ctx: ClientContext) -> Tree:
        """W after the last stack, with the server's head."""
        model, stack = state | payload.get("w", {}), payload.get("stack")
        if stack:
            model = applied(model, stack, adapted(ctx.task, ctx.target), self.alpha / self.rank)
        return model | payload[HEAD]
