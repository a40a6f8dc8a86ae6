"""Several models as one, for methods that deploy more than one."""

import math
import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The logarithm of the mean of its members' probabilities: logits of the shape that each of them gives."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, **batch: Tensor) -> types.SimpleNamespace:
        logits = torch.stack([member(**batch).logits.log_softmax(-1) for member in self.members])
        return types.SimpleNamespace(logits=logits.logsumexp(0) - math.log(len(logits)))


class Spliced(nn.Module):
    """A head on a projection of two models' features, side by side; their logits are these features, `(n, d)`."""

    def __init__(self, common: nn.Module, own: nn.Module, projection: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.common, self.own, self.projection, self.head = common, own, projection, head

    def forward(self, **batch: Tensor) -> types.SimpleNamespace:
        features = torch.cat([self.common(**batch).logits, self.own(**batch).logits], 1)
        return types.SimpleNamespace(logits=self.head(self.projection(features)))


class Gated(nn.Module):
    """The logits of one model, and a gate, a scalar, times those of another."""

    def __init__(self, shared: nn.Module, own: nn.Module, gate: Tensor) -> None:
        super().__init__()
        self.shared, self.own, self.gate = shared, own, nn.Parameter(gate.clone(), False)

    def forward(self, **batch: Tensor) -> types.SimpleNamespace:
        logits = self.shared(**batch).logits + self.gate * self.own(**batch).logits
        return types.SimpleNamespace(logits=logits)
