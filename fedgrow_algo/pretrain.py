"""Where a participant's small model comes from."""

from fedsim.algorithm import ClientContext
from fedsim.pretrained import load_small
from fedsim.training import PRETRAIN, local_train
from fedsim.tree import Tree, to


def trained_on_own_shard(
    ctx: ClientContext, *, lr: float, epochs: int, batch_size: int, weight_decay: float, clip: float | None
) -> Tree:
    """A model of the participant's own form, trained on its own shard: from its tier's checkpoint, or from scratch.

    From scratch is what the paper's code does. With no epochs a checkpoint is taken as it is, and its tensors are those
    that every participant in the process holds: nobody may write to them.

    It is what the participant is assumed to bring along: its parameters count as trained nowhere, its cost in round 0.
    """
    form, task, checkpoint = ctx.info.form, ctx.task, ctx.info.checkpoint
    if checkpoint is None:
        start = task.fresh(form, ctx.derive("small"))
    else:
        start = load_small(task, form, checkpoint, ctx.seed)
        if not epochs:
            return to(start, ctx.device)
    return local_train(
        ctx,
        lambda tree, batch: task.forward(form, tree, batch),
        to(start, ctx.device),
        purpose=PRETRAIN,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        clip=clip,
    )
