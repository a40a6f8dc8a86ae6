"""Server optimisers: what the server makes of the mean of the updates (Reddi et al., ICLR 2021, Algorithm 2).

With `x` the server's model, `mean` what its clients' models average to, and `delta = mean - x`:

| kind | m | v | x |
|---|---|---|---|
| `average` | | | `mean` |
| `avgm` | `beta1 m + delta` | | `x + lr m` |
| `adagrad` | `delta` | `v + delta^2` | `x + lr m / (sqrt(v) + tau)` |
| `adam` | `beta1 m + (1 - beta1) delta` | `beta2 v + (1 - beta2) delta^2` | the same |
| `yogi` | the same | `v - (1 - beta2) delta^2 sign(v - delta^2)` | the same |

`avgm` is FedAvgM (Hsu et al. 2019) without dampening. `m` starts at 0 and `v` at tau^2; there is no correction of their
bias. Only `average` is without state and without `lr`. The last three move every scalar by about `lr` at most in a
round, so 1 is far too much for them; the paper's rates lie around 0.01.

Differs from the paper: FedAdagrad has `beta1 = 0`, as in its experiments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedsim.fields import check_range, check_types, refuse
from fedsim.tree import Tree, prefixed, under


MOMENTS = ("server_m.", "server_v.")  # parts of the server's state, beside the model


@dataclasses.dataclass(frozen=True)
class ServerOptimizer:
    """How the server moves towards the mean of its clients' models.

    - `kind`: see the module. - `lr`: of the server. - `beta1`, `beta2`: decay of the moments. - `tau`: how adaptive.
    """

    kind: Literal["average", "avgm", "adagrad", "adam", "yogi"] = "average"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_types(self, "algorithm.server")
        check_range(self, "algorithm.server", "lr", "tau", above=0)
        check_range(self, "algorithm.server", "beta1", "beta2", least=0)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                refuse(f"algorithm.server.{name}", getattr(self, name), "less than 1")
        if self.kind == "average" and self.lr != 1:
            refuse("algorithm.server.lr", self.lr, "1.0 where algorithm.server.kind='average'")

    def start(self, model: Mapping[str, Tensor]) -> Tree:
        """The server's first state: the model, and its moments where there are any."""
        m = {name: torch.zeros_like(tensor) for name, tensor in model.items()} if self._has_m else {}
        v = {name: torch.full_like(tensor, self.tau**2) for name, tensor in model.items()} if self._has_v else {}
        return {**model, **prefixed(m, MOMENTS[0]), **prefixed(v, MOMENTS[1])}

    def step(self, state: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> Tree:
        """The next state."""
        if self.kind == "average":
            return dict(mean)
        x, m, v = model_of(state), under(dict(state), MOMENTS[0]), under(dict(state), MOMENTS[1])
        delta = {name: mean[name] - x[name] for name in x}
        if self.kind == "avgm":
            m = {name: self.beta1 * m[name] + delta[name] for name in x}
            moved = {name: x[name] + self.lr * m[name] for name in x}
            return {**moved, **prefixed(m, MOMENTS[0])}
        m = {name: self.beta1 * m[name] + (1 - self.beta1) * delta[name] for name in x} if self._has_m else {}
        v = {name: self._second(v[name], delta[name].square()) for name in x}
        direction = m or delta
        moved = {name: x[name] + self.lr * direction[name] / (v[name].sqrt() + self.tau) for name in x}
        return {**moved, **prefixed(m, MOMENTS[0]), **prefixed(v, MOMENTS[1])}

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        if self.kind == "adagrad":
            return v + square
        if self.kind == "adam":
            return self.beta2 * v + (1 - self.beta2) * square
        return v - (1 - self.beta2) * square * torch.sign(v - square)

    @property
    def _has_m(self) -> bool:
        return self.kind in ("avgm", "adam", "yogi")

    @property
    def _has_v(self) -> bool:
        return self.kind in ("adagrad", "adam", "yogi")


def model_of(state: Mapping[str, Tensor]) -> Tree:
    """The model in a server's state."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(MOMENTS)}
