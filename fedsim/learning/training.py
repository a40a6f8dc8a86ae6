"""The one local training loop, and what it notes about itself."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsim.core.fields import check_range, check_types
from fedsim.core.tree import Tree, clone
from fedsim.learning.context import LocalContext
from fedsim.learning.task import Batch


Forward = Callable[[Mapping[str, Tensor], Batch], Tensor]  # (parameters, batch) -> logits
Objective = Callable[[Mapping[str, Tensor], Batch], Tensor]  # (parameters, batch) -> loss
PRETRAIN = "pretrain"  # the purpose of training that a participant is assumed to have done before it joins
COSTS = {"costs": True}  # marks fields of an algorithm that change what a training step costs


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of `local_train` did, or would do with data.

    - `trainable`: scalars with a gradient. - `flops`: forward and backward. - `loss`: mean over the last epoch.
    - `flops_per_step`: of one full batch. - `activation_bytes`: saved for the backward pass of one full batch.
    - `epochs`, `batch_size`: as asked for, whether or not there were data. - `seconds_per_step`: of one full batch;
      None unless the meter times.
    """

    purpose: str
    trainable: int
    examples: int
    steps: int
    flops: int
    flops_per_step: int
    activation_bytes: int
    loss: float
    epochs: int
    batch_size: int
    seconds_per_step: float | None = None


@dataclasses.dataclass
class Meter:
    """Collects the `Work` of one participant's call. `counted` remembers the costs of steps by `key` and shapes.

    - `small_sha256`: of the small model that the participant trained for itself, if it did.
    - `timing`: take the time of a step on a full batch that holds no data, before there is any training.
    """

    key: str
    counted: dict[tuple, "StepCost"]
    work: list[Work] = dataclasses.field(default_factory=list)
    small_sha256: str | None = None
    timing: bool = False

    @staticmethod
    def of(algorithm: Any, counted: dict[tuple, "StepCost"]) -> "Meter":
        """A meter that shares counts between variants of one method: learning rates cost no FLOPs."""
        fields: Any = getattr(algorithm, "__dataclass_fields__", {}).values()
        costly = [f"{f.name}={getattr(algorithm, f.name)}" for f in fields if f.metadata.get("costs")]
        return Meter("/".join([type(algorithm).__qualname__, algorithm.preset_name, *costly]), counted)

    @property
    def trainable(self) -> int:
        """Scalars the participant trains in the federation: one number a purpose, its own pretraining left out."""
        return sum({w.purpose: w.trainable for w in self.work if w.purpose != PRETRAIN}.values())

    @property
    def flops(self) -> int:
        return sum(w.flops for w in self.work)

    @property
    def loss(self) -> float | None:
        """Loss of the last training that saw data."""
        return next((w.loss for w in reversed(self.work) if w.steps), None)

    def cost(self, ctx: LocalContext, objective: Objective, parameters: Tree, purpose: str) -> "StepCost":
        """What one step costs, measured once a shape and precision."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in parameters.items())
        task = (ctx.task.config.family, ctx.task.inputs)
        key = (self.key, purpose, *task, ctx.intermediate, ctx.target, ctx.precision, shapes)
        if key not in self.counted:
            self.counted[key] = StepCost.measured(ctx, objective, parameters)
        return self.counted[key]


def local_train(
    ctx: LocalContext,
    forward: Forward,
    parameters: Mapping[str, Tensor],
    *,
    purpose: str,
    lr: float,
    epochs: int,
    batch_size: int,
    weight_decay: float = 0.0,
    clip: float | None = None,
    lr_under: Mapping[str, float] | None = None,
) -> Tree:
    """`minimise` the task's loss.

    **Arguments:**

    - `forward`: `(parameters, batch) -> logits`. Others: as of `minimise`.
    """
    return minimise(
        ctx,
        [task_loss(ctx, forward)],
        parameters,
        purpose=purpose,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        clip=clip,
        lr_under=lr_under,
    )


def check_settings(algorithm: Any) -> None:
    """**Raises:** `ValueError` for a bad field among those that `settings` reads, or one of the wrong type."""
    check_types(algorithm, "algorithm")
    check_range(algorithm, "algorithm", "lr", "weight_decay", least=0)
    check_range(algorithm, "algorithm", "epochs", "batch_size", least=1)
    check_range(algorithm, "algorithm", "clip", above=0)


def settings(algorithm: Any) -> dict[str, Any]:
    """An algorithm's fields of these names, as `minimise` and `local_train` take them.

    - `lr`, `weight_decay` (decoupled), `clip` (global gradient norm): AdamW, made anew in every round.
    - `epochs`: local epochs a round. - `batch_size`: examples a step.
    """
    return {name: getattr(algorithm, name) for name in ("lr", "epochs", "batch_size", "weight_decay", "clip")}


def proximal(objective: Objective, anchor: Mapping[str, Tensor], mu: float) -> Objective:
    """`objective + mu / 2 |theta - anchor|^2` (FedProx, Li et al., MLSys 2020, equation 2)."""

    def near(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        distance = torch.stack([(parameters[name] - anchor[name]).square().sum() for name in anchor]).sum()
        return objective(parameters, batch) + mu / 2 * distance

    return near


def task_loss(ctx: LocalContext, forward: Forward) -> Objective:
    """The task's loss as a function of parameters; from logits in fp32, for bf16 has three digits."""
    return lambda parameters, batch: ctx.task.loss(forward(parameters, batch).float(), batch)


def minimise(
    ctx: LocalContext,
    objectives: Sequence[Objective],
    parameters: Mapping[str, Tensor],
    *,
    purpose: str,
    lr: float,
    epochs: int,
    batch_size: int,
    weight_decay: float = 0.0,
    clip: float | None = None,
    lr_under: Mapping[str, float] | None = None,
) -> Tree:
    """Train a tree on the client's shard with AdamW (a fresh optimiser, constant learning rate).

    Under `ctx.precision="bf16"` the forward pass and the loss are computed under autocast, the loss from logits in
    fp32. Weights, their gradients and the optimiser's moments stay fp32; bf16 has the range of fp32, so no loss is
    scaled.

    **Arguments:**

    - `objectives`: `(parameters, batch) -> loss`. Of several, each step draws one, all alike.
    - `parameters`: where training starts; not written to.
    - `purpose`: names this stage of work in the random stream and in the accounts.
    - `clip`: largest global norm of the gradient; None: no clipping.
    - `lr_under`: learning rates of the tensors under some prefixes of names, where they are not `lr`.

    **Returns:** the trained tree, detached. **Raises:** `FloatingPointError` if the loss is not finite.
    """
    asked = Training(
        ctx,
        tuple(objectives),
        parameters,
        purpose=purpose,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        clip=clip,
        lr_under=lr_under or {},
    )
    return (MEETING.get() or alone)(asked)


@dataclasses.dataclass(frozen=True)
class Training:
    """One call of `minimise`, before its first step; the fields are its arguments."""

    ctx: LocalContext
    objectives: tuple[Objective, ...]
    parameters: Mapping[str, Tensor]
    purpose: str
    lr: float
    epochs: int
    batch_size: int
    weight_decay: float
    clip: float | None
    lr_under: Mapping[str, float]

    def rate(self, name: str) -> float:
        """The learning rate of a tensor."""
        return next((rate for prefix, rate in self.lr_under.items() if name.startswith(prefix)), self.lr)


# Where trainings meet that are computed together (`fedsim.learning.together`); None: each where it is asked.
MEETING: ContextVar[Callable[[Training], Tree] | None] = ContextVar("MEETING", default=None)


def alone(asked: Training) -> Tree:
    """One training by itself: what `minimise` returns and raises."""
    leaves = {name: tensor.requires_grad_() for name, tensor in clone(asked.parameters).items()}
    optimizer = torch.optim.AdamW(_groups(asked, leaves), weight_decay=asked.weight_decay, fused=True)
    course = Course(asked, leaves)
    for step in course.steps():
        with autocast(asked.ctx):
            value = asked.objectives[step.drawn](leaves, step.batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if asked.clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), asked.clip)
        optimizer.step()
        course.note(step, float(value.detach()))
    course.account()
    return {name: tensor.detach() for name, tensor in leaves.items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step is taken on: which of the objectives, how many examples, and these."""

    drawn: int
    size: int
    batch: Batch


class Course:
    """The steps of one training in order, and its accounts. Whoever takes a step notes it before the next.

    - `leaves`: what is trained, with its names in order.
    """

    def __init__(self, asked: Training, leaves: Tree) -> None:
        self.asked, self.leaves = asked, leaves
        ctx, purpose, objectives = asked.ctx, asked.purpose, asked.objectives
        names = [purpose, *(f"{purpose}/{number}" for number in range(1, len(objectives)))]
        self.costs = [ctx.meter.cost(ctx, each, leaves, name) for each, name in zip(objectives, names, strict=True)]
        self.examples = len(ctx.train.labels)
        self.taken, self.flops, self.total, self.loss = 0, 0, 0.0, float("nan")

    def steps(self) -> Iterator[Step]:
        """**Raises:** `FloatingPointError`, at the end of an epoch, if its mean loss is not finite."""
        asked, ctx, examples = self.asked, self.asked.ctx, self.examples
        order, masking, choosing = (ctx.generator(f"{asked.purpose}/{what}") for what in ("order", "mask", "objective"))
        several = len(asked.objectives) if len(asked.objectives) > 1 else 0
        for _ in range(asked.epochs if examples else 0):
            self.total = 0.0
            for index in torch.randperm(examples, generator=order).split(asked.batch_size):
                batch = ctx.task.batch(ctx.train, index, ctx.device, masking)
                drawn = int(torch.randint(several, (), generator=choosing)) if several else 0
                yield Step(drawn, len(index), batch)
            self.loss = self.total / examples
            if not math.isfinite(self.loss):
                rates = "".join(f", {prefix}*: {rate}" for prefix, rate in asked.lr_under.items())
                raise FloatingPointError(
                    f"{asked.purpose}: the training loss became {self.loss} after {self.taken} steps "
                    f"with lr={asked.lr}{rates}"
                )

    def note(self, step: Step, loss: float) -> None:
        """A step was taken, and this was its mean loss."""
        self.total += loss * step.size
        self.taken += 1
        self.flops += self.costs[step.drawn].flops(step.size)

    def account(self) -> None:
        """Note the whole training, once it is over."""
        asked, ctx, costs = self.asked, self.asked.ctx, self.costs
        seconds = None
        if ctx.meter.timing:
            times = [seconds_of_step(ctx, objective, self.leaves, asked.batch_size) for objective in asked.objectives]
            seconds = sum(times) / len(times)
        ctx.meter.work.append(
            Work(
                asked.purpose,
                trainable=sum(tensor.numel() for tensor in self.leaves.values()),
                examples=self.examples * asked.epochs,
                steps=self.taken,
                flops=self.flops,
                flops_per_step=round(sum(cost.flops(asked.batch_size) for cost in costs) / len(costs)),
                activation_bytes=max(cost.activation_bytes(asked.batch_size) for cost in costs),
                loss=self.loss,
                epochs=asked.epochs,
                batch_size=asked.batch_size,
                seconds_per_step=seconds,
            )
        )


def seconds_of_step(ctx: LocalContext, objective: Objective, parameters: Tree, size: int) -> float:
    """Wall-clock time of a forward and backward pass on `size` examples and of a step of AdamW: the best of three."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0, fused=True)
    batch = {name: tensor.to(ctx.device) for name, tensor in ctx.task.example(size).items()}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with autocast(ctx):
            value = objective(parameters, batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        float(value.detach())  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


def autocast(ctx: LocalContext) -> torch.autocast:
    """What forward pass and loss run under: matrix products in bfloat16 where the run asks for it, else nothing."""
    return torch.autocast(ctx.device.type, torch.bfloat16, enabled=ctx.precision == "bf16")


def _groups(asked: Training, leaves: Tree) -> list[dict[str, Any]]:
    """AdamW's parameter groups: one a learning rate, names in the order of `leaves`."""
    groups: dict[float, list[Tensor]] = {}
    for name, leaf in leaves.items():
        groups.setdefault(asked.rate(name), []).append(leaf)
    return [{"params": members, "lr": rate} for rate, members in groups.items()]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """FLOPs and saved bytes of a training step: a part for the step (growth) and a part for each example."""

    fixed: tuple[int, int]
    per_example: tuple[int, int]

    def flops(self, size: int) -> int:
        """Forward and backward pass on a batch of this size."""
        return self.fixed[0] + size * self.per_example[0]

    def activation_bytes(self, size: int) -> int:
        """What autograd saves for the backward pass on a batch of this size."""
        return self.fixed[1] + size * self.per_example[1]

    @staticmethod
    def measured(ctx: LocalContext, objective: Objective, parameters: Tree) -> "StepCost":
        """Both parts are straight lines in the batch size, so two sizes tell them."""
        with torch.no_grad():  # what is built once (a skeleton) must not be built inside the counting below
            objective(parameters, {name: tensor.to(ctx.device) for name, tensor in ctx.task.example(1).items()})
        two, three = (step_cost(ctx, objective, parameters, size) for size in (2, 3))
        per_example = (three[0] - two[0], three[1] - two[1])
        return StepCost((two[0] - 2 * per_example[0], two[1] - 2 * per_example[1]), per_example)


def step_cost(ctx: LocalContext, objective: Objective, parameters: Tree, size: int) -> tuple[int, int]:
    """FLOPs of a forward and backward pass, and bytes autograd saves in between, on `size` examples.

    Counted on tensors without storage and on the unfused attention path, so FLOPs depend neither on the device nor on
    its kernels (fused attention is not counted on CPU). They do not depend on the precision either; saved bytes do.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        leaves: Tree = {name: fake.from_tensor(t.detach()).requires_grad_() for name, t in parameters.items()}
        batch: Batch = {name: fake.from_tensor(t).to(ctx.device) for name, t in ctx.task.example(size).items()}
        with autocast(ctx):
            loss = objective(leaves, batch)
        loss.backward()
    return counter.get_total_flops(), sum(saved.values())
