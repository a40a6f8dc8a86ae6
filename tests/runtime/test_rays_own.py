"""What is used of Ray that Ray keeps to itself, or may move: where a version of it does, this says so.

How it refuses a token is in `test_joining`.
"""

import inspect
from typing import Any

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException

from fedsim.runtime.spot import AWSNodeProvider, SpotFirst
from fedsim.runtime.submission import RAY


SPOT = {"InstanceType": "g5.xlarge", "InstanceMarketOptions": {"MarketType": "spot"}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray's own provider was asked for; it has no spot instances."""
    found: list[dict[str, Any]] = []

    def create_node(self: Any, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        found.append(node_config)
        if "InstanceMarketOptions" in node_config:
            raise NodeLaunchException("InsufficientInstanceCapacity", "none left", None)
        return {"i-1": tags}

    assert inspect.signature(AWSNodeProvider.create_node).parameters.keys() == {"self", "node_config", "tags", "count"}
    monkeypatch.setattr(AWSNodeProvider, "create_node", create_node)
    return found


def test_what_comes_on_demand_differs_in_its_price_only(asked: list, capsys: pytest.CaptureFixture) -> None:
    provider = SpotFirst.__new__(SpotFirst)  # making one asks AWS
    assert provider.create_node(SPOT, {"a": "tag"}, 1) == {"i-1": {"a": "tag"}}
    assert asked == [SPOT, {"InstanceType": "g5.xlarge"}]
    assert "no spot instances (InsufficientInstanceCapacity): asking for 1 on demand" in capsys.readouterr().out


def test_a_refusal_that_is_not_about_spot_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NodeLaunchException("Unauthorized", "no rights", None)

    monkeypatch.setattr(AWSNodeProvider, "create_node", refuse)
    with pytest.raises(NodeLaunchException, match="no rights"):
        SpotFirst.__new__(SpotFirst).create_node({"InstanceType": "g5.xlarge"}, {}, 1)


def test_the_command_ray_is_in_the_module_that_is_called() -> None:
    from ray.scripts.scripts import cli

    assert RAY[1:] == ("-m", cli.callback.__module__) and {"dashboard", "rsync-down"} <= cli.commands.keys()
