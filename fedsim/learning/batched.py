"""Compatible trainings of several clients as one computation.

    client k    theta_k, frozen_k, the batch of its next step; one objective for all
    one pass    losses (L_1 ... L_k) and gradients (g_1 ... g_k), by `torch.func.vmap` over clients
    one step    each g_k clipped by its own norm, then the optimizer on each theta_k with its own count of steps

Trainings are compatible if they have one objective each, and the same (`fedsim.learning.objectives.identity`), tensors
of equal shapes and types, and the same settings; data, purpose and epochs may differ. Shards differ in size, so each
client has its own sequence of steps: a pass takes those whose next batches are of one size. A training by itself gives
the same bits as outside; trainings in a batch agree with that to rounding. Private trainings, those that accumulate
batches, or whose models drop out, are computed by themselves.

Letters: K clients in all, k in a pass, P parameters of one.
"""

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.core.tree import Tree, clone, flat, mapped, nested, ordered
from fedsim.learning.context import LocalContext
from fedsim.learning.meter import autocast, shapes_of
from fedsim.learning.objectives import identity
from fedsim.learning.skeleton import masked_attention
from fedsim.learning.task import Batch
from fedsim.learning.training import LocalSteps, StepPart, Trained, Training, make_optimizer, train


Request = tuple[LocalContext, Training]


@dataclasses.dataclass
class Tally:
    """What became of trainings.

    - `batched`, `alone`: trainings computed with others, and by themselves. - `passes`: forward and backward passes of
      batched trainings; a pass may be one client's. - `reasons`: why compatible trainings were computed alone.
    """

    batched: int = 0
    alone: int = 0
    passes: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)


def train_batched(requests: Sequence[Request], tally: Tally) -> list[Trained | Exception]:
    """What each training returns or raises, in order."""
    groups: dict[Hashable, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(_key(request) or position, []).append(position)
    answers: dict[int, Trained | Exception] = {}
    for members in groups.values():
        group = [requests[member] for member in members]
        found = _as_one(group, tally) if len(group) > 1 else []
        if not found:
            tally.alone += len(group)
            found = [_alone(request) for request in group]
        answers |= zip(members, found, strict=True)
    return [answers[position] for position in range(len(requests))]


def _key(request: Request) -> Hashable:
    """Equal for compatible trainings; None for one that is computed by itself."""
    ctx, asked = request
    tensors = flat(asked.start)
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(asked.objectives) != 1 or len(kinds) != 1 or not asked.epochs * len(ctx.train.labels) or ctx.meter.timing:
        return None
    if asked.accumulate > 1 or asked.per_example is not None or ctx.task.config.dropout:
        return None
    rates = tuple(asked.rate(name) for name in sorted(tensors))
    ours = {"objective", "start", "frozen", "lr", "lr_of", "purpose", "epochs"}
    settings = [getattr(asked, field.name) for field in dataclasses.fields(asked) if field.name not in ours]
    shapes = (shapes_of(tensors), shapes_of(asked.frozen))
    return (identity(asked.objectives[0]), rates, *shapes, *kinds, *settings, ctx.device, ctx.precision)


def _alone(request: Request) -> Trained | Exception:
    try:
        return train(*request)
    except Exception as error:  # of any kind: it belongs to the client
        return error


def _as_one(group: Sequence[Request], tally: Tally) -> Sequence[Trained | Exception]:
    """What each training of a group returns or raises; nothing if it turns out that they cannot be computed as one."""
    try:
        batch = _Batch(group)
        found = batch.trained()
    except Exception as error:  # of any kind: if it belongs to one of them, that one raises it again when it is alone
        tally.reasons.append(f"{type(error).__name__}: {error}")
        return ()
    tally.batched += len(group)
    tally.passes += batch.passes
    return found


class _Batch:
    """Compatible trainings; those with more steps first: who is left is then a prefix.

    Parameters are the rows of one matrix `(K, P)`, a row a client, and the rows are the optimizer's tensors: it works
    element by element and counts steps by tensor, and a row without a gradient stays as it is.
    """

    def __init__(self, group: Sequence[Request]) -> None:
        self.passes = 0
        self.order = sorted(range(len(group)), key=lambda at: -_full_steps(*group[at]))
        members = [group[at] for at in self.order]
        self.ctx, self.first = members[0]
        self.objective = self.first.objectives[0]
        starts = [flat(clone(asked.start)) for _, asked in members]
        self.locals = [LocalSteps(*member, start) for member, start in zip(members, starts, strict=True)]

        self.shared: Tree = {}  # frozen tensors that are equal
        self.stacked: Tree = {}  # and those that differ, `(K, ...)`
        frozen = [flat(ordered(asked.frozen)) for _, asked in members]
        for path, tensor in frozen[0].items():
            each = [leaves[path] for leaves in frozen]
            if all(other is tensor or torch.equal(other, tensor) for other in each):
                self.shared[path] = tensor
            else:
                self.stacked[path] = torch.stack(each)

        names = sorted(starts[0], key=self.first.rate)  # columns with one learning rate lie side by side
        self.shapes = {name: starts[0][name].shape for name in names}
        self.matrix_KP = torch.stack([torch.cat([start[name].flatten() for name in names]) for start in starts])
        self.widths: dict[float, int] = {}
        for name, shape in self.shapes.items():
            rate = self.first.rate(name)
            self.widths[rate] = self.widths.get(rate, 0) + shape.numel()
        self.rows = [part.unbind() for part in self.matrix_KP.split([*self.widths.values()], 1)]
        # A schedule runs on each client's own steps: then every row has a learning rate of its own.
        self.scheduled = self.first.schedule != "constant" or self.first.lr_warmup > 0
        groups: list[dict[str, Any]] = []
        for rate, rows in zip(self.widths, self.rows, strict=True):
            parts = [[row] for row in rows] if self.scheduled else [list(rows)]
            groups += [{"params": part, "lr": rate, "base": rate, "member": at} for at, part in enumerate(parts)]
        self.optimizer = make_optimizer(self.first, groups)
        self.unread: set[str] | None = None

        with torch.no_grad(), self._batchable():  # what is built once (a skeleton) must not be built inside `vmap`
            example = {name: tensor.to(self.ctx.device) for name, tensor in self.ctx.task.example(1).items()}
            self.objective(nested(starts[0]), self.first.frozen, example)

    def trained(self) -> list[Trained | FloatingPointError]:
        """What each training returns or raises, in the order given; its accounts are noted."""
        rest = [local.parts() for local in self.locals]
        errors: dict[int, FloatingPointError] = {}
        upcoming: dict[int, StepPart] = {}
        moving: Sequence[int] = range(len(rest))
        while True:
            for member in moving:
                upcoming.pop(member, None)
                try:
                    upcoming.update((member, step) for step in [next(rest[member], None)] if step is not None)
                except FloatingPointError as error:
                    errors[member] = error
            if not upcoming:
                break
            size = min(step.size for step in upcoming.values())  # the last of an epoch first: then all have a full one
            moving = [member for member in sorted(upcoming) if upcoming[member].size == size]
            losses = self._step(moving, [upcoming[member] for member in moving])
            for member, loss in zip(moving, losses, strict=True):
                self.locals[member].note(upcoming[member], loss)
        results: dict[int, Trained | FloatingPointError] = {}
        for member, at in enumerate(self.order):
            views = self._tensors(self.matrix_KP[member : member + 1])
            parameters = {name: tensor[0] for name, tensor in clone(views).items()}
            results[at] = errors.get(member) or self.locals[member].end(parameters)
        return [results[at] for at in range(len(results))]

    def _step(self, active: Sequence[int], steps: Sequence[StepPart]) -> list[float]:
        """One step of some clients on batches of one size. **Returns:** their losses."""
        losses_k, gradients_kP = self._pass(active, [step.batch for step in steps])
        if self.first.clip is not None:
            gradients_kP *= (self.first.clip / (gradients_kP.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        self.optimizer.zero_grad(set_to_none=True)
        for rows, part in zip(self.rows, gradients_kP.split([*self.widths.values()], 1), strict=True):
            for member, gradient in zip(active, part.unbind(), strict=True):
                rows[member].grad = gradient
        if self.scheduled:
            factors = dict(zip(active, (step.scheduled for step in steps), strict=True))
            for group in self.optimizer.param_groups:
                group["lr"] = group["base"] * factors.get(group["member"], 1.0)
        self.optimizer.step()
        return losses_k.tolist()

    def _pass(self, active: Sequence[int], batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Forward and backward: losses `(k,)` and gradients `(k, P)`."""
        k = len(active)
        some = slice(k) if active[-1] == k - 1 else torch.tensor(active)  # a prefix is not copied
        tensors = self._tensors(self.matrix_KP[some])
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        frozen = [tensor[some] for tensor in self.stacked.values()]
        if k == 1:
            with autocast(self.ctx):
                one = {name: leaf[0] for name, leaf in leaves.items()}
                losses_k = self._loss(one, batches[0], [tensor[0] for tensor in frozen])[None]
        else:
            batch = self.ctx.task.stacked(batches)
            with self._batchable(), autocast(self.ctx):
                losses_k = vmap(self._loss)(leaves, batch, frozen)
        found = torch.autograd.grad(losses_k.sum(), list(leaves.values()), allow_unused=True)
        self._check_read({name for name, gradient in zip(leaves, found, strict=True) if gradient is None})
        self.passes += 1
        whole = zip(leaves.values(), found, strict=True)
        columns = [(torch.zeros_like(leaf) if g is None else g).reshape(k, -1) for leaf, g in whole]
        return losses_k.detach(), torch.cat(columns, 1)

    @contextlib.contextmanager
    def _batchable(self) -> Iterator[None]:
        """Models decide nothing by what is in a tensor, and compute attention without the fused kernels."""
        with masked_attention(), sdpa_kernel(SDPBackend.MATH):
            yield

    def _loss(self, tree: Tree, batch: Batch, stacked: Sequence[Tensor]) -> Tensor:
        """The objective of one client, with its frozen tensors."""
        tensors = self.shared | dict(zip(self.stacked, stacked, strict=True))
        given = self.first.frozen
        found = iter([tensors[name] for name in flat(given)])
        return self.objective(nested(tree), mapped(lambda _: next(found), given), batch)

    def _check_read(self, unread: set[str]) -> None:
        """An optimizer leaves out a tensor without a gradient. Here it has one of zeros: the same if it always has, and
        if its weights do not decay."""
        if unread and self.first.weight_decay:
            raise ValueError(f"weights decay, and {min(unread)} is not read")
        if self.unread not in (None, unread):
            raise ValueError("what is read differs from step to step")
        self.unread = unread

    def _tensors(self, matrix_kP: Tensor) -> Tree:
        """The parameters, `(k, ...)` each, where they lie."""
        parts = matrix_kP.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def _full_steps(ctx: LocalContext, asked: Training) -> int:
    return asked.epochs * (len(ctx.train.labels) // asked.batch_size)
