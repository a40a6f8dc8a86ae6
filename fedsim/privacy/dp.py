"""Differential privacy of participants: whether one took part at all cannot be told from what the server releases.

    client      Delta_k <- theta_k - theta                    the whole update; what was not received counts from 0
                Delta_k <- Delta_k min(1, C / |Delta_k|)      and theta + Delta_k is sent, with weight 1
    server      theta <- theta + (sum_k Delta_k + N(0, sigma^2 C^2)) / m

    C      `clip`, in the units of the parameters
    sigma  `noise_multiplier`: of the whole round, whoever adds the noise
    m      `cohort`: the expected number of participants in a round, not that of those who came, which is theirs to hide

This is DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018, algorithm 1, with the estimator of a fixed denominator). Weights
are 1 for all: a sum weighted by numbers of examples changes by C times the largest of them, and they are private, too.

Who adds the noise (`noise`):

- "central": the server, once a round. It sees every update, and is trusted.
- "distributed": each client a share N(0, sigma^2 C^2 / m). Only a sum of all m is private: for use under secure sums,
  and refused where somebody may be missing. Shares are real Gaussians, which a sum of whole numbers would round.
- "skellam": the same in whole numbers, for which the theorem holds as it is computed (Agarwal, Kairouz, Liu 2021): what
  is sent is rounded to multiples of a step s, and each share is s times the difference of two Poisson numbers of mean
  sigma^2 C^2 / 2 s^2 m. Shares add up to one such number exactly. For `SecureSum` or `FixedPointSum` of equal
  `numbers`, and everyone in every round. Compared are a participant and one who sends back what it received.
- "local": each client N(0, sigma^2 C^2). Its own update is private, from everybody. One value stands against any other:
  they are up to 2C apart, so sigma counts as half, and nothing is amplified by sampling.

How it is clipped (`clipping`): "flat"; "per_tensor": each of G tensors to C / sqrt(G), so that no layer crowds out the
others and the whole still has norm C; "adaptive": C follows the quantile `quantile` of the norms (Andrew, Thakkar,
McMahan, Ramaswamy 2021, algorithm 1), of which a noised count is all that is known:

    b_k <- 1 if |Delta_k| <= C else 0
    b   <- (sum_k (b_k - 1/2) + N(0, sigma_b^2)) / m + 1/2
    C   <- C exp(-eta (b - quantile))

Both sums together are one Gaussian mechanism of sigma (their theorem 1): Delta's noise is then sigma_Delta C, with
sigma_Delta^-2 = sigma^-2 - (2 sigma_b)^-2.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import torch

from fedsim.algorithm import (
    LATER,
    Algorithm,
    ClientContext,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    State,
    Trainings,
    Tree,
    whole_sum,
)
from fedsim.core.fields import check_range, check_types, refuse
from fedsim.core.seeding import from_system
from fedsim.core.tree import flat, nested
from fedsim.experiment import Experiment
from fedsim.privacy import accounting
from fedsim.privacy.accounting import Accountant, Sampled
from fedsim.privacy.fixed_point import FixedPoint
from fedsim.privacy.mechanism import clipped, noised, noised_whole
from fedsim.privacy.pair import Arriving, Pair


COUNT = "privacy.unclipped"  # beside an update: b_k - 1/2
CLIP = "clip"  # in the pair's state: C of the next round
MOST_VARIANCE = 2.0**40  # of Poisson numbers, whose probabilities are computed in float64


@dataclasses.dataclass(frozen=True)
class ParticipantDP(Pair):
    """Clipped updates, and noise. Without either, a run is bit for bit the one without this pair.

    - `clip`: C; the first one where clipping is adaptive. None or infinity: nothing is clipped.
    - `noise_multiplier`: sigma; 0: no noise, and weights stay the method's. - `delta`: for which epsilon is computed.
    - `cohort`: m. - `sampling`: how rounds are sampled, as `fedsim.privacy.accounting` calls it. Both must be the
      experiment's: `calibrated` puts them in. - `accountant`: by which epsilon is computed.
    - `noise`, `clipping`: as above. - `quantile`, `clip_lr`: of the adaptive clip, where it goes and how fast (eta).
    - `count_noise`: sigma_b; None: m / 20, as in the paper, or sigma where that is more.
    - `numbers`, `size`: where noise is "skellam", those of the sum, and how many an update has (at most).
    - `deployable`: noise comes from the operating system's randomness, which nobody can compute again from the seed.
      Such a run cannot be repeated, and a round that is computed twice has other numbers.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    delta: float | None = None
    _: dataclasses.KW_ONLY
    cohort: int | None = None
    sampling: Sampled = "full"
    accountant: Accountant = "rdp"
    noise: Literal["central", "distributed", "skellam", "local"] = "central"
    clipping: Literal["flat", "per_tensor", "adaptive"] = "flat"
    quantile: float = 0.5
    clip_lr: float = 0.2
    count_noise: float | None = None
    numbers: FixedPoint = dataclasses.field(default=FixedPoint(fraction=16), metadata=LATER)
    size: int | None = dataclasses.field(default=None, metadata=LATER)
    deployable: bool = False

    def __post_init__(self) -> None:
        check_types(self, "privacy")
        if self.clip == math.inf:
            object.__setattr__(self, "clip", None)
        check_range(self, "privacy", "clip", "clip_lr", "count_noise", above=0)
        check_range(self, "privacy", "noise_multiplier", "quantile", least=0)
        check_range(self, "privacy", "quantile", most=1)
        check_range(self, "privacy", "cohort", least=1)
        if self.delta is not None and not 0 < self.delta < 1:
            refuse("privacy.delta", self.delta, "between 0 and 1")
        if self.noise_multiplier:
            for name in ("clip", "delta", "cohort"):
                if getattr(self, name) is None:
                    refuse(f"privacy.{name}", None, f"given where privacy.noise_multiplier={self.noise_multiplier}")
        if self.noise == "skellam" and self.noise_multiplier:
            self._check_whole()
        if self._adaptive:
            for name in ("clip", "cohort"):
                if getattr(self, name) is None:
                    refuse(f"privacy.{name}", None, "given where privacy.clipping='adaptive'")
            if self.noise in ("local", "skellam"):
                refuse("privacy.clipping", self.clipping, f"'flat' or 'per_tensor' where privacy.noise={self.noise!r}")
            if self.noise_multiplier and 2 * self._sigma_b <= self.noise_multiplier:
                accepted = f"more than half of privacy.noise_multiplier={self.noise_multiplier}"
                refuse("privacy.count_noise", self.count_noise, accepted)

    def _check_whole(self) -> None:
        told = "where privacy.noise='skellam'"
        check_range(self, "privacy", "size", least=1)
        if self.size is None:
            refuse("privacy.size", None, f"given {told}: rounding moves an update by up to its root")
        for name, wanted in (("accountant", "rdp"), ("sampling", "full")):
            if getattr(self, name) != wanted:
                refuse(f"privacy.{name}", getattr(self, name), f"{wanted!r} {told}: no theorem for others")
        if self._variance > MOST_VARIANCE:
            accepted = f"smaller {told}: shares of a variance of {self._variance:.3g} steps cannot be drawn exactly"
            refuse("privacy.numbers.fraction", self.numbers.fraction, accepted)

    @property
    def _variance(self) -> float:
        """Of a share of whole noise, in squared steps."""
        assert self.clip is not None and self.cohort is not None
        return (self.noise_multiplier * self.clip * 2**self.numbers.fraction) ** 2 / self.cohort

    @property
    def _adaptive(self) -> bool:
        return self.clipping == "adaptive"

    @property
    def _uniform(self) -> bool:
        """Whether the mean is over m, all of one weight."""
        return self.noise_multiplier > 0 or self._adaptive

    @property
    def _sigma_b(self) -> float:
        sigma = self.noise_multiplier
        return (self.count_noise or max((self.cohort or 0) / 20, sigma)) if sigma else 0.0

    @property
    def _sigma_delta(self) -> float:
        sigma = self.noise_multiplier
        return (sigma**-2 - (2 * self._sigma_b) ** -2) ** -0.5 if sigma and self._adaptive else sigma

    # what it asks for ---------------------------------------------------------------------------------------------

    @property
    def each(self) -> bool:
        return self._adaptive  # a method's own sum need not know what to do with the count

    @property
    def common(self) -> bool:
        return self._uniform

    @property
    def sums(self) -> bool:
        return self._uniform

    @property
    def noises(self) -> bool:
        return self._uniform

    def check(self, algorithm: Algorithm, participants: int) -> None:
        averages = type(algorithm).combine is not Algorithm.combine
        if self._uniform and (not averages or algorithm.updates_vary):
            refuse("algorithm.method", algorithm.name, "a method that averages updates of one layout, to be noised")

    def check_experiment(self, experiment: Experiment) -> None:
        if not self._uniform:
            return
        conditions, told = experiment.conditions, {"cohort": expected(experiment), "sampling": sampling_of(experiment)}
        for name, value in told.items():
            if getattr(self, name) != value:
                refuse(f"privacy.{name}", getattr(self, name), f"{value!r}, which is the experiment's")
        if conditions.over_selection:  # who is kept depends on the others
            accepted = "0 with noise: one comes, another is left out"
            refuse("conditions.over_selection", conditions.over_selection, accepted)
        if self.sampling == "fixed" and conditions.availability < 1:
            accepted = "1 with noise and sampling='fixed': the share of those who are there is not known"
            refuse("conditions.availability", conditions.availability, accepted)
        pairs: tuple[Any, ...] = getattr(experiment.algorithm, "pairs", ())
        noisy = [pair for pair in pairs if isinstance(pair, ParticipantDP) and pair._uniform]
        if len(noisy) > 1:  # their noise would be one stream
            refuse("algorithm.pairs", pairs, "at most one ParticipantDP with noise")
        if self.noise_multiplier and self.noise != "local" and any(pair.selects for pair in pairs):
            accepted = (
                f"without a robust rule where privacy.noise={self.noise!r}: noise hides a sum, and no other choice"
            )
            refuse("algorithm.pairs", [type(pair).__name__ for pair in pairs], accepted)
        if self.noise in ("distributed", "skellam"):
            self._check_nobody_missing(experiment)
        if self.noise == "skellam" and not (pairs[-1].hides and getattr(pairs[-1], "numbers", None) == self.numbers):
            accepted = f"with a SecureSum or FixedPointSum of numbers={self.numbers} as the last: noise is 'skellam'"
            refuse("algorithm.pairs", [type(pair).__name__ for pair in pairs], accepted)
        self.spent(experiment, experiment.rounds)

    def _check_nobody_missing(self, experiment: Experiment) -> None:
        conditions = experiment.conditions
        for name, found, wanted in (
            ("sampling", experiment.sampling, "fixed"),
            ("on_error", experiment.on_error if experiment.on_error == "drop" else "", ""),
            ("conditions.availability", conditions.availability, 1),
            ("conditions.dropout", conditions.dropout, 0),
            ("conditions.deadline", conditions.deadline, None),
            ("conditions.memory", conditions.memory if conditions.memory == "exclude" else "", ""),
        ):
            if found != wanted:
                refuse(name, found, f"another where privacy.noise={self.noise!r}: shares of who is missing are lacking")

    def spent(self, experiment: Experiment, round: int, trained: Collection[Trainings] = ()) -> dict[str, float]:
        if not self.noise_multiplier:
            return {}
        assert self.delta is not None
        steps = shared_rounds(experiment, round)
        spent = self.spent_in(experiment, steps) if steps else 0.0
        return {"epsilon": spent, "delta": self.delta, "noise_multiplier": self.noise_multiplier}

    def spent_in(self, experiment: Experiment, steps: int) -> float:
        """Epsilon of so many rounds."""
        assert self.delta is not None
        if self.noise == "skellam":
            assert self.clip is not None and self.cohort is not None and self.size is not None
            moved = self.clip * 2**self.numbers.fraction + math.sqrt(self.size)
            return accounting.skellam_epsilon(
                variance=self.cohort * self._variance, moved=moved, size=self.size, steps=steps, delta=self.delta
            )
        known = self.promised(experiment)
        sigma = self.noise_multiplier * known.pop("factor")
        return accounting.epsilon(noise_multiplier=sigma, steps=steps, delta=self.delta, **known)

    def promised(self, experiment: Experiment) -> dict[str, Any]:
        """What the theorem is told, and the `factor` by which it counts sigma."""
        if self.noise == "local":
            return {"sampling_rate": 1.0, "sampling": "full", "accountant": self.accountant, "factor": 0.5}
        rate = expected(experiment) / experiment.participants
        return {"sampling_rate": rate, "sampling": self.sampling, "accountant": self.accountant, "factor": 1.0}

    # at a participant ---------------------------------------------------------------------------------------------

    def client(self, update: ClientUpdate, payload: Payload, sent: State, ctx: ClientContext) -> ClientUpdate:
        clip = float(sent[CLIP]) if self._adaptive else self.clip
        if clip is None:
            return update
        received = flat(payload)
        tree, within = clipped(flat(update.tree), received, clip, per_tensor=self.clipping == "per_tensor")
        if self._uniform:
            self._check_tree(tree, received)
        share = {"central": 0.0, "distributed": (self.cohort or 1) ** -0.5, "local": 1.0, "skellam": 0.0}[self.noise]
        if self.noise == "skellam" and self._uniform:
            if (found := sum(tensor.numel() for tensor in tree.values())) > (self.size or 0):
                refuse("privacy.size", self.size, f"at least {found}, the numbers of an update")
            tree = noised_whole(tree, 2.0**-self.numbers.fraction, self._variance, self._drawn(ctx))
        tree = noised(tree, share * self._sigma_delta * clip, self._stream("noise", ctx))
        if self._adaptive:
            bit = {COUNT: torch.tensor(within - 0.5, dtype=torch.float64)}
            tree |= noised(bit, share * self._sigma_b, self._stream("count", ctx))
        metrics = {**update.metrics, "clipped": 1.0 - within}
        return ClientUpdate(update.client, nested(tree), 1 if self._uniform else update.weight, metrics)

    def _check_tree(self, tree: Tree, received: Tree) -> None:
        if whole := [name for name, tensor in tree.items() if not tensor.is_floating_point()]:
            refuse(f"ClientUpdate.tree[{whole[0]!r}]", tree[whole[0]].dtype, "of floats, to be noised")
        if self.sampling == "poisson" and (other := tree.keys() ^ received.keys()):
            accepted = "received as well as sent where sampling='poisson', for a round of nobody is noised as received"
            refuse("ClientUpdate.tree", min(other), accepted)

    # at the aggregator --------------------------------------------------------------------------------------------

    def start(self) -> State:
        return {CLIP: torch.tensor(self.clip, dtype=torch.float64)} if self._adaptive else {}

    def sent(self, state: State, ctx: ServerContext) -> State:
        return state

    def server(
        self, updates: Arriving, state: State, payload: Callable[[], Payload], ctx: ServerContext
    ) -> tuple[Arriving, State]:
        if not self._uniform:
            return updates, state
        assert self.cohort is not None
        clip = float(state[CLIP]) if self._adaptive else self.clip
        assert clip is not None
        central, total = float(self.noise == "central"), whole_sum(updates)
        tree = flat(payload()) if total is None else total.tree
        came = 0.0 if total is None else total.weight
        if total is None:  # the release of a round must not tell that nobody came
            tree = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tree.items()}
        if self._adaptive:
            none = torch.zeros((), dtype=torch.float64)
            count = noised({COUNT: tree.pop(COUNT, none)}, central * self._sigma_b, self._stream("count", ctx))
            share = float(count[COUNT]) / self.cohort + 0.5
            state = {CLIP: state[CLIP] * math.exp(-self.clip_lr * (share - self.quantile))}
        if came != self.cohort:  # who is missing counts as one who sent back what was received
            for name, tensor in flat(payload()).items():
                if name in tree:
                    tree[name] = tree[name] + (self.cohort - came) * tensor.double()
        tree = noised(tree, central * self._sigma_delta * clip, self._stream("noise", ctx))
        return iter([Partial(tree, self.cohort)]), state

    def _drawn(self, ctx: ClientContext) -> np.random.Generator:
        return np.random.default_rng(None if self.deployable else ctx.derive("privacy/noise"))

    def _stream(self, purpose: str, ctx: ClientContext | ServerContext) -> torch.Generator:
        if self.deployable:
            return from_system()
        return ctx.generator(f"privacy/{purpose}")


# an experiment's ------------------------------------------------------------------------------------------------------


def expected(experiment: Experiment) -> int:
    """Participants of a round, in the mean."""
    return experiment.cohort or experiment.participants


def sampling_of(experiment: Experiment) -> Sampled:
    """How rounds are sampled, as accountants call it."""
    return "full" if expected(experiment) == experiment.participants else experiment.sampling


def shared_rounds(experiment: Experiment, round: int) -> int:
    """How many rounds up to this one released something."""
    return sum(experiment.algorithm.stage(each) == "federated" for each in range(1, round + 1))
