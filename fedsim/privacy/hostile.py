"""Hostile participants: what they do to their data, to what they send, or, together, to what arrives.

    delta_k    what participant k's update changes of what it received; honest: the mean mu and, coordinate by
               coordinate, the standard deviation sigma (of the population) of the honest participants' deltas

| attack | what is sent | `scale`, unless given |
|---|---|---|
| `label_flip` | trained on labels C - 1 - y of C classes (Fang et al. 2020) | |
| `backdoor` | scale delta, of examples of which some have a trigger and the `target` label (Gu et al. 2017) | 1 |
| `free_rider` | what was received: it trains nothing (Fraboni et al. 2021, plain) | |
| `sign_flip` | -scale delta (Li et al. 2019) | 1 |
| `scaled` | scale delta (Bagdasaryan et al. 2020) | 10 |
| `noise` | delta + scale N(0, 1) (Blanchard et al. 2017, there without delta) | 0.1 |
| `little` | mu - scale sigma: a little is enough (Baruch et al. 2019) | `z_max` |
| `inner_product` | -scale mu (Xie et al. 2020) | 0.5 |
| `min_max` | mu - gamma sigma, as far from some honest delta as the two farthest are apart | |
| `min_sum` | mu - gamma sigma, its squared distances adding up to those of the farthest honest delta | |

The last four know all honest updates of the round (an omniscient attacker) and all send the same. They are computed at
the aggregator's side of the pair, on what arrived, before the pairs in front of it see it: put `Hostile` last.

`min_max` and `min_sum` are Shejwalkar & Houmansadr's (2021), with their direction "std". Differs from the papers: gamma
is solved for where they halve an interval; mu and sigma are the honest participants' alone. A free rider makes its
private state honestly: it wants the model.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedsim.algorithm import ClientContext, ClientUpdate, Payload, ServerContext, State, Training
from fedsim.core.fields import check_range, check_types, refuse
from fedsim.core.seeding import generator
from fedsim.data.config import PER_TOKEN
from fedsim.data.source import Split
from fedsim.privacy.pair import Arriving, Pair
from fedsim.privacy.vectors import change, changes, squared_distances, with_change


if TYPE_CHECKING:
    from torch import nn

    from fedsim.learning.task import Task

Attack = Literal[
    "label_flip",
    "backdoor",
    "free_rider",
    "sign_flip",
    "scaled",
    "noise",
    "little",
    "inner_product",
    "min_max",
    "min_sum",
]
SCALE = {"backdoor": 1.0, "sign_flip": 1.0, "scaled": 10.0, "noise": 0.1, "inner_product": 0.5}
ON_DATA = ("label_flip", "backdoor")
TOGETHER = ("little", "inner_product", "min_max", "min_sum")


def is_hostile(seed: int, share: float, client: int) -> bool:
    """Whether a participant is, in all rounds: every 1/share-th, from a place that the seed draws; never participant 0.

    Of N participants share N are, where that is a whole number: a participant need not know N to know.
    """
    begin = float(torch.rand((), generator=generator(seed, "hostile"), dtype=torch.float64)) * (1 - share)
    return math.floor(begin + (client + 1) * share) > math.floor(begin + client * share)


@dataclasses.dataclass(frozen=True)
class Hostile(Pair):
    """Some participants are hostile, and all of them do the same.

    - `attack`, `scale`: see the module. - `share`: of the population that is hostile (`is_hostile`), up to a half.
    - `target`: of `backdoor`, the label that triggered inputs are to get. - `poisoned`: the share of an attacker's
      examples that have the trigger. - `trigger`: the side, in pixels, of a white square in the lower right corner; of
      texts, how many tokens after the first one are replaced by the vocabulary's last.

    Tables: accuracies are of all participants, hostile ones too; `clients.metrics` has `hostile` (1 or 0), to choose
    by. With `backdoor`, `backdoor` is there and in `rounds.metrics`, for honest participants alone: the share of test
    inputs of other labels that their models, shown the trigger, give the target label.
    """

    attack: Attack
    share: float
    scale: float | None = None
    target: int = 0
    poisoned: float = 0.5
    trigger: int = 2

    def __post_init__(self) -> None:
        check_types(self, "hostile")
        check_range(self, "hostile", "share", least=0, most=0.5)
        check_range(self, "hostile", "scale", "target", least=0)
        check_range(self, "hostile", "poisoned", least=0, most=1)
        check_range(self, "hostile", "trigger", least=1)
        if self.scale is not None and self.attack not in (*SCALE, "little"):
            refuse("hostile.scale", self.scale, f"None: {self.attack} has none")

    @property
    def each(self) -> bool:
        return self.attack in TOGETHER and self.share > 0

    @property
    def selects(self) -> bool:
        return self.each  # what attackers send is made of what others do

    def check_task(self, task: "Task") -> None:
        inputs = task.inputs
        if self.attack in ON_DATA and inputs.kind in PER_TOKEN:
            refuse("hostile.attack", self.attack, f"another for data of kind {inputs.kind!r}: examples have no labels")
        if self.attack != "backdoor":
            return
        if self.target >= inputs.num_classes:
            refuse("hostile.target", self.target, f"below the number of classes, {inputs.num_classes}")
        most = inputs.image_size if inputs.kind == "image" else (inputs.max_length or 1) - 1
        if most is not None and self.trigger > most:
            refuse("hostile.trigger", self.trigger, f"at most {most}, of inputs of this size")

    # at a participant -----------------------------------------------------------------------------------------------

    def prepare(self, ctx: ClientContext) -> ClientContext:
        split = ctx.train
        if self.attack not in ON_DATA or not len(split) or not self._is(ctx):
            return ctx
        if self.attack == "label_flip":
            flipped = ctx.task.inputs.num_classes - 1 - split.labels
            return dataclasses.replace(ctx, train=Split(split.inputs, flipped, split.groups))
        order = torch.randperm(len(split), generator=generator(ctx.seed, "hostile/backdoor", client=ctx.info.id))
        chosen = order[: round(self.poisoned * len(split))]
        return dataclasses.replace(ctx, train=self.triggered(split, chosen, ctx.task))

    def training(self, asked: Training, ctx: ClientContext) -> Training:
        rides = self.attack == "free_rider" and ctx.round > 0 and self._is(ctx)
        return dataclasses.replace(asked, epochs=0) if rides else asked

    def client(self, update: ClientUpdate, payload: Payload, sent: State, ctx: ClientContext) -> ClientUpdate:
        hostile = self._is(ctx)
        update = dataclasses.replace(update, metrics={**update.metrics, "hostile": float(hostile)})
        if not hostile or not update.tree or self.attack in ("label_flip", "free_rider", *TOGETHER):
            return update
        delta, scale = change(update, payload), _scale(self.attack, self.scale)
        if self.attack == "noise":
            drawn = torch.randn(delta.shape, generator=ctx.generator("hostile/noise"), dtype=delta.dtype)
            return with_change(update, payload, delta + scale * drawn.to(delta.device))
        return with_change(update, payload, (-scale if self.attack == "sign_flip" else scale) * delta)

    def scores(self, model: "nn.Module", test: Split, ctx: ClientContext) -> Mapping[str, float]:
        others = (test.labels != self.target).nonzero().flatten()
        if self.attack != "backdoor" or self._is(ctx) or not len(others):
            return {}
        shown = self.triggered(test.select(others.numpy()), torch.arange(len(others)), ctx.task)
        return {"backdoor": ctx.task.score(model, shown).accuracy}

    def triggered(self, split: Split, index: Tensor, task: "Task") -> Split:
        """The same examples, of which these have the trigger and the target label."""
        inputs = {name: tensor.clone() for name, tensor in split.examples(torch.arange(len(split))).items()}
        if "pixel_values" in inputs:
            pixels = inputs["pixel_values"]  # (N, C, H, W) uint8
            pixels[index, :, -self.trigger :, -self.trigger :] = 255
        else:
            assert task.inputs.vocab_size is not None
            inputs["input_ids"][index, 1 : 1 + self.trigger] = task.inputs.vocab_size - 1
            inputs["attention_mask"][index, 1 : 1 + self.trigger] = 1
        labels = split.labels.clone()
        labels[index] = self.target
        return Split(inputs, labels, split.groups)

    def _is(self, ctx: ClientContext) -> bool:
        return is_hostile(ctx.seed, self.share, ctx.info.id)

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server(
        self, updates: Arriving, state: State, payload: Callable[[], Payload], ctx: ServerContext
    ) -> tuple[Arriving, State]:
        if not self.each:
            return updates, state
        arrived = [update for update in updates if isinstance(update, ClientUpdate)]
        hostile = {update.client for update in arrived if is_hostile(ctx.seed, self.share, update.client)}
        honest = [update for update in arrived if update.tree and update.client not in hostile]
        if not honest or not hostile:
            return arrived, state
        x = changes(honest, payload())
        sent = together(self.attack, x, len(hostile), self.scale)
        return [
            with_change(update, payload(), sent) if update.client in hostile and update.tree else update
            for update in arrived
        ], state


def together(attack: str, honest: Tensor, hostile: int, scale: float | None = None) -> Tensor:
    """What `hostile` participants send, each, who know what the honest ones do.

    - `honest`: `(clients, size)`, in float64. - `scale`: see the module.

    **Returns:** `(size,)`.
    """
    mu, sigma = honest.mean(0), honest.std(0, correction=0)
    if attack == "inner_product":
        return -_scale(attack, scale) * mu
    if attack == "little":
        return mu - (z_max(len(honest) + hostile, hostile) if scale is None else scale) * sigma
    square = sigma.square().sum()
    if not square:
        return mu  # all alike: nowhere to hide
    # Of p = -sigma, norm(mu + gamma p - x_i)^2 = gamma^2 norm(p)^2 + 2 gamma p (mu - x_i) + norm(mu - x_i)^2.
    apart, along = (mu - honest).square().sum(1), (mu - honest) @ -sigma
    distances = squared_distances(honest)
    if attack == "min_sum":
        gamma = ((distances.sum(1).max() - apart.sum()) / (len(honest) * square)).sqrt()
    else:
        gamma = ((-along + (along.square() + square * (distances.max() - apart)).sqrt()) / square).min()
    return mu - gamma * sigma


def _scale(attack: str, scale: float | None) -> float:
    return SCALE[attack] if scale is None else scale


def z_max(clients: int, hostile: int) -> float:
    """How many standard deviations hide among so many clients (Baruch et al. 2019).

    s = floor(n/2 + 1) - m and z = Phi^-1((n - m - s) / (n - m)), of n clients of which m are hostile. At least 0; where
    the hostile are a majority, and there is no such z, that of a share of 0.999.
    """
    supporters = math.floor(clients / 2 + 1) - hostile
    share = (clients - hostile - supporters) / (clients - hostile)
    return NormalDist().inv_cdf(min(max(share, 0.5), 0.999))
