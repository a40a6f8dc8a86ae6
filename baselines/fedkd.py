"""FedKD: a private and a small common model teach each other (Wu et al., Nature Communications 2022, arXiv 2108.13323).

    round r, participant k   theta <- the server's; train S_k (the mentor) and theta_k (the mentee) on
                             mentor:  CE(S) + KL(p_theta || p_S) / (CE(S) + CE(theta))
                             mentee:  CE(theta) + KL(p_S || p_theta) / (CE(S) + CE(theta))
    round r, server          theta <- sum_k n_k theta_k / sum_k n_k

The worse both are, the less they teach each other. The mentee has the smallest form among the participants' own, the
mentor each participant's: it never leaves, and is what is deployed. Deep mutual learning of this shape, with fixed
weights, is FML (Shen et al. 2020).

Differs from the paper: no losses between hidden states and attention maps; updates are sent as they are, not as
singular vectors; models are averaged after local epochs, by n_k; the other's predictions and the divisor are held
fixed, so each model's gradient is that of its own line, where the released code lets gradients through all of them, and
its divergences are means over classes as well, so that they count C times less; AdamW, and `clip` holds for the
gradients of both models as one.
"""

import dataclasses

from torch import Tensor, nn

from fedgrow_algo.pretrain import untrained
from fedsim.algorithm import (
    Averaging,
    Batch,
    ClientContext,
    ClientUpdate,
    Frozen,
    Leaves,
    Payload,
    ServerContext,
    Steps,
    Training,
)
from fedsim.core.tree import State
from fedsim.learning.rates import smallest
from fedsim.learning.server_opt import model_of
from fedsim.learning.task import Task
from fedsim.models import Form


MENTOR, MENTEE = "mentor", "mentee"  # parts of what is trained


@dataclasses.dataclass(frozen=True)
class FedKD(Averaging):
    """Mutual distillation between private models and one that is averaged."""

    @property
    def name(self) -> str:
        return "fedkd"

    @property
    def leaves(self) -> Leaves:
        return "auxiliary model"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> State:
        return self.server.start(ctx.initial(_form(ctx), "auxiliary"))

    def server_model(self, state: State, ctx: ServerContext) -> nn.Module | None:
        return ctx.task.module(_form(ctx), model_of(state))

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> State:
        return untrained(ctx)

    def client_update(self, payload: Payload, state: State, ctx: ClientContext) -> Steps[tuple[ClientUpdate, State]]:
        loss = MutualLoss(ctx.task, ctx.info.form, _form(ctx))
        trained = yield Training(loss, {MENTOR: state, MENTEE: payload}, purpose="mutual", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters[MENTEE], ctx.info.num_examples), trained.parameters[MENTOR]

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> nn.Module:
        return ctx.task.module(ctx.info.form, state)


def _form(ctx: ServerContext | ClientContext) -> Form:
    """The mentee's: the smallest form there is."""
    return smallest(ctx.task, ctx.small_forms)


@dataclasses.dataclass(frozen=True)
class MutualLoss:
    """The sum of both lines: the gradient of each model's parameters is that of its own."""

    task: Task
    mentor: Form
    mentee: Form

    def __call__(self, parameters: State, frozen: Frozen, batch: Batch) -> Tensor:
        mentor = self.task.forward(self.mentor, parameters[MENTOR], batch).float()
        mentee = self.task.forward(self.mentee, parameters[MENTEE], batch).float()
        losses = self.task.loss(mentor, batch) + self.task.loss(mentee, batch)
        taught = self._taught(mentor, mentee.detach(), batch) + self._taught(mentee, mentor.detach(), batch)
        return losses + taught / losses.detach()

    def _taught(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Mean KL divergence of the student's probabilities from the teacher's: KL(p_teacher || p_student)."""
        entropy = self.task.distillation(teacher, teacher, batch)
        return self.task.distillation(student, teacher, batch) - entropy
