"""What a round knows of each participant, and what it tells the driver: numbers, never tensors."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fedsim.devices import Device
from fedsim.runtime.base import Traffic


Outcome = Literal["in_time", "late", "dropped_out", "excluded", "failed"]


@dataclasses.dataclass(frozen=True)
class ClientReport:
    """A participant's part in a round. Every call of it makes one; those of a round are merged (`then`).

    None stands for what is not known or does not apply; `outcome` is None where it was only scored. Most fields are
    columns of table `clients`, which says what they mean (`fedsim.results.columns`). `weight` is that of the update,
    `init_flops` the part of `flops` that made the private state.
    """

    outcome: Outcome | None = None
    error: str | None = None
    # what crossed the network
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_once: int = 0
    upload_params: int | None = None
    weight: float = 0.0
    metrics: Mapping[str, float] | None = None
    # what was computed
    train_seconds: float | None = None
    train_loss: float | None = None
    flops: int | None = None
    init_flops: int | None = None
    trainable_params: int | None = None
    peak_memory_bytes: int | None = None
    small_sha256: str | None = None
    # scores of what it would deploy
    accuracy: float | None = None
    accuracy_local: float | None = None
    accuracy_val: float | None = None
    accuracy_val_even: float | None = None
    loss: float | None = None
    num_test_examples: int | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    simulated_seconds: float | None = None

    @property
    def trained(self) -> bool:
        """Whether an update of it is known of, in time or late."""
        return self.upload_params is not None

    def then(self, later: "ClientReport") -> "ClientReport":
        """This one and that of a later call in the same round: work adds up, memory keeps its highest mark."""
        merged = {}
        for name, combine in _COMBINE.items():
            first, second = getattr(self, name), getattr(later, name)
            merged[name] = combine(first, second) if first is not None and second is not None else _known(first, second)
        return ClientReport(**merged)

    def failed(self, error: str) -> "ClientReport":
        """The same of a participant that then raised. What became of its update before that stays."""
        return dataclasses.replace(self, outcome=self.outcome or "failed", error=error)

    def client_round_seconds(self, device: Device | None) -> float | None:
        """Simulated seconds from the payload to the update; None if the device is unknown.

        The making of private state when it first takes part (Fed-Grow's local stage) is left out: it needs no payload,
        and is done before its first round begins.
        """
        if device is None:
            return None
        work = (self.flops or 0) - (self.init_flops or 0)
        return device.seconds(down=self.bytes_down, flops=work, up=self.bytes_up)

    def init_seconds(self, device: Device | None) -> float | None:
        """Simulated seconds of the making of private state, in the round in which it was made."""
        return None if device is None else device.seconds(down=0, flops=self.init_flops or 0, up=0)


def _later(first: Any, second: Any) -> Any:
    return second


def _known(first: Any, second: Any) -> Any:
    """Whichever is not None."""
    return first if second is None else second


_ADDED = ("bytes_down", "bytes_up", "bytes_once", "train_seconds", "flops", "init_flops", "trainable_params")
_COMBINE: dict[str, Callable[[Any, Any], Any]] = (
    dict.fromkeys((field.name for field in dataclasses.fields(ClientReport)), _later)
    | dict.fromkeys(_ADDED, operator.add)
    | {"peak_memory_bytes": max, "weight": operator.add, "metrics": operator.or_}
)


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """A finished round, as the aggregator saw it.

    - `clients`: who was called, dropped out or was excluded, by id. - `traffic`: of training, by the runtime's count.
    - `places`: `host`, `node` and `retries` of those who were called.
    - `spent`: seconds by place and phase, for the table `profile`.
    """

    clients: Mapping[int, ClientReport]
    places: Mapping[int, Mapping[str, Any]]
    traffic: Traffic
    bytes_moved: int
    retries: int
    state_sha256: str
    simulated_seconds: float | None
    accuracy_global: float | None
    coverage: float | None
    coverage_min: float | None
    spent: Mapping[str, Mapping[str, float]]
