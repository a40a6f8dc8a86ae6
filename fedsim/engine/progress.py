"""What a run tells of itself while it is computed."""

from typing import Any

from fedsim.experiment import Experiment


class ProgressListener:
    """Hears everything and says nothing; displays derive from it."""

    def preparing(self, what: str) -> None:
        """What is done before the run begins."""

    def begin(self, experiment: Experiment, first: int) -> None:
        """A run begins with round `first` (0, or later when it is resumed)."""

    def noted(self, text: str) -> None:
        """Something about the run that a reader must know."""

    def within(self, method: str, done: int, total: int) -> None:
        """Participants that are done with one method of the round that is under way."""

    def finished(self, row: dict[str, Any]) -> None:
        """A round is finished and on disk; `row` is its row of the rounds table."""

    def failed(self, reason: str) -> None:
        """The run broke."""

    def end(self) -> None:
        """The run finished."""

    def close(self) -> None:
        """Whatever happened, an interrupt included: leave the terminal as it was."""
