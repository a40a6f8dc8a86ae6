"""Trainings of several participants as one computation.

    participant k    theta_k, the batch of its next step, its objective
    one pass         losses (L_1 ... L_k) and gradients (g_1 ... g_k), by `vmap` over participants
    one step         each g_k clipped by its own norm, then AdamW on each theta_k with its own count of steps

Shards differ in size, so each participant has a schedule of its own: a pass takes those whose next batches are of one
size. Letters: K participants in all, k in a pass, P parameters of one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fedsim.core.tree import Tree, clone
from fedsim.data.config import Split
from fedsim.learning.alike import Lift, Unlike, alike, filled, lifts
from fedsim.learning.task import Batch
from fedsim.learning.training import Course, Meter, Step, Training, autocast


OWN = (Split, Meter)  # what an objective of all participants never reads: data come in batches


class Differing(Exception):
    """A branch on which participants part. `answers`: which way each goes."""

    def __init__(self, answers: Sequence[bool]) -> None:
        super().__init__(answers)
        self.answers = answers


class Stack:
    """Trainings that are one function on different tensors; those with more steps first: who is left is then a prefix.

    Parameters are the rows of one matrix `(K, P)`, a row a participant, and the rows are the optimiser's tensors: AdamW
    works element by element and counts steps by tensor, and a row without a gradient stays as it is.

    **Raises:** `Unlike`, when it is made or in a step, if they are not one function after all.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.first, self.passes = trainings[0], 0
        self.order = sorted(range(len(trainings)), key=lambda at: -_full_steps(trainings[at]))
        members = [trainings[at] for at in self.order]
        starts = [clone(training.parameters) for training in members]
        self.courses = [Course(training, start) for training, start in zip(members, starts, strict=True)]

        self.objectives = [training.objectives[0] for training in members]
        self.objective = alike(self.objectives, OWN)
        self.common: dict[Lift, Tensor] = {}  # captured tensors that are equal
        self.stacked: dict[Lift, Tensor] = {}  # and those that differ, `(K, ...)`
        for lift in lifts(self.objective):
            if all(torch.equal(lift.tensors[0], other) for other in lift.tensors[1:]):
                self.common[lift] = lift.tensors[0]
            else:
                self.stacked[lift] = torch.stack(lift.tensors)

        names = sorted(starts[0], key=self.first.rate)  # columns with one learning rate lie side by side
        self.shapes = {name: starts[0][name].shape for name in names}
        self.matrix_KP = torch.stack([torch.cat([start[name].flatten() for name in names]) for start in starts])
        self.widths: dict[float, int] = {}
        for name, shape in self.shapes.items():
            rate = self.first.rate(name)
            self.widths[rate] = self.widths.get(rate, 0) + shape.numel()
        self.rows = [part.unbind() for part in self.matrix_KP.split([*self.widths.values()], 1)]
        groups = [{"params": rows, "lr": rate} for rate, rows in zip(self.widths, self.rows, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.first.weight_decay, fused=True)
        self.unread: set[str] | None = None

        ctx = self.first.ctx
        with torch.no_grad():  # what is built once (a skeleton) must not be built inside `vmap`
            self.objectives[0](starts[0], {name: tensor.to(ctx.device) for name, tensor in ctx.task.example(1).items()})

    def trained(self) -> list[Tree | FloatingPointError]:
        """What each training returns or raises, in the order given; its accounts are noted."""
        rest = [course.steps() for course in self.courses]
        errors: dict[int, FloatingPointError] = {}
        upcoming: dict[int, Step] = {}
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
            losses = self._step(moving, [upcoming[member].batch for member in moving])
            for member, loss in zip(moving, losses, strict=True):
                self.courses[member].note(upcoming[member], loss)

        results: dict[int, Tree | FloatingPointError] = {}
        for member, at in enumerate(self.order):
            views = self._tensors(self.matrix_KP[member : member + 1])
            results[at] = errors.get(member) or {name: tensor[0] for name, tensor in clone(views).items()}
        for member, course in enumerate(self.courses):
            if member not in errors:
                course.account()
        return [results[at] for at in range(len(results))]

    def _step(self, active: Sequence[int], batches: Sequence[Batch]) -> list[float]:
        """One step of some participants on batches of one size. **Returns:** their losses."""
        try:
            losses_k, gradients_kP = self._pass(active, batches)
        except Differing as question:  # each way by itself
            losses: dict[int, float] = {}
            for answer in (False, True):
                part = [at for at, given in enumerate(question.answers) if given is answer]
                taken = self._step([active[at] for at in part], [batches[at] for at in part])
                losses |= zip(part, taken, strict=True)
            return [losses[at] for at in range(len(active))]
        if self.first.clip is not None:
            gradients_kP *= (self.first.clip / (gradients_kP.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        self.optimizer.zero_grad(set_to_none=True)
        for rows, part in zip(self.rows, gradients_kP.split([*self.widths.values()], 1), strict=True):
            for member, gradient in zip(active, part.unbind(), strict=True):
                rows[member].grad = gradient
        self.optimizer.step()
        return losses_k.tolist()

    def _pass(self, active: Sequence[int], batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Forward and backward: losses `(k,)` and gradients `(k, P)`. **Raises:** `Differing`, `Unlike`."""
        k, ctx = len(active), self.first.ctx
        some = slice(k) if active[-1] == k - 1 else torch.tensor(active)  # a prefix is not copied
        leaves = {
            name: tensor.detach().requires_grad_() for name, tensor in self._tensors(self.matrix_KP[some]).items()
        }
        if k == 1:
            with autocast(ctx):
                value = self.objectives[active[0]]({name: leaf[0] for name, leaf in leaves.items()}, batches[0])
            losses_k = value[None]
        else:
            batch = {name: torch.stack([each[name] for each in batches]) for name in batches[0]}
            captured = [tensor[some] for tensor in self.stacked.values()]
            with autocast(ctx), _Rules(k):
                losses_k = vmap(self._loss)(leaves, batch, captured)
        found = torch.autograd.grad(losses_k.sum(), list(leaves.values()), allow_unused=True)
        self._check_read({name for name, gradient in zip(leaves, found, strict=True) if gradient is None})
        self.passes += 1
        whole = zip(leaves.values(), found, strict=True)
        columns = [(torch.zeros_like(leaf) if g is None else g).reshape(k, -1) for leaf, g in whole]
        return losses_k.detach(), torch.cat(columns, 1)

    def _loss(self, tree: Tree, batch: Batch, captured: Sequence[Tensor]) -> Tensor:
        """The objective of one participant, with what it has captured."""
        tensors = self.common | dict(zip(self.stacked, captured, strict=True))
        return filled(self.objective, tensors)(tree, batch)

    def _check_read(self, unread: set[str]) -> None:
        """AdamW leaves out a tensor without a gradient. Here it has one of zeros: the same if it always has, and if its
        weights do not decay."""
        if unread and self.first.weight_decay:
            raise Unlike(f"weights decay, and {min(unread)} is not read")
        if self.unread not in (None, unread):
            raise Unlike("what is read differs from step to step")
        self.unread = unread

    def _tensors(self, matrix_kP: Tensor) -> Tree:
        """The parameters, `(k, ...)` each, where they lie."""
        parts = matrix_kP.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class _Rules(TorchFunctionMode):
    """What `vmap` alone refuses or does badly, for k participants: branches, and attention without fused kernels."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__bool__ and is_batchedtensor(args[0]):
            # Models ask whether a mask hides anything, to leave it out if not.
            answers = [bool(answer) for answer in get_unwrapped(args[0]).flatten().tolist()]
            if len(answers) == self.k and len({*answers}) > 1:
                raise Differing(answers)
            if len(answers) == self.k:
                return answers[0]
        if func is F.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    """`F.scaled_dot_product_attention` on its unfused path, and shorter where nobody is kept from seeing anything.

    - `query`, `key`, `value`: `(..., T, D)`.
    """
    scale = settings.get("scale") or query.shape[-1] ** -0.5
    if attn_mask is None and not any(settings.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return ((query * scale) @ key.mT).softmax(-1) @ value
    with sdpa_kernel(SDPBackend.MATH):  # there is no rule for stacking the fused ones on a CPU
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **settings)


def _full_steps(training: Training) -> int:
    return training.epochs * (len(training.ctx.train.labels) // training.batch_size)
