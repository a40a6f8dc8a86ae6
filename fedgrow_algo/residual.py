"""Fed-Grow that shares the residual axis alone, the project's own variant.

Global has maps B_g for each group g of axes and depth tables w (`fedgrow_algo.ligo`). R: the groups of the axis of the
skip connections, which embeddings and every block write to.

    participant i, once      M_i = Local_i(S_i), as in `fedgrow_algo.fedgrow`; keep B_g, g not in R, as all begin with
    round r, participant i   receive (B_R, w); train them and its own B_g through the task loss of T_i = Global_i(M_i);
                             keep B_g; send (B_R, w)
    round r, server          (B_R, w) <- sum_i n_i (B_R, w)_i / sum_i n_i
    result                   T_i = Global_i(M_i)
    optionally, afterwards   train T_i itself, each participant alone

Models of one ancestor share the coordinates of their residual stream for long; what a head or a unit of an MLP does,
each soon settles for itself. Maps that write R and maps that read it are both sent. A map of another axis of the whole
network, as of the pooler before a classifier, is no map of R: it stays.
"""

import dataclasses

from fedgrow_algo.dual_ligo import operator_between
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.preset import NEXT, READ
from fedsim.algorithm import ClientContext, ServerContext
from fedsim.core.fields import refuse
from fedsim.core.tree import Tree


@dataclasses.dataclass(frozen=True)
class FedGrowResidual(FedGrow):
    """Fed-Grow of which the residual axis' maps and the depth tables are averaged. Fields are those of `FedGrow`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.federate:
            refuse("algorithm.federate", self.federate, "True: fedgrow_no_federation shares nothing")

    @property
    def name(self) -> str:
        return "fedgrow_residual"

    def split(self, operator: Tree, ctx: ServerContext | ClientContext) -> tuple[Tree, Tree]:
        residual = operator_between(self.preset, ctx.task, ctx.intermediate, ctx.target).residual
        maps = {f"width.{group}{use}" for group in residual for use in ("", READ, NEXT)}
        shared = {name: tensor for name, tensor in operator.items() if name in maps or name.startswith("depth.")}
        return shared, {name: tensor for name, tensor in operator.items() if name not in shared}
