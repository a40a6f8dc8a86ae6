"""FedTGP: prototypes that the server trains to lie apart (Zhang et al., AAAI 2024, arXiv 2401.03230).

    round r, client k   as FedProto's, with the server's prototypes P_c = F(e_c); send the mean features C_k,c
    round r, server     delta = min(max_c min_c' |Q_c - Q_c'|, tau), Q_c = mean_k C_k,c
                        train e and F on  -log softmax_c(-d_c)[y],  d_c = |C_k,y - P_c| + delta [c = y], of all C_k,y

e_c: a vector a class; F: linear, ReLU, linear, as wide as the features. The margin delta moves a prototype closer to
its own clients' than it would be for classification alone.

Differs from the paper: the margin is the released code's, the largest distance of a class from its nearest; so are the
server's SGD, its epochs and its batches, as large as clients'. In clients' training, distances are mean squares over
features, of each example, as in FedProto's code. Clients train with AdamW.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.private_models import Prototypes
from fedsim.algorithm import ClientContext, ClientUpdate, Partial, Payload, ServerContext, Steps
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree, mapped
from fedsim.learning.features import drawn_matrix, fitted, points_of


@dataclasses.dataclass(frozen=True)
class FedTGP(Prototypes):
    """Trained prototypes.

    - `weight`: 10, as the authors run it. - `margin`: tau, the largest margin.
    - `server_lr`, `server_epochs`: of the server's training in a round.
    """

    weight: float = dataclasses.field(default=10.0, kw_only=True)
    margin: float = 100.0
    server_lr: float = 0.01
    server_epochs: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "margin", "server_lr", least=0)
        check_range(self, "algorithm", "server_epochs", least=1)

    @property
    def name(self) -> str:
        return "fedtgp"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        classes, width, generator = ctx.task.inputs.num_classes, self.width(ctx), ctx.generator("prototypes")
        layers = {f"{layer}.weight": drawn_matrix((width, width), generator) for layer in ("hidden", "out")}
        biases = {f"{layer}.bias": torch.zeros(width) for layer in ("hidden", "out")}
        classwise = {"embedding": torch.randn(classes, width, generator=generator)}
        return {"trainable": classwise | layers | biases, "known": torch.zeros(classes, dtype=torch.bool)}

    def sent(self, state: State) -> Payload:
        return {"prototypes": generated(state["trainable"]), "known": state["known"]}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        points, labels = points_of(update.tree["prototypes"] for update in updates if isinstance(update, ClientUpdate))
        if not len(labels):
            return state
        points = points.double()  # in float32 the scores of this method have differed between processors (`LOG.md`)
        delta = min(widest_gap(points, labels), self.margin)
        trained = fitted(
            mapped(Tensor.double, state["trainable"]),
            lambda trainable, some, of: contrastive(some, of, generated(trainable), delta),
            points,
            labels,
            lr=self.server_lr,
            epochs=self.server_epochs,
            batch_size=self.batch_size,
            generator=ctx.generator("prototypes"),
        )
        return {"trainable": mapped(Tensor.float, trained), "known": torch.ones_like(state["known"])}

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        model, means, _ = yield from self.drawn(payload, state, ctx)
        return ClientUpdate(ctx.info.id, {"prototypes": means}, ctx.info.num_examples), model


def generated(trainable: Tree) -> Tensor:
    """P: every class's prototype, `(C, F)`."""
    hidden = F.linear(trainable["embedding"], trainable["hidden.weight"], trainable["hidden.bias"]).relu()
    return F.linear(hidden, trainable["out.weight"], trainable["out.bias"])


def widest_gap(points_NF: Tensor, labels_N: Tensor) -> float:
    """The largest distance of a class's mean from that of its nearest; 0 of a single class."""
    means = torch.stack([points_NF[labels_N == label].mean(0) for label in labels_N.unique()])
    distances = distance(means, means).fill_diagonal_(torch.inf)
    return float(distances.min(1).values.max()) if len(means) > 1 else 0.0


def contrastive(points_NF: Tensor, labels_N: Tensor, prototypes_CF: Tensor, delta: float) -> Tensor:
    """Cross-entropy of the nearest prototype, each point's own prototype taken to be farther by the margin."""
    distances = distance(points_NF, prototypes_CF)
    return F.cross_entropy(-distances - delta * F.one_hot(labels_N, len(prototypes_CF)), labels_N)


def distance(left_NF: Tensor, right_CF: Tensor) -> Tensor:
    """Euclidean distances `(N, C)`; the gradient at 0 is 0."""
    return (left_NF[:, None] - right_CF).square().sum(-1).clamp(min=1e-12).sqrt()
