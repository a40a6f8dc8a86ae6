"""LG-FedAvg: bottom layers are each client's own, top layers everyone's (Liang et al. 2020, arXiv 2001.01523).

    round r, client k   l_k, g_k <- E epochs of local training from l_k and g
    round r, server     g <- sum_k n_k g_k / sum_k n_k, over the sampled participants

Global g: what comes after the blocks, the last `shared` blocks, and, where these are more than there are, the
embeddings: with all of it, this is FedAvg. Local l_k: the rest, never sent, of any depth. Models of different widths
have no tensor in common but a head that reads features of one width (`baselines.private_models`): it alone is g.

Differs from the paper: everything is trained by the task's loss; its local losses of other kinds, and ensembles of
local models for devices that did not train, are left out. The released code begins with a model that FedAvg trained,
shares two or three layers, and averages without n_k. g begins as the seed draws it, or as the public start has it, also
where l_k is a checkpoint's. AdamW.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

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
    weighted_sum,
)
from fedsim.core.fields import check_range, refuse
from fedsim.core.tree import State, Tree
from fedsim.learning.features import FeatureLoss, check_classes, head_of, plain, width_of, with_features
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer, model_of
from fedsim.learning.task import Task
from fedsim.models import Form, get_family


@dataclasses.dataclass(frozen=True)
class LGFedAvg(PrivateModels):
    """Averaged top layers.

    - `shared`: how many of the last blocks are averaged, beside what comes after them; the embeddings count as one
      more block, below the first.
    - `server`: what the server makes of the mean.
    """

    shared: int = 0
    server: ServerOptimizer = dataclasses.field(default=AVERAGE, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "algorithm", "shared", least=0)

    @property
    def name(self) -> str:
        return "lg_fedavg"

    @property
    def leaves(self) -> Leaves:
        return "sub-model" if self.shared else "head"

    def check(self, task: Task, forms: Sequence[Form], intermediate: Form | None, target: Form) -> None:
        check_classes(task)
        width = width_of(forms, self.features)
        if self.shared and (others := [form for form in forms if form.width != width]):
            accepted = f"0, for the head alone, where features of {width} are not as wide as the small form {others[0]}"
            refuse("algorithm.shared", self.shared, accepted)
        shapes = [self._shapes(task, form, forms) for form in forms]
        for form, found in zip(forms, shapes, strict=True):
            if unlike := [name for name in {**shapes[0], **found} if found.get(name) != shapes[0].get(name)]:
                differ = f"{forms[0]} and {form} differ in {unlike[0]!r}"
                refuse("algorithm.shared", self.shared, f"so few that what is shared is alike in small forms: {differ}")

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        form = widest_of(ctx, self.width(ctx))
        model = with_features(ctx.task, form, ctx.initial(form), self.width(ctx), ctx.generator("head"))
        top = self._top(ctx.task, form, ctx.small_forms)
        return self.server.start({shared: model[own] for shared, own in top.items()})

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        top = model_of(state)
        return {client.id: top for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(state, updates)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return self._split(self.own_model(ctx), ctx)[1]

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        start = self._whole(payload, state, ctx)
        trained = yield Training(FeatureLoss(ctx.task, ctx.info.form), start, purpose="small", **self.settings())
        top, local = self._split(trained.parameters, ctx)
        return ClientUpdate(ctx.info.id, top, ctx.info.num_examples), local

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return plain(ctx.task, ctx.info.form, self._whole(payload, state, ctx))

    def _top(self, task: Task, form: Form, forms: Sequence[Form]) -> dict[str, str]:
        """What is shared: by names that models of all depths have in common, its names in a model of this form."""
        width, found = width_of(forms, self.features), dict[str, str]()
        if any(each.width != width for each in forms):
            return {name: name for name in head_of(task, form)}
        for name, spec in task.specs(form).items():
            inside = form.depth + 1 if spec.layer is None else form.depth - spec.layer
            from_top = 0 if spec.after else inside
            if from_top <= self.shared:
                found[name if spec.layer is None else f"{from_top} from the top.{spec.role}"] = name
        return found

    def _shapes(self, task: Task, form: Form, forms: Sequence[Form]) -> dict[str, torch.Size]:
        """Shapes of what is shared of a model without values, its head apart, which reads the features."""
        with torch.device("meta"):
            module = get_family(task.config.family).build(form, task.inputs)
        top, head = self._top(task, form, forms), head_of(task, form)
        return {shared: module.get_parameter(own).shape for shared, own in top.items() if own not in head}

    def _whole(self, payload: Payload, state: State, ctx: ClientContext) -> Tree:
        top = self._top(ctx.task, ctx.info.form, ctx.small_forms)
        return state | {own: payload[shared] for shared, own in top.items()}

    def _split(self, model: Tree, ctx: ClientContext) -> tuple[Tree, Tree]:
        """What is shared of a model, and what is not."""
        top = self._top(ctx.task, ctx.info.form, ctx.small_forms)
        local = {name: tensor for name, tensor in model.items() if name not in top.values()}
        return {shared: model[own] for shared, own in top.items()}, local
