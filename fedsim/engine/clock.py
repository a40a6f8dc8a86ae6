"""Where the aggregator's time goes in a round, by phase."""

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

from fedsim.runtime.base import PHASES, Call


T = TypeVar("T")


class Clock:
    """Seconds of the round under way: of each phase, and `idle` while participants are waited for."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.reset()

    def reset(self) -> None:
        """Start counting anew (a round begins)."""
        self.spent: dict[str, float] = dict.fromkeys((*PHASES, "idle"), 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of something, but for those of waiting within it."""
        started, idle = time.perf_counter(), self.spent["idle"]
        yield
        self.spent[name] += time.perf_counter() - started - (self.spent["idle"] - idle)

    def awaited(self, answers: Iterator[T]) -> Iterator[T]:
        """The same answers, with the seconds of waiting for them counted; summing meanwhile in this process is none."""
        while True:
            started, folded = time.perf_counter(), self.call.folded()
            try:
                answer = next(answers)
            except StopIteration:
                return
            finally:
                folding = self.call.folded() - folded
                self.spent["idle"] += time.perf_counter() - started - folding
                self.spent["sum"] += folding
            yield answer
