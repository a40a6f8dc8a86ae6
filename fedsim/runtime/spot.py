"""AWS for Ray's cluster launcher, with on-demand instances where AWS has no spot instances; named in cluster.yaml."""

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException


class SpotFirst(AWSNodeProvider):
    """Ray's own provider but for this: Ray 2.60 asks for refused spot instances again and again, every few seconds.

    Which of Ray's node types an instance belongs to, its tags and its rights stay the same: only its price differs.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as refusal:  # in every zone
            if "InstanceMarketOptions" not in node_config:
                raise
            print(f"no spot instances ({refusal.category}): asking for {count} on demand", flush=True)
            on_demand = {name: value for name, value in node_config.items() if name != "InstanceMarketOptions"}
            return super().create_node(on_demand, tags, count)
