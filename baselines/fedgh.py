"""FedGH: a header that the server trains on what clients' features are like (Yi et al., ACM MM 2023, arXiv 2303.13137).

    round r, client k   theta_k, omega_k <- E epochs of local training from theta_k and the server's header omega
                        send C_k,c = mean features over its examples of class c, of each class c it has
    round r, server     omega <- omega - eta grad loss(omega; C_k,c, c), for all that came, one after another

Extractors theta_k are the clients' own, of any form; the header omega reads features (`baselines.private_models`).

Differs from the paper: a class's mean is over all its examples at once, where the released code averages the means of
batches; the order of what came is drawn; several passes may be made (`server_epochs`). Clients train with AdamW. They
are scored with the server's header; the released code scores them right after local training, under their own, which is
kinder on their own share.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.private_models import PrivateModels, widest_of
from fedsim.algorithm import (
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Leaves,
    Partial,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.fields import check_range
from fedsim.core.tree import State, Tree
from fedsim.learning.features import FeatureLoss, fitted, head_of, plain, points_of, prototypes, with_features


@dataclasses.dataclass(frozen=True)
class FedGH(PrivateModels):
    """A header trained on prototypes.

    - `server_lr`, `server_epochs`: eta, and passes over what came, at the server in a round.
    """

    server_lr: float = 0.01
    server_epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "server_lr", least=0)
        check_range(self, "algorithm", "server_epochs", least=1)

    @property
    def name(self) -> str:
        return "fedgh"

    @property
    def leaves(self) -> Leaves:
        return "statistics"

    @property
    def updates_vary(self) -> bool:
        return True

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        form = widest_of(ctx, self.width(ctx))
        model = with_features(ctx.task, form, ctx.initial(form), self.width(ctx), ctx.generator("head"))
        return {name: model[name] for name in head_of(ctx.task, form)}

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        points, labels = points_of(update.tree for update in updates)
        passes = {"lr": self.server_lr, "epochs": self.server_epochs, "batch_size": 1}
        return fitted(state, loss_of_header, points, labels, **passes, generator=ctx.generator("header"))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return _without_header(self.own_model(ctx), ctx)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        form = ctx.info.form
        trained = yield Training(FeatureLoss(ctx.task, form), {**state, **payload}, purpose="small", **self.settings())
        model = trained.parameters
        means, _ = prototypes(ctx.task, form, model, ctx.train, self.batch_size, ctx.device)
        return ClientUpdate(ctx.info.id, means, ctx.info.num_examples), _without_header(model, ctx)

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return plain(ctx.task, ctx.info.form, {**state, **payload})


def loss_of_header(header: Tree, points_NF: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of the header on points with labels."""
    return F.cross_entropy(F.linear(points_NF, **{n.rpartition(".")[2]: t for n, t in header.items()}), labels_N)


def _without_header(model: Tree, ctx: ClientContext) -> Tree:
    return {name: tensor for name, tensor in model.items() if name not in head_of(ctx.task, ctx.info.form)}
