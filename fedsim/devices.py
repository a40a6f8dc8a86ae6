"""Devices and simulated time: how long a round would take where participants own phones, boards and laptops.

All of it is counted, never measured, so no machine changes it. Participant k is busy in round r for

    t_k = 8 bytes_down_k / down_k  +  FLOPs_k / speed_k  +  8 bytes_up_k / up_k     seconds

and the round lasts as long as the server waits: for the slowest of the cohort, until enough updates are there
(`over_selection`), or until the `deadline`. Whoever is later has worked for nothing: the update is left out.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from fedsim.core.fields import check_range, check_types, refuse


MEGABIT, MEBIBYTE = 10**6, 2**20


@dataclasses.dataclass(frozen=True)
class Device:
    """What the owner of a small model computes and talks with.

    - `flops`: floating-point operations a second that training sustains, in fp32.
    - `memory_mb`: memory that training may take, in units of 2^20 bytes.
    - `down_mbps`, `up_mbps`: 10^6 bits a second, from and to the server.
    """

    flops: float
    memory_mb: float
    down_mbps: float
    up_mbps: float

    def __post_init__(self) -> None:
        check_types(self, "device")
        check_range(self, "device", "flops", "memory_mb", "down_mbps", "up_mbps", above=0)

    def seconds(self, *, down: int, flops: int, up: int) -> float:
        """How long it takes to receive `down` bytes, compute, and send `up` bytes."""
        return 8 * down / (self.down_mbps * MEGABIT) + flops / self.flops + 8 * up / (self.up_mbps * MEGABIT)


# Lines: world averages of the Speedtest Global Index, September 2020 (mobile 35.96 Mbit/s down and 11.22 up, fixed
# 85.73 and 45.74). Memory: a quarter of what such a device has, as its owner uses it for other things.
_MOBILE: dict[str, Any] = {"down_mbps": 35.96, "up_mbps": 11.22}
_FIXED: dict[str, Any] = {"down_mbps": 85.73, "up_mbps": 45.74}
PROFILES: Mapping[str, Device] = {
    # Snapdragon 8 series, training on its CPU: 15 to 30 GFLOP/s (Das et al. 2022, arXiv 2202.10100); 8 GB.
    "phone": Device(20e9, 2048, **_MOBILE),
    # Raspberry Pi 4: 8 GFLOP/s of Linpack in double precision (Feiereisen 2022, feiereisen.net); 4 GB.
    "board": Device(8e9, 1024, **_FIXED),
    # Two CPU cores: the 170 GFLOP/s of a plain BERT training step in benchmarks/LOG.md, 2026-11-21; 16 GB.
    "laptop": Device(170e9, 4096, **_FIXED),
    # GeForce RTX 3090: two fifths of the 35.6 TFLOP/s that NVIDIA states for fp32; its 24 GB, not shared with anyone.
    "workstation": Device(14e12, 24576, **_FIXED),
}


def device_named(name: str) -> Device:
    """A profile by name. **Raises:** `ValueError` naming the nearest."""
    if name not in PROFILES:
        close = difflib.get_close_matches(name, PROFILES, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        refuse("device", name, f"one of {', '.join(PROFILES)}, or a Device{meant}")
    return PROFILES[name]


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What keeps participants from taking part, whatever the algorithm. Without any of it everybody always does.

    - `availability`: the probability, by the seed, that a participant can be sampled in a round.
    - `dropout`: the probability, by the seed, that one that was sampled is gone before it has sent its update.
    - `deadline`: simulated seconds after which a round goes on with the updates that are there; None: it waits.
    - `over_selection`: so much larger a cohort is sampled, as a share; the round goes on with the first `cohort`
        updates. All of them are held until the slowest is known, so it costs the aggregator the memory of a cohort.
    - `memory`: what happens to a tier whose device cannot hold what the method asks of it, by count: "refuse" the
        experiment, "exclude" its participants from every round, or "ignore" it.
    """

    availability: float = 1.0
    dropout: float = 0.0
    deadline: float | None = None
    over_selection: float = 0.0
    memory: Literal["refuse", "exclude", "ignore"] = "refuse"

    def __post_init__(self) -> None:
        check_types(self, "conditions")
        check_range(self, "conditions", "availability", "deadline", above=0)
        check_range(self, "conditions", "availability", most=1)
        check_range(self, "conditions", "dropout", least=0)
        check_range(self, "conditions", "over_selection", least=0, most=10)
        if self.dropout >= 1:
            refuse("conditions.dropout", self.dropout, "less than 1: somebody must be left")

    @property
    def timed(self) -> bool:
        """Whether simulated time decides who takes part."""
        return self.deadline is not None or self.over_selection > 0

    def sampled(self, cohort: int, participants: int) -> int:
        """How many are sampled so that `cohort` updates are likely to be there in time."""
        return min(participants, math.ceil(cohort * (1 + self.over_selection)))
