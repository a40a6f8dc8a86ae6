"""The cluster files without a cloud: Ray's and Kubernetes' schemas, what their commands do, the workers Ray prefers."""

import copy
import importlib
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click import ClickException
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil

from tests.support.clouds import (
    CLUSTER,
    KUBERNETES_FILES,
    LAUNCHER_FILES,
    ROOT,
    TOKEN,
    changed,
    program,
    run_as_ray_does,
    words_after,
)


MESSAGES = importlib.import_module("ray.core.generated.instance_manager_pb2")  # has no types to import
LAUNCHERS = {name: yaml.safe_load(path.read_text()) for name, path in LAUNCHER_FILES.items()}
CLOUDS = ("aws", "gcp")
WRITTEN = [LAUNCHER_FILES["aws"], *sorted(CLUSTER.iterdir())]


def starts(config: dict[str, Any]) -> list[str]:
    """The commands that start Ray: the head's, a worker's."""
    return [
        command
        for kind in ("head", "worker")
        for command in config[f"{kind}_start_ray_commands"]
        if "ray start" in command
    ]


# The launcher's files


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_launcher_files(name: str) -> None:
    prepared = prepare_config(copy.deepcopy(LAUNCHERS[name]))
    validate_config(prepared)
    assert prepared["cluster_name"] == "fedsim"
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == LAUNCHERS[name]["setup_commands"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("aws", lambda config: config.update(setup_comands=[])),
        ("aws", lambda config: config.update(max_workers="4")),
        ("aws", lambda config: config["auth"].update(user="ubuntu")),
        ("aws", lambda config: config["available_node_types"]["gpu_spot"].update(max_worker=4)),
        ("aws", lambda config: config["available_node_types"]["gpu_spot"]["resources"].update(GPU="1")),
        ("gcp", lambda config: config["available_node_types"]["head"].pop("resources")),
        ("local", lambda config: config.update(metadata=[])),
    ],
)
def test_ray_refuses_them_with_a_slip(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(changed(LAUNCHERS[name], change)))


def test_ray_refuses_node_types_for_own_machines() -> None:
    """Why `local.yaml` tells what its machines have under `metadata`."""
    with pytest.raises(ClickException, match="available_node_types is not supported for on-premise clusters"):
        prepare_config(LAUNCHERS["local"] | {"available_node_types": {"gpu": {"resources": {}, "node_config": {}}}})


@pytest.mark.parametrize("config", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_node_gets_the_token_and_what_the_packages_are_made_of(config: dict[str, Any]) -> None:
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    needed = [*packages, "pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"]
    assert {local: remote for remote, local in mounts.items() if not local.startswith("~")} == {
        path: f"~/fedsim/{path}" for path in needed
    }
    assert all((ROOT / path).exists() for path in needed)


@pytest.mark.parametrize("config", LAUNCHERS.values(), ids=LAUNCHERS)
def test_the_same_commands_install_on_every_node(config: dict[str, Any]) -> None:
    assert config["head_setup_commands"] == config["worker_setup_commands"] == config["initialization_commands"] == []
    installs = [command for command in config["setup_commands"] if "fedsim-env/bin/pip install" in command]
    assert len(installs) == 1
    assert "-c ~/fedsim/constraints.txt" in installs[0]
    assert not any("curl" in command or "wget" in command for command in config["setup_commands"])


@pytest.mark.parametrize("config", LAUNCHERS.values(), ids=LAUNCHERS)
def test_ray_is_started_with_the_token_and_an_inner_dashboard(config: dict[str, Any]) -> None:
    head, worker = starts(config)
    for command in (head, worker):
        before, _, arguments = command.partition(" ray start ")
        assert "export RAY_AUTH_MODE=token " in before
        assert before.startswith("test -s ~/.ray/auth_token ||")
        assert "token" not in arguments
    assert words_after(head.split(), "--dashboard-host") == "127.0.0.1"
    assert words_after(head.split(), "--dashboard-port") == "8265"
    assert words_after(head.split(), "--autoscaling-config") == "~/ray_bootstrap_config.yaml"
    assert words_after(worker.split(), "--address") == "$RAY_HEAD_IP:6379"
    assert "dashboard" not in worker


@pytest.mark.parametrize("config", LAUNCHERS.values(), ids=LAUNCHERS)
def test_ray_is_not_started_without_a_token(config: dict[str, Any], tmp_path: Path) -> None:
    home, programs = tmp_path / "home", tmp_path / "programs"
    note = f'echo "$RAY_AUTH_MODE $*" >> {tmp_path}/started'
    program(home / "fedsim-env" / "bin" / "ray", note)
    token = home / ".ray" / "auth_token"
    for command in starts(config):
        for content in (None, ""):
            token.unlink(missing_ok=True)
            if content is not None:
                token.parent.mkdir(exist_ok=True)
                token.write_text(content)
            done = run_as_ray_does(command, home, programs, RAY_HEAD_IP="192.0.2.1")
            assert done.returncode == 1
            assert 'No token: make one as the top of this file says, then "ray up" again' in done.stderr
            assert not (tmp_path / "started").exists()
        token.write_text(TOKEN)
        done = run_as_ray_does(command, home, programs, RAY_HEAD_IP="192.0.2.1")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        started = (tmp_path / "started").read_text()
        assert started.startswith("token start --")
        assert TOKEN not in started
        (tmp_path / "started").unlink()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_setup_commands_work_twice_on_a_bare_machine(name: str, tmp_path: Path) -> None:
    """Every program notes that it was called; those that would make another one, make it."""
    home, programs, noted = tmp_path / "home", tmp_path / "programs", tmp_path / "noted"
    note = f'echo "$(basename "$0") $*" >> {noted}'
    program(tmp_path / "pip", note)
    program(tmp_path / "uv", f'{note}; mkdir -p "${{@: -1}}/bin" && cp {tmp_path}/pip "${{@: -1}}/bin"')
    program(programs / "sudo", note)
    program(programs / "python3", f'{note}; mkdir -p "${{@: -1}}/bin" && cp {tmp_path}/{{pip,uv}} "${{@: -1}}/bin"')
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    (home / ".ray" / "auth_token").chmod(0o644)
    for time in ("first", "second"):
        for command in LAUNCHERS[name]["setup_commands"]:
            done = run_as_ray_does(command, home, programs)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), (time, command)
        calls = noted.read_text().splitlines()
        noted.unlink()
        extra = "" if name == "local" else f"[{name}]"
        last = (
            f"pip install --quiet --disable-pip-version-check -c {home}/fedsim/constraints.txt -e {home}/fedsim{extra}"
        )
        assert calls[-1] == last
        assert calls[-2].startswith("uv venv") and calls[-2].endswith(
            f"--python 3.11 --managed-python {home}/fedsim-env"
        )
        if time == "second":
            assert len(calls) == 2, "a node that is set up is not set up again"
        elif name == "local":
            assert not any(call.startswith("sudo") for call in calls), "nobody is root on other people's machines"
        else:
            assert [call for call in calls if call.startswith("sudo")][-1].endswith("install -y python3-venv")
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / ".ray").stat().st_mode) == 0o700
    written = (home / ".bashrc").read_text()
    assert written == 'export PATH="$HOME/fedsim-env/bin:$PATH" RAY_AUTH_MODE=token\n'


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_differ_in_price_only_and_come_from_nothing(name: str) -> None:
    config = LAUNCHERS[name]
    types = config["available_node_types"]
    assert list(types) == ["head", "gpu_spot", "gpu_on_demand"]
    assert types["head"]["resources"] == {"CPU": 0}
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["resources"] == on_demand["resources"] == {"CPU": 4, "GPU": 1}
    assert (spot["priority"], on_demand["priority"]) == (1, 0)
    assert {each["min_workers"] for each in (spot, on_demand)} == {0}
    assert config["max_workers"] == 4
    assert config["idle_timeout_minutes"] == 10
    price = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[name]
    without = [{key: value for key, value in each["node_config"].items() if key != price} for each in (spot, on_demand)]
    assert without[0] == without[1]
    assert spot["node_config"][price] != on_demand["node_config"].get(price)


def test_google_cloud_is_closed_too() -> None:
    text = LAUNCHER_FILES["gcp"].read_text()
    assert "0.0.0.0/0" not in text
    assert "--allow=tcp:22 \\\n#          --source-ranges=203.0.113.7/32" in text
    for node_type in LAUNCHERS["gcp"]["available_node_types"].values():
        node = node_type["node_config"]
        assert node["networkInterfaces"][0]["subnetwork"].endswith("/subnetworks/fedsim"), "not the default network"
        assert (node["tags"], node["labels"]) == ({"items": ["fedsim"]}, {"project": "fedsim"})
        assert node["disks"][0]["autoDelete"] is True


def test_own_machines_say_what_they_have() -> None:
    config = LAUNCHERS["local"]
    machines = config["provider"]["worker_ips"]
    assert config["min_workers"] == config["max_workers"] == len(machines) == 2
    assert config["metadata"] == {"head_resources": {"CPU": 0}, "worker_resources": {"CPU": 8, "GPU": 1}}
    assert words_after(starts(config)[0].split(), "--num-cpus") == "0"


# Which workers Ray asks for


def asked_for(
    config: dict[str, Any], gpus: int, monitor: CloudResourceMonitor, head_type: str = "head"
) -> dict[str, int]:
    """The new nodes that Ray's scheduler wants, with a head there, for participants with a GPU each."""
    read = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    head = MESSAGES.Instance(instance_id="0", instance_type=head_type, status=MESSAGES.Instance.ALLOCATED)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=read.get_node_type_configs(),
        max_num_nodes=read.get_max_num_nodes(),
        current_instances=[AutoscalerInstance(im_instance=head, cloud_instance_id="i-0")],
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 1, "GPU": 1})] * gpus),
        cloud_resource_availabilities=monitor.get_resource_availabilities(),
        recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


def told(status: int) -> CloudResourceMonitor:
    """What Ray remembers after a spot worker came to this."""
    monitor = CloudResourceMonitor()
    event = MESSAGES.InstanceUpdateEvent(instance_id="1", new_instance_status=status, instance_type="gpu_spot")
    monitor.notify([event])
    return monitor


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_first_then_on_demand_and_never_more_than_allowed(name: str) -> None:
    config, fresh = LAUNCHERS[name], CloudResourceMonitor()
    assert asked_for(config, 2, fresh) == {"gpu_spot": 2}
    assert asked_for(config, 2, told(MESSAGES.Instance.ALLOCATION_TIMEOUT)) == {"gpu_on_demand": 2}
    assert asked_for(config, 9, fresh) == {"gpu_spot": 4}, "max_workers"
    types = config["available_node_types"]
    fewer = config | {"available_node_types": types | {"gpu_spot": types["gpu_spot"] | {"max_workers": 1}}}
    assert asked_for(fewer, 3, fresh) == {"gpu_spot": 1, "gpu_on_demand": 2}
    none = config | {"available_node_types": types | {"gpu_spot": types["gpu_spot"] | {"max_workers": 0}}}
    assert asked_for(none, 2, fresh) == {"gpu_on_demand": 2}, "the way out of a refusal"


def test_without_priorities_nothing_is_preferred() -> None:
    """Ray then takes equal types in turn."""
    types = {
        name: {key: value for key, value in node_type.items() if key != "priority"}
        for name, node_type in LAUNCHERS["aws"]["available_node_types"].items()
    }
    config = LAUNCHERS["aws"] | {"available_node_types": types}
    assert asked_for(config, 2, CloudResourceMonitor()) == {"gpu_spot": 1, "gpu_on_demand": 1}


def test_a_refusal_at_once_does_not_lower_spot() -> None:
    """What Ray 2.60 does when a cloud refuses an instance; the cluster files tell the way out. If this fails, Ray has
    learned to fall back by itself: those comments can go."""
    waiting = MESSAGES.Instance(
        instance_id="1", instance_type="gpu_spot", launch_request_id="r", status=MESSAGES.Instance.REQUESTED
    )
    refused = LaunchNodeError("gpu_spot", 1, "r", 0, details="InsufficientInstanceCapacity")
    event = Reconciler._try_resolve_pending_allocation(
        waiting, {}, {("r", "gpu_spot"): refused}, {("r", "gpu_spot"): 1}
    )
    assert event is not None
    assert event.new_instance_status == MESSAGES.Instance.ALLOCATION_FAILED
    assert asked_for(LAUNCHERS["aws"], 2, told(MESSAGES.Instance.ALLOCATION_FAILED)) == {"gpu_spot": 2}


def test_own_machines_are_left_to_the_older_autoscaler() -> None:
    """The newer one would use one machine fewer than there are. If this fails, it has learned to count: `local.yaml`
    need not put it off."""
    config, kind = LAUNCHERS["local"] | {"auth": {"ssh_user": "me"}}, "local.cluster.node"
    assert len(config["provider"]["worker_ips"]) == 2
    assert asked_for(config, 0, CloudResourceMonitor(), head_type=kind) == {kind: 1}
    asks, _, starting = starts(config)[0].partition("ray start ")
    assert "export RAY_enable_autoscaler_v2=0;" in asks, "after what `ray up` puts before the command"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starting
    for name in CLOUDS:
        assert "autoscaler_v2" not in LAUNCHER_FILES[name].read_text()


# All of them


SECRETS = re.compile(r"AKIA[0-9A-Z]{16}|\b[0-9a-fA-F]{32,}\b|PRIVATE KEY|ghp_|xox[bp]-|eyJ[A-Za-z0-9_-]{10,}\.")


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_nothing_looks_like_a_secret_and_no_line_is_too_long(path: Path) -> None:
    text = path.read_text()
    assert SECRETS.search(text) is None
    assert re.search(r"\bami-[0-9a-f]{8,}|\bsg-[0-9a-f]{8,}|\b\d{12}\b", text) is None, "an account's own"
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert "0.0.0.0" not in text


def test_what_looks_like_a_secret_is_found() -> None:
    for text in ("AKIAABCDEFGHIJKLMNOP", "-----BEGIN RSA PRIVATE KEY-----", "token: " + "0a" * 20):
        assert SECRETS.search(text) is not None
    assert SECRETS.search("aws_profile: default") is None


def test_files_are_those_that_are_tested() -> None:
    assert {path.name for path in WRITTEN} == {
        *("cluster.yaml", "gcp.yaml", "local.yaml", "aws-once.yaml", "Dockerfile", "slurm.sh"),
        *KUBERNETES_FILES,
    }
    assert shutil.which("bash") is not None


def test_no_file_of_the_repository_holds_a_key() -> None:
    """Keys of AWS, private keys, tokens of code hosts and chats. Those that tests use for their own servers say so."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    keys = re.compile(r"AKIA(?!TEST|LAB)[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|ghp_[0-9A-Za-z]{20}|xox[bp]-[0-9]{5}")
    files = [ROOT / name for name in listing.split("\0") if name]
    found = [path for path in files if keys.search(path.read_text(errors="replace"))]
    assert found == [Path(__file__)], "which has made-up ones, above, and no other"
    assert len(files) > 100 and not [path for path in files if path.name in ("auth_token", "credentials")]
