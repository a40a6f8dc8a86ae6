"""Which participants share a host, and what each host asks of Ray. Pure: numbers in, a plan out."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from fedsim.runtime.base import Resources


HOST_MB = 700.0  # what a host process holds before it holds a model: Python, torch, transformers


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What there is. `cpus=None`: hosts may outnumber the cores (a private Ray gets as many logical CPUs as asked)."""

    cpus: float | None
    gpus: Sequence[float]  # free part of each GPU
    memory_mb: float
    custom: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the whole, by name
    share: int = 1  # runs at once: this is what there is for each of them


@dataclasses.dataclass(frozen=True)
class Plan:
    """`groups[h]`: participants of host h, consecutive ids. `requests[h]`: what host h asks for."""

    groups: tuple[tuple[int, ...], ...]
    requests: tuple[Resources, ...]


def part_of(capacity: Capacity, share: int) -> Capacity:
    """What each of `share` runs at once may count on, so that none waits for what another holds.

    CPUs and memory are divided. Of GPUs a run gets whole devices if there are enough, else a fraction of one.
    """
    if share == 1:
        return capacity
    devices = len(capacity.gpus)
    if devices >= share:
        gpus = capacity.gpus[: devices // share]
    else:
        gpus = [1.0 / math.ceil(share / devices)] if devices else []
    cpus = None if capacity.cpus is None else capacity.cpus / share
    custom = {name: amount / share for name, amount in capacity.custom.items()}
    return Capacity(cpus, gpus, capacity.memory_mb / share, custom, share)


def most_cpus(participants: int, num_cpus: float, hosts: int | None, cores: int) -> float:
    """Logical CPUs that the hosts of a run ask for at most, if a participant asks for `num_cpus` at most."""
    if hosts is not None:
        return hosts * num_cpus
    return max(num_cpus, min(participants * num_cpus, cores))


def plan(resources: Mapping[int, Resources], hosts: int | None, capacity: Capacity, cores: int) -> Plan:
    """Give every participant a host.

    `hosts=None`: one actor a participant while they fit in the machine, else as many hosts as fit. A number of hosts is
    taken at its word. A host asks for the most that any of its participants asks for: it runs one at a time.

    **Raises:** `ValueError` with both numbers if the request cannot fit.
    """
    ids = sorted(resources)
    if hosts is not None:
        result = grouped(resources, ids, hosts)
        refuse_what_cannot_fit(result.requests, capacity)
        return result
    limited = dataclasses.replace(capacity, cpus=capacity.cpus if capacity.cpus is not None else float(cores))
    for count in range(len(ids), 0, -1):
        result = grouped(resources, ids, count)
        if misfit(result.requests, limited) is None:
            return result
    refuse_what_cannot_fit(grouped(resources, ids, 1).requests, capacity)
    return grouped(resources, ids, 1)  # more CPUs than cores: logical ones do


def grouped(resources: Mapping[int, Resources], ids: Sequence[int], hosts: int) -> Plan:
    """Consecutive participants, numbers as equal as they can be; hosts beyond the participants stay idle."""
    bounds = [len(ids) * h // hosts for h in range(hosts + 1)]
    groups = tuple(tuple(ids[a:b]) for a, b in itertools.pairwise(bounds))
    return Plan(groups, tuple(largest([resources[id_] for id_ in group or ids]) for group in groups))


def largest(requests: Sequence[Resources]) -> Resources:
    """The request that covers each of several, one at a time."""
    memory = [request.memory_mb for request in requests if request.memory_mb is not None]
    names = sorted({name for request in requests for name, _ in request.custom})
    return Resources(
        max(request.num_cpus for request in requests),
        max(request.num_gpus for request in requests),
        max(memory) if memory else None,
        tuple((name, max(dict(request.custom).get(name, 0.0) for request in requests)) for name in names),
    )


def misfit(requests: Sequence[Resources], capacity: Capacity) -> str | None:
    """Why these hosts do not fit together, with both numbers; None if they do."""
    each = "" if capacity.share == 1 else f" for each of {capacity.share} jobs"
    cpus = sum(request.num_cpus for request in requests)
    if capacity.cpus is not None and cpus > capacity.cpus + 1e-9:
        return f"{len(requests)} hosts ask for {cpus:g} CPUs, but there are {capacity.cpus:g}{each}"
    memory = sum(max(request.memory_mb or 0.0, HOST_MB) for request in requests)
    if memory > capacity.memory_mb:
        return f"{len(requests)} hosts need {memory:.0f} MB of memory, but {capacity.memory_mb:.0f} MB are free{each}"
    for name in sorted({name for request in requests for name, _ in request.custom}):
        amount, there = sum(dict(request.custom).get(name, 0.0) for request in requests), capacity.custom.get(name, 0.0)
        if amount > there + 1e-9:
            return f"{len(requests)} hosts ask for {amount:g} of the resource {name!r}, but there are {there:g}{each}"
    if not packs([request.num_gpus for request in requests], capacity.gpus):
        asked = ", ".join(f"{request.num_gpus:g}" for request in requests)
        return (
            f"{len(requests)} hosts ask for {sum(r.num_gpus for r in requests):g} GPUs ({asked}), "
            f"but there are {sum(capacity.gpus):g} ({len(capacity.gpus)} devices){each}"
        )
    return None


def refuse_what_cannot_fit(requests: Sequence[Resources], capacity: Capacity) -> None:
    """**Raises:** `ValueError` with what was asked and what there is."""
    reason = misfit(requests, capacity)
    if reason is not None:
        fewer = "--hosts" if capacity.share == 1 else "--hosts or --jobs"
        raise ValueError(
            f"{reason}: ask for less per participant (tiers.N.num_gpus, num_cpus, resources) or for fewer {fewer}"
        )


def packs(requests: Sequence[float], devices: Sequence[float]) -> bool:
    """Whether GPU requests fit on devices: a fraction lies on one device, a whole number takes whole ones."""
    free = sorted(devices, reverse=True)
    for request in sorted(requests, reverse=True):
        if request == 0:
            continue
        if request >= 1:
            whole = [i for i, part in enumerate(free) if part >= 1 - 1e-9][: int(request)]
            if len(whole) < int(request):
                return False
            for i in whole:
                free[i] = 0.0
            continue
        place = next((i for i, part in enumerate(free) if part >= request - 1e-9), None)
        if place is None:
            return False
        free[place] -= request
    return True
