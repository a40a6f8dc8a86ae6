"""Where a participant's small model comes from."""

from fedsim.algorithm import ClientContext
from fedsim.training import PRETRAIN, local_train
from fedsim.tree import Tree


def trained_on_own_shard(
    ctx: ClientContext, *, lr: float, epochs: int, batch_size: int, weight_decay: float, clip: float | None
) -> Tree:
    """A model of the participant's own form, trained from scratch on its own shard (as in the paper's code).

    It is what the participant is assumed to bring along: its parameters count as trained nowhere, its cost in round 0.
    """
    form, task = ctx.info.form, ctx.task
    return local_train(
        ctx,
        lambda tree, batch: task.forward(form, tree, batch),
        {name: tensor.to(ctx.device) for name, tensor in task.fresh(form, ctx.derive("small")).items()},
        purpose=PRETRAIN,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        clip=clip,
    )
