"""Who still answers. A process that is frozen (stopped, swapped out) is told from one that computes: both are silent,
but who computes answers a ping from a thread of its own."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from fedsim.runtime.base import Policy, too_slow


MARGIN = 1.25  # of a limit on calls, and a second: a host ends a call itself, where Python can be interrupted
LOOKS = 12  # in the time after which a silent process is lost


class Liveness:
    """Pings actors. Time counts while this process itself runs: where a machine slept, or all was stopped, nobody is
    lost for it.

    - `seconds`: without an answer, and an actor is lost. - `every`: seconds from one look to the next, at most.
    """

    def __init__(self, seconds: float, every: float | None = None) -> None:
        self.seconds, self.every = seconds, min(seconds / LOOKS, every or seconds)
        self.looked = time.monotonic()
        self.asked: dict[Any, tuple[Any, float]] = {}  # key -> its ping, and for how long that has had no answer

    def due(self) -> bool:
        return time.monotonic() - self.looked >= self.every

    def look(self, actors: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
        """Take the answers that have come, and ask anew. **Returns:** answers, and the keys of who is lost."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 2 * self.seconds / LOOKS), now
        self.asked = {key: asked for key, asked in self.asked.items() if key in actors}
        pings = [ping for ping, _ in self.asked.values()]
        ready = set(ray.wait(pings, num_returns=len(pings), timeout=0)[0]) if pings else set()
        answers, lost = {}, []
        for key, actor in actors.items():
            ping, silent = self.asked.get(key, (None, 0.0))
            if ping in ready or ping is None:
                if ping is not None:
                    try:
                        answers[key] = ray.get(ping)
                    except RayError:  # it died, as whoever waits for its work is told
                        continue
                self.asked[key] = (actor.ping.remote(), 0.0)
            else:
                self.asked[key] = (ping, silent + passed)
                if silent + passed >= self.seconds:
                    lost.append(key)
        return answers, lost


class Slow:
    """Participants that had not answered a call in the time that a policy gives it.

    - `times`: participant -> how often. - `refused`: those who are not asked again, and what is said of them.
    """

    def __init__(self, method: str, round: int, policy: Policy) -> None:
        self.method, self.round, self.policy = method, round, policy
        self.times: dict[int, int] = {}
        self.refused: dict[int, str] = {}

    def note(self, ids: Sequence[int], seconds: float) -> bool:
        """Whether these, who have been computed for so long, one or together, are too slow."""
        limit = self.policy.seconds
        if limit is None or seconds <= MARGIN * limit * len(ids) + 1:
            return False
        for id_ in ids:
            self.times[id_] = self.times.get(id_, 0) + 1
            if self.times[id_] > self.policy.again:
                self.refused[id_] = too_slow(self.method, self.round, limit)
        return bool(ids)
