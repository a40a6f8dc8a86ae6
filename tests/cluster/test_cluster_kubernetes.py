"""The Kubernetes files without a Kubernetes: its own schemas, KubeRay's fields, and what must be closed."""

from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.support.clouds import CLUSTER, KUBERNETES_FILES, ROOT, changed, documents, pod_templates, validate_kubernetes


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_kubernetes_takes_its_files(name: str) -> None:
    kinds = []
    for document in documents(CLUSTER / name):
        validate_kubernetes(document)
        kinds.append(document["kind"])
    assert kinds == [
        {"kuberay-cluster.yaml": "RayCluster", "kuberay-job.yaml": "RayJob"}[name],
        "NetworkPolicy",
        "PersistentVolumeClaim",
    ]


def head_of(document: dict[str, Any]) -> dict[str, Any]:
    return pod_templates(document)[0]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("name", "which", "change"),
    [
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"].update(authOption={"mode": "token"})),
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"].update(authOptions={"mode": "tokens"})),
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"].update(rayVersion=2.6)),
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"]["workerGroupSpecs"][0].update(maxReplica=4)),
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"]["workerGroupSpecs"][0].update(maxReplicas="4")),
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
        ("kuberay-cluster.yaml", 0, lambda it: it["spec"]["headGroupSpec"].update(serviceType="LoadBalancer")),
        ("kuberay-cluster.yaml", 0, lambda it: head_of(it).update(imagePullPolice="Always")),
        ("kuberay-cluster.yaml", 0, lambda it: head_of(it)["resources"].update(limit={})),
        ("kuberay-cluster.yaml", 1, lambda it: it["spec"].update(podSelectors={})),
        ("kuberay-cluster.yaml", 2, lambda it: it["spec"].update(accessModes="ReadWriteMany")),
        ("kuberay-job.yaml", 0, lambda it: it["spec"].update(entryPoint="true")),
        ("kuberay-job.yaml", 0, lambda it: it["spec"].pop("entrypoint")),
        ("kuberay-job.yaml", 0, lambda it: it["spec"]["rayClusterSpec"].pop("headGroupSpec")),
        ("kuberay-job.yaml", 0, lambda it: it["spec"]["submitterPodTemplate"]["spec"].update(restart="Never")),
    ],
)
def test_a_slip_in_them_is_refused(name: str, which: int, change: Callable[[dict[str, Any]], object]) -> None:
    wrong = changed(documents(CLUSTER / name)[which], change)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate_kubernetes(wrong)


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_pods_are_closed_and_ask_for_what_they_use(name: str) -> None:
    main, policy, volume = documents(CLUSTER / name)
    spec = main["spec"].get("rayClusterSpec", main["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == next(
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    group = spec["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 4)
    assert spec["enableInTreeAutoscaling"] is True
    templates = pod_templates(main)
    for template in templates:
        assert template["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
        (container,) = template["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert "env" not in container, "the token is KubeRay's to give"
    gpu = templates[1]["spec"]["containers"][0]["resources"]
    assert gpu["limits"] == gpu["requests"] == {"cpu": "4", "memory": "14Gi", "nvidia.com/gpu": "1"}
    claim = templates[0]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == volume["metadata"]["name"]
    rules = policy["spec"]["ingress"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert rules[0] == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert all(rule["from"] for rule in rules), "a rule without `from` lets everybody in"


def test_only_the_job_server_of_a_job_is_open_to_more_than_its_pods() -> None:
    cluster, closed, _ = documents(CLUSTER / "kuberay-cluster.yaml")
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert len(closed["spec"]["ingress"]) == 1
    job, opened, _ = documents(CLUSTER / "kuberay-job.yaml")
    assert "dashboard-host" not in job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    (_, operator) = opened["spec"]["ingress"]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert operator["from"][0]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_the_image_has_the_versions_of_constraints_and_no_secret() -> None:
    """Its file is read, not built: that needs Docker and a network."""
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert steps[0] == ["FROM", "rayproject/ray:2.60.0-py311"]
    assert {step for step, _ in steps} == {"FROM", "COPY", "RUN", "WORKDIR", "USER"}
    copied = [word for step, words in steps if step == "COPY" for word in words.split()[1:-1]]
    assert copied == [
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "fedsim",
        "fedgrow_algo",
        "baselines",
        "benchmarks",
    ]
    assert all((ROOT / path).exists() for path in copied)
    (run,) = [words for step, words in steps if step == "RUN"]
    assert "-c /home/ray/fedsim/constraints.txt -e /home/ray/fedsim" in run
    assert steps[-1] == ["USER", "1000"]
