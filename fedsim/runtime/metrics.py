"""What Ray's dashboard and Prometheus can draw of a run: rounds, bytes, retries, and how busy the hosts were."""

from typing import Any

from ray.util.metrics import Counter, Gauge


class Metrics:
    """Noted by the server after every round. Names begin with `fedsim_` (Prometheus adds `ray_` before them)."""

    def __init__(self) -> None:
        self.rounds = Counter("fedsim_rounds", "Rounds that the aggregator finished")
        self.moved = Counter("fedsim_bytes_moved", "Bytes that went from one process to another")
        self.traffic = Counter("fedsim_bytes", "Bytes that participants received and sent", tag_keys=("direction",))
        self.retries = Counter("fedsim_retries", "Calls of participants that were repeated")
        self.utilisation = Gauge("fedsim_utilisation", "Part of the last round in which its hosts computed or added up")
        self.seconds = Gauge("fedsim_round_seconds", "Wall-clock seconds of the last round")

    def note(self, call: Any, seconds: float) -> None:
        """A round took so long, and went through this call."""
        self.rounds.inc()
        traffic = call.traffic("train", "answer")
        for counter, amount, tags in (
            (self.moved, call.moved(), {}),
            (self.retries, call.retries(), {}),
            (self.traffic, traffic.down, {"direction": "down"}),
            (self.traffic, traffic.up, {"direction": "up"}),
        ):
            if amount:  # a counter refuses to stand still
                counter.inc(amount, tags)
        self.seconds.set(seconds)
        busy = sum(spent["compute"] + spent["sum"] for spent in call.spent().values())
        if len(call.hosts) and seconds:
            self.utilisation.set(busy / seconds / len(call.hosts))
