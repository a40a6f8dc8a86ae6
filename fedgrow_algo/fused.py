"""Fed-Grow beside a participant's own small model: a variant of the project's own, of no paper.

    participant i, once      S_i, Local_i and M_i as in Fed-Grow (`fedgrow_algo.fedgrow`); all three stay; g_i = 1
    of an example x          z_shared = T_i(x), T_i = Global(M_i);  z = z_shared + g_i S_i(x)
    round r, participant i   receive Global; train it and g_i through the task losses of z_shared and of z, added up
                             send Global
    round r, server          Global <- sum_i n_i Global_i / sum_i n_i
    result                   z, one for each participant, of two models

What is sent is Fed-Grow's, to the byte; g_i, one number, is the participant's own. z_shared is a whole model's by
itself, so Global is not left to what S_i cannot do; z is for scores on one's own labels, which S_i knows best.
S_i stays frozen: M_i was grown from it as it is, and it was already trained on all that its participant has.
"""

import dataclasses

import torch
from torch import Tensor, nn

from fedgrow_algo.dual_ligo import GrownLoss
from fedgrow_algo.fedgrow import GLOBAL, MIDDLE, FedGrow
from fedsim.algorithm import Batch, ClientContext, ClientUpdate, Frozen, Payload, Steps, Training
from fedsim.core.fields import refuse
from fedsim.core.tree import State, Tree
from fedsim.learning.ensemble import Gated
from fedsim.models import Form


SMALL, GATE = "small", "gate"  # parts of a participant's private state: S_i, and g_i, which is trained


@dataclasses.dataclass(frozen=True)
class FedGrowFused(FedGrow):
    """Staged Fed-Grow whose participants deploy T_i and S_i together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.federate:
            refuse("algorithm.federate", self.federate, "True: a gate goes with a Global that is shared")
        if self.finetune_after is not None:
            refuse("algorithm.finetune_after", self.finetune_after, "None: a gate goes with a Global that is shared")

    @property
    def name(self) -> str:
        return "fedgrow_fused"

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        growth = GrownLoss(ctx.task, self.preset, ctx.intermediate, ctx.target, self.checkpoint_growth, self.rank)
        trained = yield Training(
            FusedLoss(growth, ctx.info.form),
            {GLOBAL: payload, GATE: state[GATE]},
            {"small": state[MIDDLE], "own": state[SMALL]},
            purpose="global",
            **self.settings(),
        )
        update = ClientUpdate(ctx.info.id, trained.parameters[GLOBAL], ctx.info.num_examples)
        return update, state | {GATE: trained.parameters[GATE]}

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        shared, own = super().client_model(payload, state, ctx), ctx.task.module(ctx.info.form, state[SMALL])
        return Gated(shared, own, state[GATE][GATE]).eval()

    def _kept(self, small: Tree, ctx: ClientContext) -> State:
        return {SMALL: small, GATE: {GATE: torch.ones((), device=ctx.device)}}


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """The task's losses of z_shared and of z, added up; trained are Global and, under `GATE`, g.

    - `growth`: from M to T. - `own`: the form of S. - `frozen["small"]`: M, prepared. - `frozen["own"]`: S.
    """

    growth: GrownLoss
    own: Form

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        task = self.growth.task
        shared = self.growth.logits(parameters[GLOBAL], frozen["small"], batch).float()
        fused = shared + parameters[GATE][GATE] * task.forward(self.own, frozen["own"], batch).float()
        return task.loss(shared, batch) + task.loss(fused, batch)
