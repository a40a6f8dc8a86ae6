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
    LocalTraining,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
    weighted_mean,
)
from fedsim.core.fields import check_range
from fedsim.core.tree import Tree, clone, nbytes, prefixed, to, under
from fedsim.learning.adapters import HEAD, A, AdapterLoss, B, adapted, applied, check_rank, fresh, rank_of
from fedsim.learning.exits import tail
from fedsim.learning.starts import start_of
from fedsim.learning.task import Task
from fedsim.models import Form
from fedsim.models.pretrained import Checkpoint


STACK, MATRICES = "stack.", "w."
# In the server's state: the rounds of the last two stacks, the later first, and of each client's last update; 0 stands
# for none. `(2 + clients,)`.
SINCE = "since"


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

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form, target: Form) -> None:
        check_rank(task, target, self.rank, forms)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> Tree:
        base = start_of(ctx.task, ctx.target, self.base, ctx.seed)
        matrices = {name: base[name] for name in adapted(ctx.task, ctx.target)}
        head = {name: base[name] for name in tail(ctx.task, ctx.target)}
        since = torch.zeros(2 + len(ctx.clients), dtype=torch.long)
        return prefixed(matrices, MATRICES) | prefixed(head, HEAD) | {SINCE: since}

    def server_broadcast(self, state: Tree, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        """The stack to those who have all before it; to the others, W after it."""
        head, stack = prefixed(under(state, HEAD), HEAD), prefixed(under(state, STACK), STACK)
        matrices = prefixed(self._merged(state, ctx), MATRICES)
        before, small = int(state[SINCE][1]), nbytes(stack) < nbytes(matrices)
        has_all = {client.id: not before or int(state[SINCE][2 + client.id]) > before for client in cohort}
        short, long = head | stack, head | matrices
        return {id_: short if small and has_all[id_] else long for id_ in has_all}

    def server_aggregate(self, state: Tree, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> Tree:
        arrived = [update for update in updates if isinstance(update, ClientUpdate)]
        if not arrived:
            return state
        total = sum(update.weight for update in arrived)
        heads = [dataclasses.replace(u, tree=prefixed(under(u.tree, HEAD), HEAD)) for u in arrived]
        stack: Tree = {}
        for name in adapted(ctx.task, ctx.target):  # one side alone carries p_k
            stack[A + name] = torch.cat([update.weight / total * update.tree[A + name] for update in arrived])
            stack[B + name] = torch.cat([update.tree[B + name] for update in arrived], 1)
        since = state[SINCE].clone()
        since[1], since[0] = since[0].clone(), ctx.round
        since[[2 + update.client for update in arrived]] = ctx.round
        merged = prefixed(clone(self._merged(state, ctx)), MATRICES)
        return merged | weighted_mean(heads, like=state) | prefixed(stack, STACK) | {SINCE: since}

    def server_model(self, state: Tree, ctx: ServerContext) -> nn.Module | None:
        base = start_of(ctx.task, ctx.target, self.base, ctx.seed)
        return ctx.task.module(ctx.target, base | self._merged(state, ctx) | under(state, HEAD))

    def _merged(self, state: Tree, ctx: ServerContext) -> Tree:
        """The matrices of W after the last stack."""
        matrices, stack = under(state, MATRICES), under(state, STACK)
        return applied(matrices, stack, adapted(ctx.task, ctx.target), self.alpha / self.rank) if stack else matrices

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Tree:
        return to(start_of(ctx.task, ctx.target, self.base, ctx.seed), ctx.device)

    def client_update(self, payload: Payload, state: Tree, ctx: ClientContext) -> Steps[tuple[ClientUpdate, Tree]]:
        base, writes = self._base(payload, state, ctx), adapted(ctx.task, ctx.target)
        rank = rank_of(ctx.task, ctx.target, ctx.info.form, self.rank)
        adapters = to(fresh(base, writes, rank, ctx.generator("adapters")), ctx.device)
        start = adapters | {name: tensor for name, tensor in payload.items() if name.startswith(HEAD)}
        objective = AdapterLoss(ctx.task, ctx.target, self.alpha / self.rank)
        trained = yield Training(objective, start, {"model": base}, purpose="adapters", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), base

    def client_model(self, payload: Payload, state: Tree, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.target, self._base(payload, state, ctx))

    def _base(self, payload: Payload, state: Tree, ctx: ClientContext) -> Tree:
        """W after the last stack, with the server's head."""
        model, stack = state | under(payload, MATRICES), under(payload, STACK)
        if stack:
            model = applied(model, stack, adapted(ctx.task, ctx.target), self.alpha / self.rank)
        return model | under(payload, HEAD)
