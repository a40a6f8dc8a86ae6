"""Differential privacy of examples: whether one was in a participant's shard cannot be told from what it sends.

    every training of a participant    DP-SGD (`fedsim.learning.per_example`), with sigma and C
    after T steps in all               epsilon of T steps at rate B / n   (Mironov, Talwar, Zhang 2019)
    in the tables                      the largest epsilon of any participant

    B  batch size, in the mean    n  examples of the shard, which is taken as public, as weights of means are

Examples are drawn by coins of their own, so amplification by Poisson sampling holds as it stands. All of a method's
trainings are private, those of its first stages, too; what it computes of data by other means is not, and methods that
send such things are refused. What depends on the shard beside what is sent (tables, private states on disk) is private
only as far as it follows from these trainings.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from fedsim.algorithm import Algorithm, ClientContext, Training, Trainings
from fedsim.core.fields import check_types, refuse
from fedsim.experiment import Experiment
from fedsim.learning.per_example import PerExample
from fedsim.privacy import accounting
from fedsim.privacy.accounting import Accountant
from fedsim.privacy.pair import Pair


@dataclasses.dataclass(frozen=True)
class ExampleDP(Pair):
    """DP-SGD in all of a participant's trainings. A method's own clipping of whole gradients is left out.

    - `clip`: of the gradient of one example. - `noise_multiplier`: of a step. - `delta`, `accountant`: of `epsilon`.
    - `deployable`: coins and noise come from the operating system; such a run cannot be repeated.
    """

    clip: float
    noise_multiplier: float
    delta: float
    accountant: Accountant = "rdp"
    deployable: bool = False

    def __post_init__(self) -> None:
        check_types(self, "privacy")
        _ = self._per_example
        if not 0 < self.delta < 1:
            refuse("privacy.delta", self.delta, "between 0 and 1")

    @property
    def _per_example(self) -> PerExample:
        return PerExample(self.clip, self.noise_multiplier, self.deployable)

    def check(self, algorithm: Algorithm, participants: int) -> None:
        if algorithm.updates_vary or algorithm.sends_statistics:
            refuse("algorithm.method", algorithm.name, "a method that sends what it trained, and no statistics of data")

    def check_experiment(self, experiment: Experiment) -> None:
        self.spent(experiment, 0, [Trainings(1, ((1, 1),))])  # what it needs of accounting is missing now, or never
        method: Any = experiment.algorithm
        if sum(isinstance(pair, ExampleDP) for pair in method.pairs) > 1:
            refuse("algorithm.pairs", [type(pair).__name__ for pair in method.pairs], "at most one ExampleDP")
        if self.noise_multiplier and any(pair.spent(experiment, 0) for pair in method.pairs if pair is not self):
            accepted = "one whose epsilon the tables are to have: that of participants or that of examples"
            refuse("algorithm.pairs", [type(pair).__name__ for pair in method.pairs], accepted)
        if (steps := getattr(method.method, "accumulate", 1)) != 1:
            refuse("algorithm.accumulate", steps, "1 where examples are private")
        augmentation = experiment.task.augmentation
        for name in ("mixup", "cutmix") if augmentation is not None else ():
            if found := getattr(augmentation, name):
                refuse(f"task.augmentation.{name}", found, "0 where examples are private: it mixes two into one")

    def training(self, asked: Training, ctx: ClientContext) -> Training:
        return dataclasses.replace(asked, per_example=self._per_example, clip=None)

    def spent(self, experiment: Experiment, round: int, trained: Collection[Trainings] = ()) -> dict[str, float]:
        """Of the participant that has spent most: all of its trainings, at the rate of its largest batches."""
        if not self.noise_multiplier:
            return {}
        taken = {self._taken(each) for each in trained}
        least = {steps: max(rate for rate, other in taken if other == steps) for _, steps in taken}
        worst = max((self._of(rate, steps) for steps, rate in least.items()), default=0.0)
        return {"epsilon": worst, "delta": self.delta, "noise_multiplier": self.noise_multiplier}

    def _taken(self, trained: Trainings) -> tuple[float, int]:
        """The largest rate at which a participant draws its examples, and how many steps it has taken."""
        n = trained.examples
        rate = max(min(1.0, size / n) for size, _ in trained.epochs)
        return rate, sum(epochs * math.ceil(n / size) for size, epochs in trained.epochs)

    def epsilon(self, *, examples: int, batch_size: int, epochs: int) -> float:
        """What a participant has spent.

        - `examples`: n. - `batch_size`: B. - `epochs`: over all of its trainings and rounds, of ceil(n / B) steps each.

        **Raises:** `ValueError` where there is no noise, and for numbers that are none.
        """
        for name, value in (("examples", examples), ("batch_size", batch_size), ("epochs", epochs)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                refuse(name, value, "a whole number, at least 1")
        return self._of(*self._taken(Trainings(examples, ((batch_size, epochs),))))

    def _of(self, rate: float, steps: int) -> float:
        return accounting.epsilon(
            sampling_rate=rate,
            noise_multiplier=self.noise_multiplier,
            steps=steps,
            delta=self.delta,
            accountant=self.accountant,
        )
