"""The nodes of the Ray cluster this process is connected to: what they have, and calls on each of them."""

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


ANSWER_SECONDS = 120.0  # a worker process has to start first, and may have to unpack what was sent to the cluster


def on_every_node(call: Callable[[], Any]) -> dict[str, Any]:
    """What a picklable call returns on every node that is up, by address; text where it cannot be called."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    twice = {address for address in nodes.values() if [*nodes.values()].count(address) > 1}  # simulated nodes
    references = {}
    for id_ in nodes:
        there = NodeAffinitySchedulingStrategy(id_, soft=False)
        references[id_] = ray.remote(_called).options(num_cpus=0, scheduling_strategy=there, max_retries=1).remote(call)
    ray.wait([*references.values()], num_returns=len(references), timeout=ANSWER_SECONDS)
    answers = {}
    for id_, reference in references.items():
        name = f"{nodes[id_]} ({id_[:6]})" if nodes[id_] in twice else nodes[id_]
        try:
            answers[name] = ray.get(reference, timeout=0.1)
        except GetTimeoutError:
            ray.cancel(reference, force=True)
            answers[name] = f"no answer within {ANSWER_SECONDS:g} s"
        except RayError as error:
            answers[name] = str(error).strip().splitlines()[-1]
    return answers


def lost_here() -> bool:
    """Whether this process is cut off: the raylet of its node died, or has not answered for long."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and not node["Alive"] for node in ray.nodes())


def capacities() -> Mapping[str, Mapping[str, float]]:
    """What Ray counts of every node that is up, by address."""
    return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _called(call: Callable[[], Any]) -> Any:
    return call()
