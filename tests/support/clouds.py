"""What the tests of the cluster files stand on: a pretended AWS, a pretended laptop whose SSH reaches nobody, and the
fields that KubeRay's resources have. Run as a program it is the pretended AWS."""

import copy
import dataclasses
import json
import logging
import os
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "docs" / "cluster"
LAUNCHER_FILES = {"aws": ROOT / "cluster.yaml", "gcp": CLUSTER / "gcp.yaml", "local": CLUSTER / "local.yaml"}
KUBERNETES_FILES = ("kuberay-cluster.yaml", "kuberay-job.yaml")
TOKEN = "a-token-that-only-the-tests-know"
REGION = "us-west-2"
KUBERNETES = "1.34.0"  # whose schemas the Kubernetes files are held against

# Ends well whatever it is asked, and notes what that was: nothing leaves this machine. rsync keeps files, and the names
# of folders.
PRETENDED = """#!{python} -I
import json, os, pathlib, shutil, sys

here = pathlib.Path({folder!r})
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
stdin = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({{"program": name, "argv": argv, "stdin": stdin}}) + "\\n")
if name == "rsync":
    host, _, path = argv[-1].partition("@")[2].partition(":")
    target = here / "nodes" / host / path.removeprefix("~/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(argv[-2]):
        target.mkdir(exist_ok=True)
    else:
        shutil.copy2(argv[-2], target)
"""


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of `ssh` or `rsync` was asked."""

    program: str
    argv: list[str]
    stdin: str

    @property
    def host(self) -> str:
        return self._who_where.partition("@")[2].partition(":")[0]

    @property
    def command(self) -> str:
        """The user's command within what Ray sends to `ssh`."""
        assert self.program == "ssh"
        wrapped = shlex.split(self.argv[-1])[0]
        return wrapped.partition("PYTHONWARNINGS=ignore && (")[2].removesuffix(")")

    @property
    def copied(self) -> tuple[str, str]:
        """From where to which path over there."""
        assert self.program == "rsync"
        return self.argv[-2], self.argv[-1].partition(":")[2]

    @property
    def _who_where(self) -> str:
        return next(word for word in self.argv if word.startswith("ubuntu@"))


class Laptop:
    """A machine to run `ray` on: its own home, SSH that reaches nobody, AWS only at an address on this machine."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.home, self.tree = folder, folder / "home", folder / "fedsim"
        programs = folder / "programs"
        for each in (self.home, self.tree, programs, folder / "tmp"):
            each.mkdir(parents=True)
        for name in ("ssh", "rsync"):
            (programs / name).write_text(PRETENDED.format(python=sys.executable, folder=str(folder)))
            (programs / name).chmod(0o755)
        for path in ROOT.iterdir():
            if not path.name.startswith(".") and path.name != "results":
                (self.tree / path.name).symlink_to(path)
        self.environment = {
            "PATH": f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.home),
            "TMPDIR": str(folder / "tmp"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def ray(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`ray WORDS` in the root of the repository, with what it prints in `stdout`."""
        command = [str(Path(sys.executable).parent / "ray"), *words]
        return subprocess.run(
            command,
            cwd=self.tree,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def calls(self) -> list[Call]:
        """What `ssh` and `rsync` have been asked so far."""
        path = self.folder / "calls.jsonl"
        return [Call(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def forget_calls(self) -> None:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)


class Aws:
    """A pretended AWS on this machine; its account is empty."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.clouds"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()
        assert self.endpoint.startswith("http://127.0.0.1:"), "the pretended AWS did not start"

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def client(self, service: str) -> Any:
        import boto3  # only here: the pretended AWS and the other tests do without

        keys = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing"}
        return boto3.client(service, region_name=REGION, endpoint_url=self.endpoint, **keys)

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """Instances in these states (default: those that are paid for), oldest first."""
        names = list(states) or ["pending", "running", "stopping", "stopped"]
        found = self.client("ec2").describe_instances(Filters=[{"Name": "instance-state-name", "Values": names}])
        listed = [each for reservation in found["Reservations"] for each in reservation["Instances"]]
        return sorted(listed, key=lambda each: each["LaunchTime"])


def serve() -> None:
    """Print the address of a pretended AWS, and serve it until standard input ends."""
    for name in ("", ".validation", ".validation.exceptions"):  # moto asks for it, but not for stacks like ours
        module = types.ModuleType("openapi_spec_validator" + name)
        module.__dict__.update(validate=None, validate_spec=None, OpenAPIValidationError=Exception, __path__=[])
        sys.modules.setdefault(module.__name__, module)
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    server.stop()


def tags_of(thing: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in thing["Tags"]}


def as_a_user_sets_it(text: str, values: Mapping[str, str]) -> str:
    """A cluster file with its placeholders filled in; each must be there."""
    for placeholder, value in values.items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    return text


def changed(document: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The document with a change made to it."""
    document = copy.deepcopy(document)
    change(document)
    return document


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def anything(*names: str) -> dict[str, Any]:
    return {name: {} for name in names}


def exactly(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The schema of an object with these fields and no others."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": fields, "additionalProperties": False}


STRING, BOOLEAN = {"type": "string"}, {"type": "boolean"}
NUMBER_OF_PODS = {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": STRING}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}  # held against Kubernetes' own schema besides

# The fields of KubeRay's resources that our files may use, of ray.io/v1 as of KubeRay 1.5.1.
RAY_CLUSTER_SPEC = exactly(
    {
        "rayVersion": {"const": "2.60.0"},
        "headGroupSpec": exactly(
            {"rayStartParams": WORDS, "template": POD_TEMPLATE},
            {"serviceType": {"enum": ["ClusterIP"]}, "enableIngress": {"const": False}, **anything("headService")},
        ),
        "workerGroupSpecs": {
            "type": "array",
            "minItems": 1,
            "items": exactly(
                {
                    "groupName": STRING,
                    "minReplicas": NUMBER_OF_PODS,
                    "maxReplicas": NUMBER_OF_PODS,
                    "rayStartParams": WORDS,
                    "template": POD_TEMPLATE,
                },
                {
                    "replicas": NUMBER_OF_PODS,
                    "numOfHosts": NUMBER_OF_PODS,
                    "idleTimeoutSeconds": NUMBER_OF_PODS,
                    "suspend": BOOLEAN,
                    **anything("scaleStrategy"),
                },
            ),
        },
    },
    {
        "authOptions": exactly({"mode": {"enum": ["token"]}}, {"secretName": STRING}),
        "enableInTreeAutoscaling": BOOLEAN,
        "autoscalerOptions": exactly(
            {},
            {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": NUMBER_OF_PODS,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
                "image": STRING,
                **anything("resources", "env", "envFrom", "volumeMounts", "securityContext"),
            },
        ),
        "headServiceAnnotations": WORDS,
        "suspend": BOOLEAN,
        "managedBy": STRING,
        **anything("gcsFaultToleranceOptions"),
    },
)
RAY_JOB_SPEC = exactly(
    {"entrypoint": STRING, "rayClusterSpec": RAY_CLUSTER_SPEC},
    {
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterPodTemplate": POD_TEMPLATE,
        "submitterConfig": exactly({}, {"backoffLimit": NUMBER_OF_PODS}),
        "shutdownAfterJobFinishes": BOOLEAN,
        "ttlSecondsAfterFinished": NUMBER_OF_PODS,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "backoffLimit": NUMBER_OF_PODS,
        "runtimeEnvYAML": STRING,
        "jobId": STRING,
        "suspend": BOOLEAN,
        "managedBy": STRING,
        "metadata": WORDS,
        "clusterSelector": WORDS,
        "entrypointNumCpus": {"type": "number"},
        "entrypointNumGpus": {"type": "number"},
        "entrypointResources": STRING,
    },
)
RAY_RESOURCES = {"RayCluster": RAY_CLUSTER_SPEC, "RayJob": RAY_JOB_SPEC}


def validate_kubernetes(document: Mapping[str, Any]) -> None:
    """**Raises:** if Kubernetes, or KubeRay, would not know a field, or take a value, of this resource."""
    import jsonschema
    import kubernetes_validate

    spec = RAY_RESOURCES.get(document["kind"])
    if spec is None:
        kubernetes_validate.validate(dict(document), KUBERNETES, strict=True)
        return
    names = exactly({"name": STRING}, {"namespace": STRING, "labels": WORDS, "annotations": WORDS})
    whole = exactly({"apiVersion": {"const": "ray.io/v1"}, "kind": STRING, "metadata": names, "spec": spec})
    jsonschema.validate(document, whole)
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "held"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pod_templates(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pods of a RayCluster or RayJob: head, workers, and the submitter if there is one."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    submitter = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    return [
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
        *submitter,
    ]


def run_as_ray_does(command: str, home: Path, programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command of a cluster file in a shell, at a home of its own."""
    return subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(path: Path, script: str) -> None:
    """A shell script that can be called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def words_after(words: Sequence[str], flag: str) -> str:
    """The value of `--flag=value`; there is one."""
    (value,) = [word.partition("=")[2] for word in words if word.startswith(flag + "=")]
    return value


if __name__ == "__main__":
    os.chdir("/")
    serve()
