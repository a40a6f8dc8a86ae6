"""A file of Ray's cluster launcher, read for what a run needs to know before anything is sent: is there room for it?"""

import bisect
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedsim.core.fields import path_of, refuse
from fedsim.runtime.base import Resources
from fedsim.runtime.placement import Capacity, grouped, misfit


# What a user has to set in the files that come with fedsim: these words, and addresses that are for examples only.
PLACEHOLDERS = re.compile(r"\b\w+-REPLACE\b|\bREPLACE\b|\bPROJECT_ID\b|\b(?:203\.0\.113|192\.0\.2)\.\d+")
MOST_VALUES = 100_000  # of a file
RAYS_OWN_WORKERS = 2  # its default of max_workers


@dataclasses.dataclass(frozen=True)
class NodeType:
    """Nodes that a cluster may have: how many, and what Ray counts of each (`CPU`, `GPU`, `memory` in bytes, ...)."""

    name: str
    most: int
    resources: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ClusterFile:
    """`nodes`: the head first; empty where the file does not say what its nodes have. `workers`: of all types."""

    path: Path
    config: Mapping[str, Any]
    nodes: tuple[NodeType, ...]
    workers: int

    @property
    def grows(self) -> bool:
        """Whether workers come when they are asked for."""
        return bool(self.config.get("available_node_types"))


def read(path: str) -> ClusterFile:
    """**Raises:** `ValueError` for a file that is not one of Ray's cluster launcher."""
    file = path_of(path, "--cluster")
    if not file.is_file():
        refuse("--cluster", path, "a file for `ray up`")
    try:
        config = yaml.safe_load(file.read_text())
        _check_size(config)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--cluster={path!r}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict) or "cluster_name" not in config or not isinstance(config.get("provider"), dict):
        raise ValueError(f"--cluster={path!r}: must be a file for `ray up`, with cluster_name and provider")
    try:
        nodes, workers = _nodes(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--cluster={path!r}: available_node_types cannot be understood ({error!r})") from error
    return ClusterFile(file, config, tuple(nodes), workers)


def _check_size(config: Any) -> None:
    """**Raises:** `ValueError` for a file whose aliases stand for more values than anybody writes, or have no end."""
    waiting, found = [config], 0
    while waiting:
        value, found = waiting.pop(), found + 1
        if found > MOST_VALUES:
            raise ValueError(f"with its aliases written out, it holds more than {MOST_VALUES} values")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _nodes(config: Mapping[str, Any]) -> tuple[Sequence[NodeType], int]:
    """Types of nodes, the head's first, and how many workers there may be of all types together."""
    types = config.get("available_node_types")
    if types:
        most = int(config.get("max_workers", RAYS_OWN_WORKERS))
        head = config["head_node_type"]
        if any("resources" not in kind for kind in types.values()):
            return [], most
        workers = {name: kind for name, kind in types.items() if name != head}
        counts = {name: min(int(kind.get("max_workers", most)), most) for name, kind in workers.items()}
        found = [NodeType(name, counts[name], kind["resources"]) for name, kind in workers.items()]
        return [NodeType(head, 1, types[head]["resources"]), *found], most
    about, count = config.get("metadata") or {}, len(config["provider"].get("worker_ips") or ())
    if "worker_resources" not in about:
        return [], count
    own = NodeType("head", 1, about.get("head_resources") or {})
    return [own, NodeType("worker", count, about["worker_resources"])], count


def faults(cluster: ClusterFile) -> list[tuple[str, str, str]]:
    """What would fail, or leave the cluster open, if this file was used: what about, what, and the remedy."""
    found, text = [], "\n".join(_words(cluster.config))
    left = sorted({*PLACEHOLDERS.findall(text)})
    if left:
        found.append(("placeholders", f"still has {', '.join(left)}", "set the lines marked <<<"))
    mounts = cluster.config.get("file_mounts") or {}
    if not any(str(target).endswith(".ray/auth_token") for target in mounts):
        remedy = "file_mounts: {~/.ray/auth_token: ~/.ray/auth_token}"
        found.append(("token", "no node gets Ray's token", remedy))
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster.config.get(where) or () if "ray start" in command]
        if any("RAY_AUTH_MODE=token" not in command for command in starts) or not starts:
            found.append(("token", f"{where}: Ray is started without RAY_AUTH_MODE=token", "put `export` of it before"))
        if any("dashboard-host=0.0.0.0" in command for command in starts):
            remedy = "leave --dashboard-host out: SSH leads to it"
            found.append(("ports", f"{where}: the job server listens to everybody", remedy))
    for name, source in mounts.items():
        if not Path(str(source)).expanduser().exists():
            made = (
                "`(umask 077; ray get-auth-token --generate > /dev/null)`"
                if "auth_token" in str(source)
                else "run this where the file lies"
            )
            found.append(("files", f"file_mounts: {name}: there is no {source} here", made))
    key = (cluster.config.get("auth") or {}).get("ssh_private_key")
    if key and not Path(str(key)).expanduser().exists():
        found.append(("ssh key", f"auth.ssh_private_key: there is no {key}", "`ssh-keygen -t ed25519 -f` makes one"))
    return found


def _words(value: Any) -> Iterator[str]:
    """Every text in a file, but for its comments."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield str(name)
            yield from _words(each)
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)
    else:
        yield str(value)


def hosts_for(cluster: ClusterFile, demands: Sequence[Mapping[int, Resources]], hosts: int | None) -> int | None:
    """How many hosts the runs can have on a cluster: what was asked for, or the most there is room for.

    - `demands`: of each run, what every participant asks for. - `hosts`: as typed; None: one a participant.

    **Returns:** None where the file does not say what its nodes have. **Raises:** `ValueError` if there is no room.
    """
    if not cluster.nodes:
        return hosts
    return min(_hosts_of_one(cluster, resources, hosts) for resources in demands)


def _hosts_of_one(cluster: ClusterFile, resources: Mapping[int, Resources], hosts: int | None) -> int:
    ids, there = sorted(resources), f"--cluster={str(cluster.path)!r}"
    kinds = [kind for kind in cluster.nodes if kind.most]
    for id_ in ids:
        reasons = [misfit([resources[id_]], _capacity(kind)) for kind in kinds]
        if all(reasons):
            told = "; ".join(f"{kind.name}: {reason}" for kind, reason in zip(kinds, reasons, strict=True))
            raise ValueError(
                f"{there}: no node has what participant {id_} asks for ({told}): take other machines, or ask for less "
                "per participant (tiers.N.num_gpus, num_cpus, memory_mb, resources)"
            )

    def fit(count: int) -> bool:
        return _fits(grouped(resources, ids, count).requests, cluster)

    most = bisect.bisect_left(range(2, (hosts or len(ids)) + 1), True, key=lambda count: not fit(count)) + 1
    if hosts is not None and not fit(hosts):
        nodes = ", ".join(f"{kind.most} x {kind.name}" for kind in kinds)
        raise ValueError(
            f"--hosts={hosts}: {there} has room for {most} ({nodes}, {cluster.workers} workers at once): raise "
            "max_workers, or ask for fewer"
        )
    return hosts or most


def _fits(requests: Sequence[Resources], cluster: ClusterFile) -> bool:
    """Whether these requests fit, each on one node, when as many nodes are up as there may be."""
    head, *kinds = cluster.nodes
    nodes = [(_capacity(head), list[Resources]())]
    left = {kind.name: kind.most for kind in kinds}
    for request in requests:
        held = next((held for there, held in nodes if misfit([*held, request], there) is None), None)
        if held is None:  # one more worker: of the first type that has what is asked for
            able = [kind for kind in kinds if left[kind.name] and misfit([request], _capacity(kind)) is None]
            if not able or len(nodes) > cluster.workers:
                return False
            left[able[0].name] -= 1
            held = list[Resources]()
            nodes.append((_capacity(able[0]), held))
        held.append(request)
    return True


def _capacity(kind: NodeType) -> Capacity:
    amounts = {name: float(amount) for name, amount in kind.resources.items()}
    cpus, gpus, memory = (
        amounts.pop(name, default) for name, default in (("CPU", 0), ("GPU", 0), ("memory", math.inf))
    )
    return Capacity(cpus, [1.0] * int(gpus), memory / 2**20, amounts)
