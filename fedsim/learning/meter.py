"""What training costs, counted: FLOPs, saved bytes, trained parameters; and the accounts of one participant's call."""

import dataclasses
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsim.core.tree import State, mapped
from fedsim.learning.context import LocalContext
from fedsim.learning.objectives import Frozen, Objective, identity
from fedsim.learning.task import Batch, Task
from fedsim.models import Form


PRETRAIN = "pretrain"  # the purpose of training that a participant is assumed to have done before it joins


@dataclasses.dataclass(frozen=True)
class Work:
    """What one training did, or would do with data.

    - `trainable`: scalars with a gradient. - `flops`: forward and backward. - `loss`: mean over the last epoch.
    - `examples`, `steps`: seen, and taken by the optimizer, in all epochs. - `flops_per_step`: of one on full batches.
    - `activation_bytes`: saved for the backward pass of one full batch.
    - `epochs`, `batch_size`, `accumulate`, `drop_last`: as asked for, whether or not there were data.
    - `seconds_per_step`: of one full batch, with an optimizer's step; None unless the meter times.
    - `moments`: numbers that the optimizer keeps of each scalar. - `objective`: names.
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
    accumulate: int = 1
    drop_last: bool = False
    seconds_per_step: float | None = None
    moments: int = 2
    objective: str = ""


@dataclasses.dataclass
class Meter:
    """Collects the `Work` of one participant's call.

    - `counted`: remembers what steps cost, by objective and shapes.
    - `small_sha256`: of the small model that the participant trained for itself, if it did.
    - `downloads`: bytes of each public model that the call began with, by name.
    - `timing`: take the time of a step on a full batch that holds no data, before there is any training.
    """

    counted: dict[tuple, "StepCost"]
    work: list[Work] = dataclasses.field(default_factory=list)
    small_sha256: str | None = None
    downloads: dict[str, int] = dataclasses.field(default_factory=dict)
    timing: bool = False

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

    def cost(self, ctx: LocalContext, objective: Objective, parameters: State, frozen: Frozen) -> "StepCost":
        """What one step costs, measured once for equal objectives on tensors of equal shapes."""
        key = (identity(objective), ctx.task.config, ctx.precision, shapes_of(parameters), shapes_of(frozen))
        if key not in self.counted:
            self.counted[key] = StepCost.measured(ctx, objective, parameters, frozen)
        return self.counted[key]


def shapes_of(tree: Frozen) -> Hashable:
    """Names, shapes and types of nested trees, in order of name."""
    parts = {n: shapes_of(part) if isinstance(part, Mapping) else (part.dtype, *part.shape) for n, part in tree.items()}
    return "tree", *sorted(parts.items(), key=lambda part: part[0])


def autocast(ctx: LocalContext) -> torch.autocast:
    """What forward pass and loss run under: matrix products in bfloat16 where the run asks for it, else nothing."""
    return torch.autocast(ctx.device.type, torch.bfloat16, enabled=ctx.precision == "bf16")


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
    def measured(ctx: LocalContext, objective: Objective, parameters: State, frozen: Frozen) -> "StepCost":
        """Both parts are straight lines in the batch size, so two sizes tell them."""
        with ctx.task.dropping(0):
            with torch.no_grad():  # what is built once (a skeleton) must not be built inside the counting below
                example = {name: tensor.to(ctx.device) for name, tensor in ctx.task.example(1).items()}
                objective(parameters, frozen, example)
            two, three = (step_cost(ctx, objective, parameters, frozen, size) for size in (2, 3))
        per_example = (three[0] - two[0], three[1] - two[1])
        return StepCost((two[0] - 2 * per_example[0], two[1] - 2 * per_example[1]), per_example)


def forward_flops(task: Task, form: Form) -> int:
    """FLOPs of scoring one example with a model of this form, counted as those of a step are."""
    drawn, example = task.fresh(form, 0), task.example(1)
    task.skeleton(form)  # what is built once must not be built inside the counting below
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tree, batch = (mapped(fake.from_tensor, each) for each in (drawn, example))
        with FlopCounterMode(display=False) as counter:
            task.forward(form, tree, batch)
    return counter.get_total_flops()


def step_cost(ctx: LocalContext, objective: Objective, parameters: State, frozen: Frozen, size: int) -> tuple[int, int]:
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
        leaves = mapped(lambda tensor: fake.from_tensor(tensor.detach()).requires_grad_(), parameters)
        batch: Batch = {name: fake.from_tensor(t).to(ctx.device) for name, t in ctx.task.example(size).items()}
        with autocast(ctx):
            loss = objective(leaves, frozen, batch)
        loss.backward()
    return counter.get_total_flops(), sum(saved.values())
