"""Local training: what a client's method asks for, and the loop that answers."""

import dataclasses
import math
import time
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim.core import tree as trees
from fedsim.core.fields import check_range, refuse
from fedsim.core.tree import PATH, State, Tree, clone, flat, nested
from fedsim.learning.context import LocalContext
from fedsim.learning.meter import PRETRAIN, Work, autocast
from fedsim.learning.objectives import Frozen, Objective, identity
from fedsim.learning.per_example import PerExample
from fedsim.learning.task import Batch


OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["constant", "cosine", "linear"]


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Train a tree on the client's shard with an optimizer made anew: `trained = yield Training(...)`.

    Under `ctx.precision="bf16"` the forward pass and the loss are computed under autocast, the loss from logits in
    fp32. Weights, their gradients and the optimizer's moments stay fp32; bf16 has the range of fp32, so no loss is
    scaled.

    **Arguments:**

    - `objective`: see `fedsim.learning.objectives`. Of a tuple of several, each step draws one, all equally likely;
      such a training is never batched.
    - `start`: the initial values of the trained parameters, in a dict that may be nested: so are the `parameters` that
      the objective gets, and the answer's. It is not modified.
    - `frozen`: tensors that the objective reads and nobody trains, in a dict that may be nested. They are detached.
      Numbers are refused: make them fields of the objective.
    - `purpose`: names this stage in the random stream and in the accounts. Two trainings of one client and round with
      one purpose get the same order of data. "pretrain" is not counted as trained in the federation.
    - `epochs`: passes over the shard. - `batch_size`: examples of one forward and backward pass.
    - `accumulate`: batches a step: its gradient is the mean over the examples of all of them, at the memory of one. An
      epoch ends with a step, on as many batches as are left. Such a training is never batched with other clients'.
    - `drop_last`: leave out what is left of the shard at the end of an epoch, in which it is other examples each time:
      every batch then has `batch_size` examples. A shard that is smaller than that is one batch, not none.
    - `lr`: learning rate. - `lr_of`: learning rates of parts of a nested `start`, by name.
    - `weight_decay`: decoupled with "adamw", in the gradient with "sgd".
    - `clip`: largest global norm of the gradient; None: no clipping.
    - `optimizer`, `momentum`, `nesterov`: AdamW, or SGD with these two.
    - `schedule`: of the learning rate over the steps of this training: it stays, or falls to 0 along a cosine or a
      line. - `lr_warmup`: the share of steps, rounded up and at least 2, over which it first rises: over w steps it is
      1/w, 2/w, ... 1 times `lr`. A training of one step has no warm-up.

    - `per_example`: private steps (DP-SGD) on examples that are drawn one by one, see `fedsim.learning.per_example`;
      None: plain ones. Such a training is never batched with other clients'.

    What the task says of training (`TaskConfig.augmentation`, `label_smoothing`, `dropout`) holds for all of them.

    **Raises:** `TypeError` for an objective that is no frozen dataclass, and for what is no tensor; `ValueError` for a
    setting out of its range.
    """

    objective: Objective | tuple[Objective, ...]
    start: Mapping[str, Any]
    frozen: Frozen = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    purpose: str
    lr: float
    epochs: int
    batch_size: int
    weight_decay: float = 0.0
    clip: float | None = None
    lr_of: Mapping[str, float] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.0
    nesterov: bool = False
    schedule: ScheduleName = "constant"
    lr_warmup: float = 0.0
    accumulate: int = 1
    drop_last: bool = False
    per_example: PerExample | None = None

    def __post_init__(self) -> None:
        for objective in self.objectives:
            identity(objective)
        object.__setattr__(self, "start", _constant(self.start, "start"))
        object.__setattr__(self, "frozen", _constant(self.frozen, "frozen"))
        check_settings(self, "Training")
        if self.per_example is not None and self.accumulate > 1:
            refuse("Training.accumulate", self.accumulate, "1 where Training.per_example is given")
        for part, rate in self.lr_of.items():
            if not isinstance(self.start.get(part), Mapping):
                parts = [name for name, value in self.start.items() if isinstance(value, Mapping)]
                refuse("Training.lr_of", part, f"a part of the nested start: {', '.join(parts) or 'it has none'}")
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
                refuse(f"Training.lr_of[{part!r}]", rate, "a finite number, at least 0")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    def rate(self, name: str) -> float:
        """The learning rate of a tensor of the flat `start`, before any schedule."""
        part, *inner = name.split(PATH)
        return self.lr_of.get(part, self.lr) if inner else self.lr

    def examples_of(self, shard: int) -> int:
        """How many examples an epoch has, of a shard of so many."""
        return shard - shard % self.batch_size if self.drop_last and shard >= self.batch_size else shard

    def scheduled(self, step: int, steps: int) -> float:
        """What a learning rate is multiplied by in a step, counted from 0, of so many."""
        share = math.ceil(self.lr_warmup * steps - 1e-9)  # as of (0.07 * 100) = 7.000000000000001
        rising = min(steps, max(2, share)) if self.lr_warmup else 0
        if step < rising:
            return (step + 1) / rising
        if self.schedule == "constant":
            return 1.0
        passed = (step - rising) / (steps - rising)
        return (1 + math.cos(math.pi * passed)) / 2 if self.schedule == "cosine" else 1 - passed


def check_settings(asked: Any, prefix: str) -> None:
    """**Raises:** `ValueError` naming the setting of a training, or of a method that has them, the value and what is
    accepted."""
    for name, accepted in (("optimizer", OptimizerName), ("schedule", ScheduleName)):
        if getattr(asked, name) not in typing.get_args(accepted):
            refuse(f"{prefix}.{name}", getattr(asked, name), " or ".join(map(repr, typing.get_args(accepted))))
    check_range(asked, prefix, "lr", "weight_decay", "epochs", least=0)
    check_range(asked, prefix, "batch_size", "accumulate", least=1)
    check_range(asked, prefix, "clip", above=0)
    check_range(asked, prefix, "momentum", "lr_warmup", least=0, most=1)
    if asked.momentum and asked.optimizer != "sgd":
        refuse(f"{prefix}.momentum", asked.momentum, f"0 where {prefix}.optimizer is not 'sgd'")
    if asked.nesterov and not asked.momentum:
        refuse(f"{prefix}.nesterov", asked.nesterov, f"False where {prefix}.momentum=0")


def _constant(tree: Frozen, name: str) -> dict[str, Any]:
    """The same trees, of tensors that belong to no graph. **Raises:** `TypeError` naming what is no tensor."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"Training.{name}={tree!r}: must be a tree: tensors, or trees of them, by name")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            found[key] = value.detach() if value.requires_grad else value
        else:
            found[key] = _constant(value, f"{name}[{key!r}]")
    return found


@dataclasses.dataclass(frozen=True)
class Trained:
    """The answer to a `Training`.

    - `parameters`: what was trained, as `start`, detached. - `steps`: how many the optimizer took.
    - `loss`: mean over the last epoch; NaN without data.
    """

    parameters: State
    steps: int
    loss: float


def train(ctx: LocalContext, asked: Training) -> Trained:
    """One training by itself. **Raises:** `FloatingPointError` if the loss is not finite."""
    leaves = {name: tensor.requires_grad_() for name, tensor in flat(clone(asked.start)).items()}
    parameters = nested(leaves)
    groups: dict[float, list[Tensor]] = {}
    for name, leaf in leaves.items():
        groups.setdefault(asked.rate(name), []).append(leaf)
    optimizer = make_optimizer(
        asked, [{"params": members, "lr": rate, "base": rate} for rate, members in groups.items()]
    )
    local = LocalSteps(ctx, asked, leaves)
    private = None
    if asked.per_example is not None:
        expected = min(asked.batch_size, local.shard)
        private = asked.per_example.begin(ctx, asked.objectives, leaves, asked.frozen, asked.purpose, expected)
    for part in local.parts():
        with ctx.task.dropping(part.seed):
            if private is not None:
                loss = private(part.drawn, part.batch)
            else:
                with autocast(ctx):
                    loss = asked.objectives[part.drawn](parameters, asked.frozen, part.batch)
                (loss * part.share).backward()
        if part.last:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * part.scheduled
            if asked.clip is not None:
                torch.nn.utils.clip_grad_norm_(leaves.values(), asked.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        local.note(part, float(loss.detach()))
    return local.end({name: tensor.detach() for name, tensor in leaves.items()})


def make_optimizer(asked: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that a training asks for."""
    if asked.optimizer == "sgd":
        settings = {"momentum": asked.momentum, "nesterov": asked.nesterov}
        return torch.optim.SGD(groups, lr=asked.lr, weight_decay=asked.weight_decay, fused=True, **settings)
    return torch.optim.AdamW(groups, weight_decay=asked.weight_decay, fused=True)


@dataclasses.dataclass(frozen=True)
class StepPart:
    """One forward and backward pass: a whole step, or one of the batches that it accumulates.

    - `drawn`: which of the objectives; the same for the whole step. - `size`: how many examples, in `batch`.
    - `scheduled`: the schedule's factor. - `share`: of the step's examples. - `last`: whether the step is then taken.
    - `seed`: of what models drop out.
    """

    drawn: int
    size: int
    batch: Batch
    scheduled: float
    share: float
    last: bool
    seed: int


class LocalSteps:
    """The steps of one training in order, and its accounts. Whoever computes a part notes it before the next.

    - `leaves`: what is trained, flat, with its names in order.
    """

    def __init__(self, ctx: LocalContext, asked: Training, leaves: Tree) -> None:
        self.ctx, self.asked, self.leaves = ctx, asked, leaves
        self.costs = [ctx.meter.cost(ctx, objective, nested(leaves), asked.frozen) for objective in asked.objectives]
        self.shard = len(ctx.train.labels)
        self.examples = asked.examples_of(self.shard)
        self.taken, self.flops, self.total, self.seen, self.loss = 0, 0, 0.0, 0, float("nan")

    def parts(self) -> Iterator[StepPart]:
        """**Raises:** `FloatingPointError`, at the end of an epoch, if its mean loss is not finite."""
        asked, ctx, examples = self.asked, self.ctx, self.examples
        draws = (ctx.generator(f"{asked.purpose}/{what}") for what in ("order", "mask", "objective", "augment", "drop"))
        order, masking, choosing, augmenting, dropping = draws
        if asked.per_example is not None:
            order = asked.per_example.stream(ctx, f"{asked.purpose}/order")
        several = len(asked.objectives) if len(asked.objectives) > 1 else 0
        a_step = asked.batch_size * asked.accumulate
        in_all = asked.epochs * -(-examples // a_step)
        for _ in range(asked.epochs if examples else 0):
            self.total, self.seen = 0.0, 0
            for chosen in self._chosen(order, a_step):
                drawn = int(torch.randint(several, (), generator=choosing)) if several else 0
                scheduled, left = asked.scheduled(self.taken, in_all), len(chosen)
                for index in chosen.split(asked.batch_size) if asked.per_example is None else (chosen,):
                    left -= len(index)
                    batch = ctx.task.batch(ctx.train, index, ctx.device, masking, augmenting)
                    seed = int(torch.randint(2**62, (), generator=dropping))
                    share = len(index) / max(1, len(chosen))
                    yield StepPart(drawn, len(index), batch, scheduled, share, not left, seed)
            self.loss = self.total / max(1, self.seen)
            if not math.isfinite(self.loss):
                rates = "".join(f", {part}: {rate}" for part, rate in asked.lr_of.items())
                raise FloatingPointError(
                    f"{asked.purpose}: the training loss became {self.loss} after {self.taken} steps "
                    f"with lr={asked.lr}{rates}"
                )

    def _chosen(self, order: torch.Generator, a_step: int) -> Iterable[Tensor]:
        """The examples of every step of an epoch: the shard's in some order, or as coins fall."""
        if self.asked.per_example is None:
            return torch.randperm(self.shard, generator=order)[: self.examples].split(a_step)
        rate, steps = min(1.0, self.asked.batch_size / self.shard), -(-self.examples // a_step)
        return [(torch.rand(self.shard, generator=order) < rate).nonzero()[:, 0] for _ in range(steps)]

    def note(self, part: StepPart, loss: float) -> None:
        """A part was computed, and the step taken if it was the last one; this was its mean loss."""
        self.total += loss * part.size
        self.seen += part.size
        self.taken += part.last
        self.flops += self.costs[part.drawn].flops(part.size)

    def end(self, parameters: Tree) -> Trained:
        """Note the whole training, which gave these, flat."""
        asked, ctx, costs = self.asked, self.ctx, self.costs
        of_batch = sum(cost.flops(asked.batch_size) for cost in costs) / len(costs)
        seconds = None
        if ctx.meter.timing:
            seconds = sum(seconds_of_step(ctx, asked, each) for each in asked.objectives) / len(costs)
        ctx.meter.work.append(
            Work(
                asked.purpose,
                trainable=sum(tensor.numel() for tensor in self.leaves.values()),
                examples=self.examples * asked.epochs,
                steps=self.taken,
                flops=self.flops,
                flops_per_step=round(asked.accumulate * of_batch),
                activation_bytes=max(cost.activation_bytes(asked.batch_size) for cost in costs),
                loss=self.loss,
                epochs=asked.epochs,
                batch_size=asked.batch_size,
                accumulate=asked.accumulate,
                drop_last=asked.drop_last,
                seconds_per_step=seconds,
                moments=2 if asked.optimizer == "adamw" else int(asked.momentum > 0),
                objective="/".join(type(each).__qualname__ for each in asked.objectives),
            )
        )
        if asked.purpose == PRETRAIN and asked.epochs:  # noted, so that methods can be held to the same small models
            ctx.meter.small_sha256 = trees.sha256(nested(parameters))
        return Trained(nested(parameters), self.taken, self.loss)


def seconds_of_step(ctx: LocalContext, asked: Training, objective: Objective) -> float:
    """Wall-clock time of a forward and backward pass on a full batch and of the optimizer's step: the best of three."""
    leaves = {name: tensor.requires_grad_() for name, tensor in flat(clone(asked.start)).items()}
    optimizer = make_optimizer(asked, [{"params": list(leaves.values()), "lr": 0.0}])
    batch = {name: tensor.to(ctx.device) for name, tensor in ctx.task.example(asked.batch_size).items()}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with ctx.task.dropping(0):
            with autocast(ctx):
                value = objective(nested(leaves), asked.frozen, batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
        optimizer.step()
        float(value.detach())  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)
