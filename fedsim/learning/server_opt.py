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

Every method here that averages has one, as its field `server`, but for Fed-Grow's released code, which runs as it is;
FLoRA stacks instead. In partial training coordinates that nobody trained in a round stay, and so do their moments;
where the model grows, moments begin anew.

Differs from the paper: FedAdagrad has `beta1 = 0`, as in its experiments. Flower's FedAdam (1.41) is another one: its
`v` starts at 0, and its rate carries Adam's correction of bias, `lr sqrt(1 - beta2^(r+1)) / (1 - beta1^(r+1))`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fedsim.core.fields import check_range, check_types, refuse
from fedsim.core.tree import PATH, State, Tree, flat, mapped, nested
from fedsim.core.updates import ClientUpdate, Partial, weighted_mean


M, V = "server_m", "server_v"  # parts of the server's state, beside the model
ALL: State = {}  # no coordinate stays


@dataclasses.dataclass(frozen=True)
class ServerOptimizer:
    """How the server moves towards the mean of what its clients send.

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

    def start(self, model: State) -> State:
        """The server's first state: the model, and its moments where there are any."""
        m = {M: mapped(torch.zeros_like, model)} if self._has_m else {}
        v = {V: mapped(lambda tensor: torch.full_like(tensor, self.tau**2), model)} if self._has_v else {}
        return {**model, **m, **v}

    def after(self, state: State, updates: Iterable[ClientUpdate | Partial]) -> State:
        """The state after a round: a step to the weighted mean of what arrived. Nobody: as it was, momentum too."""
        mean = weighted_mean(updates, like=state)
        return state if mean is state else self.step(state, mean)

    def step(self, state: State, mean: State, where: State = ALL) -> State:
        """The next state. What the mean does not have stays as it is, and so do its moments.

        **Arguments:**

        - `where`: the coordinates that move, of bools under the names of `mean`; those of other names all do.
        """
        before, moving = flat(state), flat(where)
        after = dict(before)
        for name, tensor in flat(mean).items():
            for key, moved in self._moved(name, before, tensor).items():
                after[key] = torch.where(moving[name], moved, before[key]) if name in moving else moved
        return nested(after)

    def _moved(self, name: str, state: Tree, mean: Tensor) -> Tree:
        """One tensor after a step, with its moments."""
        if self.kind == "average":
            return {name: mean}
        x, m_name, v_name = state[name], f"{M}{PATH}{name}", f"{V}{PATH}{name}"
        delta = mean - x
        if self.kind == "avgm":
            m = self.beta1 * state[m_name] + delta
            return {name: x + self.lr * m, m_name: m}
        m = self.beta1 * state[m_name] + (1 - self.beta1) * delta if self._has_m else delta
        v = self._second(state[v_name], delta.square())
        moved = {name: x + self.lr * m / (v.sqrt() + self.tau), v_name: v}
        return moved | {m_name: m} if self._has_m else moved

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


AVERAGE = ServerOptimizer()


def model_of(state: State) -> State:
    """The model in a server's state."""
    return {name: part for name, part in state.items() if name not in (M, V)}
