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
import secrets
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch

from fedsim.algorithm import (
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
from fedsim.core.tree import flat, nested
from fedsim.experiment import Experiment
from fedsim.privacy import accounting
from fedsim.privacy.accounting import Accountant, Sampled
from fedsim.privacy.mechanism import clipped, noised
from fedsim.privacy.pairs import Around, Arriving, Pair


COUNT = "privacy.unclipped"  # beside an update: b_k - 1/2
CLIP = "clip"  # in the pair's state: C of the next round


@dataclasses.dataclass(frozen=True)
class ParticipantDP(Pair):
    """Clipped updates, and noise. Without either, a run is bit for bit the one without this pair.

    - `clip`: C; the first one where clipping is adaptive. None or infinity: nothing is clipped.
    - `noise_multiplier`: sigma; 0: no noise, and weights stay the method's. - `delta`: for which epsilon is computed.
    - `cohort`: m. - `sampling`: how rounds are sampled, as `fedsim.privacy.accounting` calls it. Both must be the
      experiment's: `calibrated` puts them in. - `accountant`: by which epsilon is computed.
    - `noise`, `clipping`: as above. - `quantile`, `clip_lr`: of the adaptive clip, where it goes and how fast (eta).
    - `count_noise`: sigma_b; None: m / 20, as in the paper, or sigma where that is more.
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
    noise: Literal["central", "distributed", "local"] = "central"
    clipping: Literal["flat", "per_tensor", "adaptive"] = "flat"
    quantile: float = 0.5
    clip_lr: float = 0.2
    count_noise: float | None = None
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
        if self._adaptive:
            for name in ("clip", "cohort"):
                if getattr(self, name) is None:
                    refuse(f"privacy.{name}", None, "given where privacy.clipping='adaptive'")
            if self.noise == "local":
                refuse("privacy.clipping", self.clipping, "'flat' or 'per_tensor' where privacy.noise='local'")
            if self.noise_multiplier and 2 * self._sigma_b <= self.noise_multiplier:
                accepted = f"more than half of privacy.noise_multiplier={self.noise_multiplier}"
                refuse("privacy.count_noise", self.count_noise, accepted)

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
        pairs = getattr(experiment.algorithm, "pairs", ())
        noisy = [pair for pair in pairs if isinstance(pair, ParticipantDP) and pair._uniform]
        if len(noisy) > 1:  # their noise would be one stream
            refuse("algorithm.pairs", pairs, "at most one ParticipantDP with noise")
        if self.noise == "distributed":
            self._check_nobody_missing(experiment)
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
                refuse(name, found, "another where privacy.noise='distributed': shares of who is missing are lacking")

    def spent(self, experiment: Experiment, round: int, trained: Collection[Trainings] = ()) -> dict[str, float]:
        if not self.noise_multiplier:
            return {}
        assert self.delta is not None
        steps = shared_rounds(experiment, round)
        known = self._promised(experiment)
        sigma = self.noise_multiplier * known.pop("factor")
        spent = 0.0 if not steps else accounting.epsilon(noise_multiplier=sigma, steps=steps, delta=self.delta, **known)
        return {"epsilon": spent, "delta": self.delta, "noise_multiplier": self.noise_multiplier}

    def _promised(self, experiment: Experiment) -> dict[str, Any]:
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
        share = {"central": 0.0, "distributed": (self.cohort or 1) ** -0.5, "local": 1.0}[self.noise]
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

    def _stream(self, purpose: str, ctx: ClientContext | ServerContext) -> torch.Generator:
        if self.deployable:
            return torch.Generator().manual_seed(secrets.randbits(63))
        return ctx.generator(f"privacy/{purpose}")


# an experiment's ------------------------------------------------------------------------------------------------------


def calibrated(
    experiment: Experiment,
    *,
    clip: float,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    **fields: Any,
) -> Experiment:
    """The same experiment with a `ParticipantDP` around its method, for its rounds, cohort and sampling.

    **Arguments:**

    - `epsilon`: after the last round; the noise is solved for. - `noise_multiplier`: the noise; epsilon is in the
      tables. One of them. - `delta`: with either. - `clip`, `fields`: further fields of the pair.

    **Raises:** `ValueError` for both or neither, and where no theorem holds.
    """
    if (epsilon is None) == (noise_multiplier is None):
        refuse("epsilon, noise_multiplier", (epsilon, noise_multiplier), "one of them given, the other solved for")
    known = {"cohort": expected(experiment), "sampling": sampling_of(experiment), "delta": delta}
    pair = ParticipantDP(clip, noise_multiplier or 1.0, **known, **fields)
    if epsilon is not None:
        promised = pair._promised(experiment)
        factor, steps = promised.pop("factor"), shared_rounds(experiment, experiment.rounds)
        sigma = accounting.noise_multiplier(epsilon=epsilon, delta=delta, steps=steps, **promised) / factor
        pair = dataclasses.replace(pair, noise_multiplier=sigma)
    method = experiment.algorithm
    inner, others = (method.method, method.pairs) if isinstance(method, Around) else (method, ())
    return dataclasses.replace(experiment, algorithm=Around(inner, (pair, *others)))


def expected(experiment: Experiment) -> int:
    """Participants of a round, in the mean."""
    return experiment.cohort or experiment.participants


def sampling_of(experiment: Experiment) -> Sampled:
    """How rounds are sampled, as accountants call it."""
    return "full" if expected(experiment) == experiment.participants else experiment.sampling


def shared_rounds(experiment: Experiment, round: int) -> int:
    """How many rounds up to this one released something."""
    return sum(experiment.algorithm.stage(each) == "federated" for each in range(1, round + 1))
