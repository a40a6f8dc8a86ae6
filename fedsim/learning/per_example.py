"""DP-SGD: gradients of single examples, clipped, summed and noised (Abadi et al. 2016, algorithm 1).

    one step    every example of the shard by a coin of its own: in the mean B of n
                g_b <- g_b min(1, C / |g_b|)
                g   <- (sum_b g_b + N(0, sigma^2 C^2)) / B

    C      `clip`
    sigma  `noise_multiplier`

The denominator is B, the expected number of examples, never how many came; a step without any is taken, on noise. An
epoch has as many steps as it would have batches. All examples are computed at once (`torch.func.vmap`): a step needs
the memory of B gradients.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.core.fields import check_range, check_types
from fedsim.core.seeding import from_system
from fedsim.core.tree import Tree, nested
from fedsim.learning.context import LocalContext
from fedsim.learning.meter import autocast
from fedsim.learning.objectives import Frozen, Objective
from fedsim.learning.skeleton import masked_attention
from fedsim.learning.task import Batch


@dataclasses.dataclass(frozen=True)
class PerExample:
    """How a training is private.

    - `clip`: C. - `noise_multiplier`: sigma.
    - `deployable`: coins and noise come from the operating system; such a training cannot be repeated.
    """

    clip: float
    noise_multiplier: float
    deployable: bool = False

    def __post_init__(self) -> None:
        check_types(self, "privacy")
        check_range(self, "privacy", "clip", above=0)
        check_range(self, "privacy", "noise_multiplier", least=0)

    def stream(self, ctx: LocalContext, purpose: str) -> torch.Generator:
        """Of coins, or of noise."""
        return from_system() if self.deployable else ctx.generator(purpose)

    def begin(
        self,
        ctx: LocalContext,
        objectives: Sequence[Objective],
        leaves: Tree,
        frozen: Frozen,
        purpose: str,
        expected: int,
    ) -> Callable[[int, Batch], Tensor]:
        """What gives the leaves their gradients, of the objective of this number on a batch, and returns its mean loss.

        - `expected`: B. - `purpose`: the training's.
        """
        noise, std = self.stream(ctx, f"{purpose}/noise"), self.noise_multiplier * self.clip
        for objective in objectives:  # what is built once (a skeleton) must not be built inside `vmap`
            with torch.no_grad(), _batchable(), ctx.task.dropping(0):
                example = {name: tensor.to(ctx.device) for name, tensor in ctx.task.example(1).items()}
                objective(nested(leaves), frozen, example)

        def step(drawn: int, batch: Batch) -> Tensor:
            total, loss = self._summed(ctx, objectives[drawn], leaves, frozen, batch)
            for name in sorted(leaves):
                if std:
                    total[name] += torch.randn(total[name].shape, generator=noise).mul_(std).to(total[name])
                leaves[name].grad = total[name] / expected
            return loss

        return step

    def _summed(
        self, ctx: LocalContext, objective: Objective, leaves: Tree, frozen: Frozen, batch: Batch
    ) -> tuple[Tree, Tensor]:
        """The sum of clipped gradients, and the mean loss; 0 of no example."""
        if not len(batch["labels"]):
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}, torch.zeros(())

        def of_one(tree: Tree, example: Batch) -> Tensor:
            return objective(nested(tree), frozen, {name: tensor[None] for name, tensor in example.items()})

        detached = {name: leaf.detach() for name, leaf in leaves.items()}
        with _batchable(), autocast(ctx):
            found, losses_B = vmap(grad_and_value(of_one), (None, 0), randomness="different")(detached, batch)
        norms_B = torch.stack([each.flatten(1).norm(dim=1) for each in found.values()]).norm(dim=0)
        scale_B = self.clip / norms_B.clamp(min=self.clip)
        return {name: torch.einsum("b,b...->...", scale_B, each) for name, each in found.items()}, losses_B.mean()


@contextlib.contextmanager
def _batchable() -> Iterator[None]:
    """Models decide nothing by what is in a tensor, and compute attention without the fused kernels."""
    with masked_attention(), sdpa_kernel(SDPBackend.MATH):
        yield
