"""FedProto: clients share what their features are like for each class (Tan et al., AAAI 2022, arXiv 2105.00243).

    round r, client k   theta_k <- E epochs on  cross-entropy + lambda |z(x) - C_y|^2, C_y the server's prototype of y
                        send C_k,c = mean of z(x) over its examples of class c, and n_k,c, of each class c it has
    round r, server     C_c <- sum_k n_k,c C_k,c / sum_k n_k,c, over the clients that have class c

Models are the clients' own, of any form; features z are what their head reads (`baselines.private_models`).

Differs from the paper: as in the released code, each example's features are drawn to a prototype, not their mean, and
by the mean square over features; the released code averages prototypes without n_k,c, and the paper divides the sum
once more by the number of clients. A class that nobody in the cohort has keeps its prototype. AdamW.
"""

import dataclasses
from collections.abc import Iterable

import torch

from baselines.private_models import Prototypes
from fedsim.algorithm import ClientContext, ClientUpdate, Partial, Payload, ServerContext, Steps
from fedsim.core.tree import State


@dataclasses.dataclass(frozen=True)
class FedProto(Prototypes):
    """Means of prototypes. With `weight=0` everyone is alone."""

    @property
    def name(self) -> str:
        return "fedproto"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        classes = ctx.task.inputs.num_classes
        return {
            "prototypes": torch.zeros(classes, self.width(ctx)),
            "known": torch.zeros(classes, dtype=torch.bool),
        }

    def sent(self, state: State) -> Payload:
        return state

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        sums = torch.zeros_like(state["prototypes"], dtype=torch.float64)
        counts = torch.zeros(len(sums), dtype=torch.float64)
        for update in updates:
            assert isinstance(update, ClientUpdate)
            for label, count in update.tree["counts"].items():
                sums[int(label)] += count.double() * update.tree["prototypes"][label].double()
                counts[int(label)] += count
        held = counts > 0
        means = (sums / counts.clamp(min=1)[:, None]).float()
        return {
            "prototypes": torch.where(held[:, None], means, state["prototypes"]),
            "known": state["known"] | held,
        }

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        model, means, counts = yield from self.drawn(payload, state, ctx)
        return ClientUpdate(ctx.info.id, {"prototypes": means, "counts": counts}, ctx.info.num_examples), model
