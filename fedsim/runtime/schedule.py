"""Which host computes what in a call: longest first, by what calls took so far. Pure; results never depend on it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence


WORTH = 1.02  # a chunk is cut up where the call would else take longer than this many times the best
WORTH_SECONDS = 0.02  # and at least so much longer: what is cut up travels as several updates, not as one sum, and
# what is moved finds neither its state nor its data in memory


@dataclasses.dataclass(frozen=True)
class Unit:
    """Participants who are computed in one place, one after another: a chunk of the cohort, or one of its members.

    - `seconds`: what it is expected to take. - `hosts`: who may compute it. - `home`: who did so last, if anybody.
    """

    chunk: int
    ids: tuple[int, ...]
    seconds: float
    hosts: frozenset[int]
    home: int | None = None


class Durations:
    """What calls took: for each method and kind of participant a straight line over the size, fitted as they come.

    Hosts differ too: `slowness` is how much longer than expected a host takes, on average over its last calls.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], tuple[float, float, float, float, float]] = {}
        self.slow: dict[int, float] = {}

    def note(self, method: str, kind: str, size: float, seconds: float) -> None:
        """One call of one participant took so long."""
        n, x, y, xx, xy = self.sums.get((method, kind), (0.0,) * 5)
        self.sums[method, kind] = (n + 1, x + size, y + seconds, xx + size * size, xy + size * seconds)

    def note_host(self, host: int, expected: float, seconds: float) -> None:
        """A host took so long for what was expected to take `expected`."""
        if expected > 0:
            self.slow[host] = (self.slow.get(host, 1.0) + seconds / expected) / 2

    def slowness(self, host: int) -> float:
        return self.slow.get(host, 1.0)

    def expected(self, method: str, kind: str, size: float) -> float | None:
        """Seconds; None if no participant of this kind has been called yet."""
        if (method, kind) not in self.sums:
            return None
        n, x, y, xx, xy = self.sums[method, kind]
        spread = n * xx - x * x
        slope = max(0.0, (n * xy - x * y) / spread) if spread > 1e-9 * max(1.0, n * xx) else 0.0
        return max(0.0, (y - slope * x) / n + slope * size)


def assigned(
    units: Sequence[Unit],
    hosts: Collection[int],
    slowness: Mapping[int, float],
    loads: Mapping[int, float] | None = None,
) -> dict[int, list[int]]:
    """Give each unit to a host: the longest first, each to where it is done soonest.

    What hardly matters is left where it was: a participant who stays finds its state in memory.

    - `loads`: seconds of work that hosts have already.

    **Returns:** host -> numbers of units, ascending. Units that no host may compute are nowhere.
    """
    load = {host: (loads or {}).get(host, 0.0) for host in hosts}
    given: dict[int, list[int]] = {host: [] for host in load}
    indifferent = max(WORTH_SECONDS, (WORTH - 1) * sum(unit.seconds for unit in units) / max(1, len(load)))
    for number in sorted(range(len(units)), key=lambda number: (-units[number].seconds, number)):
        unit = units[number]
        ends = {host: load[host] + unit.seconds * slowness.get(host, 1.0) for host in load if host in unit.hosts}
        if not ends:
            continue
        best = min(ends, key=lambda host: (ends[host], host))
        if unit.home in ends and ends[unit.home] <= ends[best] + indifferent:
            best = unit.home
        load[best] = ends[best]
        given[best].append(number)
    return {host: sorted(numbers) for host, numbers in given.items()}


def makespan(units: Sequence[Unit], given: Mapping[int, Sequence[int]], slowness: Mapping[int, float]) -> float:
    """When the last host is done."""
    return max(
        (sum(units[n].seconds for n in numbers) * slowness.get(host, 1.0) for host, numbers in given.items()),
        default=0.0,
    )


def cut_where_it_pays(
    chunks: Sequence[Sequence[Unit]], hosts: Collection[int], slowness: Mapping[int, float]
) -> list[Unit]:
    """Units to assign: whole chunks, cut up into members where hosts would else wait for one another.

    - `chunks`: each as the units of its single members.
    """
    whole = [merged(members) for members in chunks]
    units: list[list[Unit]] = [
        [one] if one is not None else list(members) for one, members in zip(whole, chunks, strict=True)
    ]
    singles = [unit for members in chunks for unit in members]
    best = makespan(singles, assigned(singles, hosts, slowness), slowness)
    while True:
        flat = [unit for pieces in units for unit in pieces]
        given = assigned(flat, hosts, slowness)
        longest = makespan(flat, given, slowness)
        if longest <= max(best * WORTH, best + WORTH_SECONDS):
            return flat
        busiest = max(given, key=lambda host: sum(flat[n].seconds for n in given[host]) * slowness.get(host, 1.0))
        whole_there = [flat[n] for n in given[busiest] if len(flat[n].ids) > 1]
        if not whole_there:
            return flat
        shortest = min(whole_there, key=lambda unit: (unit.seconds, unit.chunk))
        units[shortest.chunk] = list(chunks[shortest.chunk])


def merged(members: Sequence[Unit]) -> Unit | None:
    """A chunk's members as one unit; None if no host may compute them all."""
    hosts = frozenset.intersection(*(unit.hosts for unit in members))
    if not hosts:
        return None
    homes = [unit.home for unit in members if unit.home is not None]
    home = max(homes, key=lambda host: (homes.count(host), -host)) if homes else None
    ids = tuple(id_ for unit in members for id_ in unit.ids)
    return Unit(members[0].chunk, ids, sum(unit.seconds for unit in members), hosts, home)
