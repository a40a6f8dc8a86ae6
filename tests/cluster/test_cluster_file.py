"""A launcher's file, and whether there is room in it for a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.cluster.cluster_file import faults, hosts_for, read
from fedsim.runtime.base import Resources


ROOT = Path(__file__).resolve().parents[2]


def written(folder: Path, **changes: Any) -> str:
    """A file with a head that takes nothing and up to 3 workers of 4 CPUs and 1 GPU."""
    config = {
        "cluster_name": "test",
        "max_workers": 3,
        "provider": {"type": "aws"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}},
            "worker": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 5, "node_config": {}},
        },
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return str(path)


def asked(count: int, **each: Any) -> dict[int, Resources]:
    return {id_: Resources(**each) for id_ in range(count)}


def test_what_it_has(tmp_path: Path) -> None:
    cluster = read(written(tmp_path))
    assert cluster.grows and [(kind.name, kind.most) for kind in cluster.nodes] == [("head", 1), ("worker", 3)]


@pytest.mark.parametrize(
    ("participants", "each", "hosts"),
    [
        (6, {"num_cpus": 1}, 6),
        (20, {"num_cpus": 1}, 12),  # 3 workers of 4 CPUs
        (20, {"num_cpus": 1, "num_gpus": 0.5}, 6),
        (20, {"num_cpus": 1, "num_gpus": 0.4}, 6),  # two on each GPU: no request lies on two
        (20, {"num_cpus": 0, "num_gpus": 1}, 3),
        (20, {"num_cpus": 3}, 3),
    ],
)
def test_as_many_hosts_as_there_is_room_for(tmp_path: Path, participants: int, each: dict, hosts: int) -> None:
    cluster = read(written(tmp_path))
    assert hosts_for(cluster, [asked(participants, **each)], None) == hosts
    assert hosts_for(cluster, [asked(participants, **each), asked(2)], None) == min(hosts, 2), "for each of several"


def test_a_file_without_gpus_for_an_experiment_that_asks_for_them(tmp_path: Path) -> None:
    types = {"head": {"resources": {"CPU": 0}}, "worker": {"resources": {"CPU": 4}, "max_workers": 5}}
    cluster = read(written(tmp_path, available_node_types=types))
    with pytest.raises(
        ValueError, match=r"--cluster=.*no node has what participant 0 asks for \(head: .*worker: 1 hosts ask"
    ):
        hosts_for(cluster, [asked(2, num_gpus=0.5)], None)
    with pytest.raises(ValueError, match=r"tiers\.N\.num_gpus"):
        hosts_for(cluster, [asked(2, num_gpus=0.5)], 1)
    assert hosts_for(cluster, [asked(2)], None) == 2


def test_more_hosts_than_there_is_room_for(tmp_path: Path) -> None:
    cluster = read(written(tmp_path))
    assert hosts_for(cluster, [asked(20, num_gpus=1.0)], 3) == 3
    with pytest.raises(
        ValueError, match=r"--hosts=4: .* has room for 3 \(1 x head, 3 x worker, 3 workers at once\): raise"
    ):
        hosts_for(cluster, [asked(20, num_gpus=1.0)], 4)


def test_workers_of_all_types_together_are_no_more_than_the_file_allows(tmp_path: Path) -> None:
    """As in cluster.yaml: spot and on demand, four of each, and four at once."""
    worker = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 4}
    types = {"head": {"resources": {"CPU": 0}}, "spot": worker, "on_demand": worker}
    cluster = read(written(tmp_path, available_node_types=types, max_workers=4))
    assert hosts_for(cluster, [asked(24, num_cpus=0.0, num_gpus=1.0)], None) == 4
    with pytest.raises(ValueError, match="has room for 4 "):
        hosts_for(cluster, [asked(24, num_cpus=0.0, num_gpus=1.0)], 5)
    assert hosts_for(cluster, [asked(64)], None) == 16


def test_what_is_returned_is_what_the_run_will_ask_for(tmp_path: Path) -> None:
    """A host asks for the most that any of its participants does: two that need a GPU, and two that do not."""
    types = {"head": {"resources": {"CPU": 0}}, "worker": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 1}}
    cluster = read(written(tmp_path, available_node_types=types))
    mixed = asked(2, num_gpus=1.0) | {id_ + 2: each for id_, each in asked(2).items()}
    found = hosts_for(cluster, [mixed], None)
    assert found == 2 == hosts_for(cluster, [mixed], found), "one with the GPU, one without"
    with pytest.raises(ValueError, match="has room for 2 "):
        hosts_for(cluster, [mixed], 3)


def test_what_a_file_leaves_out_is_rays_default(tmp_path: Path) -> None:
    types = {"head": {"resources": {"CPU": 0}}, "worker": {"resources": {"CPU": 1}}}
    assert hosts_for(read(written(tmp_path, available_node_types=types, max_workers=3)), [asked(9)], None) == 3
    config = yaml.safe_load(Path(written(tmp_path, available_node_types=types)).read_text())
    del config["max_workers"]
    (tmp_path / "less.yaml").write_text(yaml.safe_dump(config))
    assert hosts_for(read(str(tmp_path / "less.yaml")), [asked(9)], None) == 2


def test_many_participants_take_no_time(tmp_path: Path) -> None:
    assert hosts_for(read(written(tmp_path)), [asked(10_000, num_cpus=0.25)], None) == 48


def test_own_machines_say_what_they_have_beside(tmp_path: Path) -> None:
    provider = {"type": "local", "head_ip": "a", "worker_ips": ["b", "c"]}
    silent = read(written(tmp_path, provider=provider, available_node_types=None))
    assert silent.nodes == () and not silent.grows and hosts_for(silent, [asked(9, num_gpus=8.0)], 7) == 7
    about = {"worker_resources": {"CPU": 2}, "head_resources": {"CPU": 1}}
    telling = read(written(tmp_path, provider=provider, available_node_types=None, metadata=about))
    assert hosts_for(telling, [asked(9)], None) == 5
    with pytest.raises(ValueError, match="no node has"):
        hosts_for(telling, [asked(9, num_gpus=1.0)], None)


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "cluster_name: x\n",
        "a: [",
        "\x00",
        "{cluster_name: x, provider: {type: aws}, available_node_types: {a: null}, head_node_type: a}",
        "{cluster_name: x, provider: {type: aws}, available_node_types: [1], head_node_type: a}",
    ],
)
def test_what_is_no_such_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="--cluster="):
        read(str(tmp_path / "x.yaml"))
    with pytest.raises(ValueError, match=r"cannot be read|must be a file for `ray up`"):
        read(str(tmp_path / "missing.yaml"))


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize("more", [f"a0: &a0 [x]\n{BOMB}", "loop: &x [*x]\n", "d: " + "[" * 5000 + "]" * 5000])
def test_a_file_that_is_endless_when_it_is_written_out(tmp_path: Path, more: str) -> None:
    (tmp_path / "x.yaml").write_text(f"cluster_name: x\nprovider: {{type: aws}}\n{more}")
    with pytest.raises(ValueError, match=r"cannot be read|must be a file for `ray up`"):
        read(str(tmp_path / "x.yaml"))


def test_the_files_that_come_with_fedsim_lack_only_what_a_user_must_set(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    found = {name: [check for check, _, _ in faults(read(name))] for name in ("cluster.yaml", "docs/cluster/gcp.yaml")}
    assert found == {"cluster.yaml": ["placeholders"], "docs/cluster/gcp.yaml": ["placeholders"]}
    assert [check for check, _, _ in faults(read("docs/cluster/local.yaml"))] == ["placeholders", "ssh key"]
    for name in ("cluster.yaml", "docs/cluster/gcp.yaml", "docs/cluster/local.yaml"):
        assert read(name).nodes, "needs can be compared with it"
        assert hosts_for(read(name), [asked(4, num_gpus=0.25)], None) == 4
    (tmp_path / ".ray" / "auth_token").unlink()
    assert "files" in [check for check, _, _ in faults(read("cluster.yaml"))]


def test_an_open_cluster_is_found(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        head_start_ray_commands=["ray start --head --dashboard-host=0.0.0.0"],
        worker_start_ray_commands=["export RAY_AUTH_MODE=token; ray start --address=x"],
    )
    assert [check for check, _, _ in faults(read(path))] == ["token", "token", "ports"]
