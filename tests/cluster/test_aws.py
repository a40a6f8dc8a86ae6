"""`cluster.yaml` with the real `ray up` and `ray down`, against a pretended AWS and SSH that reaches nobody."""

import dataclasses
import json
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import ClientError
from ray.autoscaler._private.aws import node_provider, utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError, NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller

from tests.cluster.test_cluster_files import MESSAGES
from tests.support.clouds import CLUSTER, LAUNCHER_FILES, TOKEN, Aws, Call, Laptop, as_a_user_sets_it, tags_of


pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("aws")]

MY_ADDRESS = "203.0.113.7/32"
CONFIG = yaml.safe_load(LAUNCHER_FILES["aws"].read_text())


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    aws = Aws()
    yield aws
    aws.close()


@pytest.fixture(scope="module")
def placeholders(aws: Aws) -> dict[str, str]:
    """What somebody who follows the head of `cluster.yaml` finds out, after making the stack."""
    stacks = aws.client("cloudformation")
    stacks.create_stack(
        StackName="fedsim",
        TemplateBody=(CLUSTER / "aws-once.yaml").read_text(),
        Parameters=[
            {"ParameterKey": "MyAddress", "ParameterValue": MY_ADDRESS},
            {"ParameterKey": "Bucket", "ParameterValue": "a-bucket"},
        ],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (stack,) = stacks.describe_stacks(StackName="fedsim")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    assert outputs["Results"] == "s3://a-bucket/"
    image = aws.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    return {"ami-REPLACE": image, "sg-REPLACE": outputs["SecurityGroup"]}


def laptop_of(folder: Path, aws: Aws, placeholders: dict[str, str], cluster_name: str) -> Laptop:
    """Somebody's laptop, with the cluster file set as `mine.yaml`, but no token."""
    laptop = Laptop(folder, aws.endpoint)
    text = as_a_user_sets_it(LAUNCHER_FILES["aws"].read_text(), placeholders)
    text = as_a_user_sets_it(text, {"cluster_name: fedsim ": f"cluster_name: {cluster_name} "})
    (laptop.tree / "mine.yaml").write_text(text)
    return laptop


def give_token(laptop: Laptop) -> None:
    token = laptop.home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(TOKEN)
    token.chmod(0o600)


@dataclasses.dataclass(frozen=True)
class Up:
    """A cluster that `ray up` brought up, at the second try: at the first there was no token."""

    laptop: Laptop
    without_token: "subprocess.CompletedProcess[str]"
    calls_without_token: list[Call]
    heads_without_token: list[str]
    printed: str
    calls: list[Call]
    head: dict[str, Any]

    @property
    def head_home(self) -> Path:
        """The home folder of the head, as far as files were copied there."""
        return self.laptop.folder / "nodes" / self.head["PublicIpAddress"]


@pytest.fixture(scope="module")
def up(aws: Aws, placeholders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Up:
    laptop = laptop_of(tmp_path_factory.mktemp("up") / "laptop", aws, placeholders, "fedsim")
    without_token = laptop.ray("up", "-y", "--no-config-cache", "mine.yaml")
    calls, heads = laptop.calls(), [each["InstanceId"] for each in aws.instances()]
    give_token(laptop)
    done = laptop.ray("up", "-y", "--no-config-cache", "mine.yaml")
    assert done.returncode == 0, done.stdout
    (head,) = aws.instances()
    return Up(laptop, without_token, calls, heads, done.stdout, laptop.calls(), head)


# Before there is a cluster


def test_an_unset_placeholder_is_refused_before_anything_is_paid_for(aws: Aws, tmp_path: Path) -> None:
    laptop = laptop_of(tmp_path / "laptop", aws, {}, "unset")
    give_token(laptop)
    done = laptop.ray("up", "-y", "--no-config-cache", "mine.yaml")
    assert done.returncode == 1
    assert "Failed to detect a security group with id equal to any of the configured SecurityGroupIds" in done.stdout
    assert [each for each in aws.instances() if tags_of(each)["ray-cluster-name"] == "unset"] == []
    assert laptop.calls() == []


def test_without_a_token_ray_up_fails_but_only_after_the_head_is_there(up: Up) -> None:
    """Why the head of `cluster.yaml` has the token made first. The remedy is to make it, and to say `ray up` again."""
    assert up.without_token.returncode == 1
    assert f"No such file or directory: '{up.laptop.home}/.ray/auth_token'" in up.without_token.stdout
    assert up.calls_without_token == [], "nothing was set up, nothing was started"
    assert up.heads_without_token == [up.head["InstanceId"]], "it is paid for; with the token it is used"


# The head


def test_one_head_and_no_workers_of_the_kind_that_was_asked_for(aws: Aws, up: Up, placeholders: dict[str, str]) -> None:
    head = up.head
    assert head["InstanceType"] == "m7i.xlarge"
    assert head["ImageId"] == placeholders["ami-REPLACE"]
    assert "InstanceLifecycle" not in head, "the head is on demand"
    assert head["IamInstanceProfile"]["Arn"].endswith(":instance-profile/fedsim-head")
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    assert head["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    tags = tags_of(head)
    wanted = {
        "project": "fedsim",
        "ray-cluster-name": "fedsim",
        "ray-node-type": "head",
        "ray-node-status": "up-to-date",
    }
    assert wanted.items() <= tags.items()
    expect_disk(aws, head)
    assert [group["GroupId"] for group in head["SecurityGroups"]] == [placeholders["sg-REPLACE"]]


def expect_disk(aws: Aws, instance: dict[str, Any]) -> None:
    """Encrypted, tagged, and gone with the instance."""
    (mapping,) = instance["BlockDeviceMappings"]
    assert mapping["DeviceName"] == instance["RootDeviceName"] == "/dev/sda1"
    assert mapping["Ebs"]["DeleteOnTermination"] is True
    (volume,) = aws.client("ec2").describe_volumes(VolumeIds=[mapping["Ebs"]["VolumeId"]])["Volumes"]
    assert (volume["Encrypted"], volume["Size"], volume["VolumeType"]) == (True, 120, "gp3")
    assert tags_of(volume)["project"] == "fedsim"


def test_the_firewall_is_closed_to_the_world(aws: Aws, up: Up, placeholders: dict[str, str]) -> None:
    own = placeholders["sg-REPLACE"]
    (group,) = aws.client("ec2").describe_security_groups(GroupIds=[own])["SecurityGroups"]
    ssh, inner = group["IpPermissions"]
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [each["CidrIp"] for each in ssh["IpRanges"]] == [MY_ADDRESS]
    assert ssh["UserIdGroupPairs"] == ssh["Ipv6Ranges"] == []
    assert inner["IpProtocol"] == "-1"
    assert [pair["GroupId"] for pair in inner["UserIdGroupPairs"]] == [own]
    assert inner["IpRanges"] == inner["Ipv6Ranges"] == []
    groups = aws.client("ec2").describe_security_groups()["SecurityGroups"]
    assert "0.0.0.0/0" not in json.dumps([each["IpPermissions"] for each in groups]), "neither here nor elsewhere"
    assert "ray-autoscaler-fedsim" not in [each["GroupName"] for each in groups]


def test_rights_are_what_the_nodes_need(aws: Aws, up: Up) -> None:
    """What the stack grants; whether AWS needs no more cannot be asked here."""
    iam = aws.client("iam")
    allowed = {}
    for name in ("fedsim-head", "fedsim-worker"):
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name
        allowed[name] = []
        for attached in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
            arn = attached["PolicyArn"]
            assert not arn.startswith("arn:aws:iam::aws:"), "none of AWS's own, which are wide"
            version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
            document = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
            allowed[name] += document["Statement"]
    everything = [action for statements in allowed.values() for each in statements for action in [each["Action"]]]
    assert "*" not in json.dumps(everything)
    for statement in allowed["fedsim-worker"]:
        assert "s3:" in json.dumps(statement["Action"])
        assert statement["Resource"].startswith("arn:aws:s3:::a-bucket")
    ending = [each for each in allowed["fedsim-head"] if "ec2:TerminateInstances" in each["Action"]]
    assert [each["Condition"] for each in ending] == [{"StringEquals": {"aws:ResourceTag/project": "fedsim"}}]
    (passing,) = [each for each in allowed["fedsim-head"] if each["Action"] == "iam:PassRole"]
    assert passing["Resource"].endswith(":role/fedsim-worker")
    with pytest.raises(iam.exceptions.NoSuchEntityException):
        iam.get_role(RoleName="ray-autoscaler-v1")  # what Ray would make by itself: all of EC2, all of S3


def test_the_stack_refuses_the_world_and_keeps_the_results() -> None:
    """What the pretended AWS does not do: it stands in the template."""
    template = yaml.safe_load((CLUSTER / "aws-once.yaml").read_text())
    pattern = template["Parameters"]["MyAddress"]["AllowedPattern"]
    assert re.fullmatch(pattern, MY_ADDRESS)
    for wide in ("0.0.0.0/0", "203.0.113.0/16", "203.0.113.7", "::/0"):
        assert not re.fullmatch(pattern, wide)
    bucket = template["Resources"]["Results"]
    assert bucket["DeletionPolicy"] == "Retain"
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}


def test_commands_come_in_order(up: Up) -> None:
    head_address = up.head["PublicIpAddress"]
    assert {call.host for call in up.calls} == {head_address}
    commands = [call.command for call in up.calls if call.program == "ssh"]
    assert commands[0] == "uptime"
    ours = [command for command in commands[1:] if not command.startswith("mkdir -p ")]
    setup = CONFIG["setup_commands"]
    assert ours[: len(setup)] == setup
    stop, start = ours[len(setup) :]
    assert stop.endswith("; ~/fedsim-env/bin/ray stop")
    assert start.endswith(CONFIG["head_start_ray_commands"][1])
    told = start.removesuffix(CONFIG["head_start_ray_commands"][1])
    assert "export RAY_enable_autoscaler_v2=1; " in told
    assert f"export RAY_CLOUD_INSTANCE_ID={up.head['InstanceId']}; " in told
    assert "export RAY_OVERRIDE_RESOURCES='{\"CPU\":0}';" in told, "no participant computes on the head"
    copies = [i for i, call in enumerate(up.calls) if call.program == "rsync"]
    first_setup = next(i for i, call in enumerate(up.calls) if call.program == "ssh" and call.command == setup[0])
    assert max(copies) < first_setup, "files are there before anything is installed"


def test_the_token_reaches_the_head_by_its_file_only(up: Up) -> None:
    copied = dict(call.copied for call in up.calls if call.program == "rsync")
    assert copied[f"{up.laptop.home}/.ray/auth_token"] == "~/.ray/auth_token"
    there = up.head_home / ".ray" / "auth_token"
    assert there.read_text() == TOKEN
    assert stat.S_IMODE(there.stat().st_mode) == 0o600
    for call in up.calls:
        assert TOKEN not in " ".join(call.argv)
        assert call.stdin == ""
    assert TOKEN not in up.printed
    holding = [path for path in up.laptop.folder.rglob("*") if path.is_file() and TOKEN in path.read_text()]
    assert sorted(holding) == sorted([up.laptop.home / ".ray" / "auth_token", there])


def test_nothing_secret_is_told_to_aws(aws: Aws, up: Up) -> None:
    attribute = aws.client("ec2").describe_instance_attribute(InstanceId=up.head["InstanceId"], Attribute="userData")
    assert attribute["UserData"] == {}
    assert TOKEN not in json.dumps(aws.instances(), default=str)


# The workers, which the head asks for


@pytest.fixture(scope="module")
def on_the_head(aws: Aws, up: Up) -> Iterator[FileConfigReader]:
    """This process is where Ray's autoscaler would be: the head's home, and the configuration that was copied there."""
    utils.resource_cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in up.laptop.environment.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(up.head_home))
        patch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
        yield FileConfigReader(str(up.head_home / "ray_bootstrap_config.yaml"))
    utils.resource_cache.cache_clear()


def provider_of(reader: FileConfigReader) -> Any:
    config = reader.get_cached_autoscaling_config()
    return _get_node_provider(config.get_provider_config(), config.get_config("cluster_name"), use_cache=False)


@pytest.fixture(scope="module")
def workers(aws: Aws, on_the_head: FileConfigReader) -> dict[str, list[dict[str, Any]]]:
    """Instances of each type of worker, asked for as Ray's autoscaler does."""
    provider, requests = provider_of(on_the_head), list[tuple[int, int]]()
    adapter = NodeProviderAdapter(provider, on_the_head)

    def note(params: dict[str, Any], **_: object) -> None:
        requests.append((params["MinCount"], params["MaxCount"]))

    provider.ec2_fail_fast.meta.client.meta.events.register("before-parameter-build.ec2.RunInstances", note)
    for node_type in ("gpu_spot", "gpu_on_demand"):
        for time in (1, 2):  # the pretended AWS gives the least that will do, which is one
            adapter._launch_nodes_by_type(node_type, 2, f"request-{time}-{node_type}")
    assert adapter.poll_errors() == []
    assert requests == [(1, 2)] * 4, "two, or as many as there are"
    found = [each for each in aws.instances() if tags_of(each)["ray-node-type"] == "worker"]
    types = {"gpu_spot": [], "gpu_on_demand": []}
    for each in found:
        types[tags_of(each)["ray-user-node-type"]].append(each)
    return types


def test_workers_are_what_was_asked_for(aws: Aws, workers: dict[str, list[dict[str, Any]]], up: Up) -> None:
    assert {name: len(found) for name, found in workers.items()} == {"gpu_spot": 2, "gpu_on_demand": 2}
    assert [each.get("InstanceLifecycle") for each in workers["gpu_spot"]] == ["spot", "spot"]
    assert [each.get("InstanceLifecycle") for each in workers["gpu_on_demand"]] == [None, None]
    for each in [*workers["gpu_spot"], *workers["gpu_on_demand"]]:
        assert each["InstanceType"] == "g5.xlarge"
        assert each["ImageId"] == up.head["ImageId"]
        assert each["IamInstanceProfile"]["Arn"].endswith(":instance-profile/fedsim-worker")
        assert each["MetadataOptions"]["HttpTokens"] == "required"
        assert each["SecurityGroups"] == up.head["SecurityGroups"]
        assert tags_of(each)["project"] == "fedsim"
        assert tags_of(each)["ray-cluster-name"] == "fedsim"
        expect_disk(aws, each)


def test_where_there_is_no_spot_the_same_comes_on_demand(
    aws: Aws, workers: dict[str, list[dict[str, Any]]], on_the_head: FileConfigReader
) -> None:
    provider, tries, before = provider_of(on_the_head), list[str](), {each["InstanceId"] for each in aws.instances()}

    def refuse(params: dict[str, Any], **_: object) -> None:
        if "InstanceMarketOptions" in params:
            tries.append(params["SubnetId"])
            raise ClientError({"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}, "RunInstances")

    provider.ec2_fail_fast.meta.client.meta.events.register("before-parameter-build.ec2.RunInstances", refuse)
    adapter = NodeProviderAdapter(provider, on_the_head)
    adapter._launch_nodes_by_type("gpu_spot", 1, "refused")
    assert adapter.poll_errors() == []
    assert len(set(tries)) == len({each["SubnetId"] for each in aws.client("ec2").describe_subnets()["Subnets"]})
    (came,) = [each for each in aws.instances() if each["InstanceId"] not in before]
    assert "InstanceLifecycle" not in came
    spot = workers["gpu_spot"][0]
    assert came["InstanceType"] == spot["InstanceType"]
    assert tags_of(came)["ray-user-node-type"] == "gpu_spot"
    workers["gpu_spot"].append(came)


def test_on_demand_that_is_refused_is_an_error_and_no_instance(aws: Aws, on_the_head: FileConfigReader) -> None:
    provider, before = provider_of(on_the_head), len(aws.instances())

    def refuse(**_: object) -> None:
        raise ClientError({"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}, "RunInstances")

    provider.ec2_fail_fast.meta.client.meta.events.register("before-parameter-build.ec2.RunInstances", refuse)
    adapter = NodeProviderAdapter(provider, on_the_head)
    for node_type in ("gpu_spot", "gpu_on_demand"):
        adapter._launch_nodes_by_type(node_type, 1, "refused")
    assert [type(error) for error in adapter.poll_errors()] == [LaunchNodeError, LaunchNodeError]
    assert len(aws.instances()) == before


def test_a_worker_is_set_up_as_the_head_is(
    workers: dict[str, list[dict[str, Any]]], on_the_head: FileConfigReader, up: Up
) -> None:
    worker, provider = workers["gpu_spot"][0], provider_of(on_the_head)
    provider.non_terminated_nodes({})
    up.laptop.forget_calls()
    instance = MESSAGES.Instance(instance_type="gpu_spot", cloud_instance_id=worker["InstanceId"])
    installer = RayInstaller(provider, on_the_head.get_cached_autoscaling_config(), process_runner=subprocess)
    installer.install_ray(instance, up.head["PrivateIpAddress"])
    calls = up.laptop.calls()
    assert {call.host for call in calls} == {worker["PrivateIpAddress"]}, "inside the cluster's network"
    commands = [call.command for call in calls if call.program == "ssh"]
    ours = [command for command in commands[1:] if not command.startswith("mkdir -p ")]
    headed = f"export RAY_HEAD_IP={up.head['PrivateIpAddress']}; "
    setup = [headed + command for command in CONFIG["setup_commands"]]
    assert ours[: len(setup)] == setup
    start = ours[-1]
    assert start.endswith(CONFIG["worker_start_ray_commands"][1])
    assert headed in start
    found = re.search("export RAY_OVERRIDE_RESOURCES='([^']*)';", start)
    assert found is not None
    assert {"CPU": 4, "GPU": 1}.items() <= json.loads(found[1]).items()
    there = up.laptop.folder / "nodes" / worker["PrivateIpAddress"] / ".ray" / "auth_token"
    assert there.read_text() == TOKEN
    assert stat.S_IMODE(there.stat().st_mode) == 0o600
    assert not any(TOKEN in " ".join(call.argv) + call.stdin for call in calls)


def test_a_group_that_ray_makes_is_open_to_the_world(
    aws: Aws, on_the_head: FileConfigReader, placeholders: dict[str, str]
) -> None:
    """Why `cluster.yaml` names a group. If this fails, Ray has learned to close its own: that comment can go."""
    text = as_a_user_sets_it(LAUNCHER_FILES["aws"].read_text(), {"ami-REPLACE": placeholders["ami-REPLACE"]})
    config = prepare_config(yaml.safe_load(text) | {"cluster_name": "open"})
    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": MY_ADDRESS}]}
    config["provider"]["security_group"] = {"GroupName": "open", "IpPermissions": [rule]}
    for node_type in config["available_node_types"].values():
        node_type["node_config"].pop("SecurityGroupIds", None)
    bootstrap_aws(config)
    ec2 = aws.client("ec2")
    (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["open"]}])["SecurityGroups"]
    ranges = [each["CidrIp"] for permission in group["IpPermissions"] for each in permission["IpRanges"]]
    assert sorted(ranges) == ["0.0.0.0/0", MY_ADDRESS]
    ec2.delete_security_group(GroupId=group["GroupId"])


# The end


def test_ray_down_ends_everything(aws: Aws, up: Up, workers: dict[str, list[dict[str, Any]]]) -> None:
    known = {each["InstanceId"] for found in workers.values() for each in found} | {up.head["InstanceId"]}
    assert {each["InstanceId"] for each in aws.instances()} == known
    up.laptop.forget_calls()
    done = up.laptop.ray("down", "-y", "mine.yaml")
    assert done.returncode == 0, done.stdout
    assert aws.instances() == [], "not even stopped: stopped ones have disks that cost"
    assert known <= {each["InstanceId"] for each in aws.instances("terminated")}
    assert [call.command for call in up.laptop.calls()] == ["ray stop"]
    assert up.laptop.calls()[0].host == up.head["PublicIpAddress"]
    assert aws.client("ec2").describe_volumes(Filters=[{"Name": "tag:project", "Values": ["fedsim"]}])["Volumes"] == []
    shutil.rmtree(up.laptop.folder)
