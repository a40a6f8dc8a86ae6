"""What a run consists of, as straight lines over the examples there are: FLOPs, bytes, and seconds on one core."""

import dataclasses

import numpy as np


SCORED = 256  # examples that `Task.score` takes at once

Span = tuple[int, int]  # the first and the last round of a phase


@dataclasses.dataclass(frozen=True)
class Line:
    """A quantity of a batch: a part for the batch and a part for each of its examples."""

    fixed: float
    each: float

    @staticmethod
    def through(one: tuple[int, float], other: tuple[int, float]) -> "Line":
        """The line through two points (size, quantity), neither part below zero."""
        (small, low), (large, high) = sorted((one, other))
        each = max(0.0, (high - low) / (large - small)) if large > small else high / large
        fixed = high - large * each
        return Line(fixed, each) if fixed >= 0 else Line(0.0, high / large)

    def total(self, examples: np.ndarray, batch_size: int) -> np.ndarray:
        """Over all batches of shards of these sizes."""
        return np.ceil(examples / batch_size) * self.fixed + examples * self.each


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training on a participant's shard, and what a batch of it costs; no seconds where none were taken."""

    epochs: int
    batch_size: int
    flops: Line
    seconds: Line | None
    drop_last: bool = False

    def total(self, line: Line, shards: np.ndarray) -> np.ndarray:
        """Over all batches of all epochs on shards of these sizes."""
        left = np.where(shards >= self.batch_size, shards % self.batch_size, 0) if self.drop_last else 0
        return self.epochs * line.total(shards - left, self.batch_size)


@dataclasses.dataclass(frozen=True)
class Model:
    """Seconds it takes to make a model, and to score a batch with it."""

    making: float
    scoring: Line

    def seconds(self, *splits: np.ndarray) -> np.ndarray:
        """To make it once, and to score it on splits of these sizes."""
        return sum((self.scoring.total(examples, SCORED) for examples in splits), np.array(self.making))


@dataclasses.dataclass(frozen=True)
class Part:
    """What a participant does when it begins, or in a round.

    - `sent`: bytes, in both directions. - `beside`: seconds it takes whatever there is to train on.
    - `model`: what it deploys after the round.
    """

    stages: tuple[Stage, ...]
    sent: int
    beside: float
    model: Model | None

    def flops(self, examples: np.ndarray) -> np.ndarray:
        """For shards of these sizes."""
        return sum((each.total(each.flops, examples) for each in self.stages), 0 * examples)

    def seconds(self, examples: np.ndarray) -> np.ndarray:
        """For shards of these sizes, on one core."""
        timed = [(each, each.seconds) for each in self.stages if each.seconds]
        return sum((each.total(line, examples) for each, line in timed), self.beside + 0 * examples)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Rounds in which participants do the same: a part for each tier.

    - `averaging`: seconds of the server, for each update. - `model`: the server's own, if it has one.
    """

    span: Span
    parts: tuple[Part, ...]
    averaging: float
    model: Model | None


@dataclasses.dataclass(frozen=True)
class Outline:
    """A run: what participants of each tier do when they begin, and what they do in its rounds."""

    begun: tuple[Part, ...]
    phases: tuple[Phase, ...]
