"""From a laptop to a cluster and back: doctor, submit, a worker that is lost, results that equal those made here."""

import contextlib
import dataclasses
import json
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

import fedsim
from tests.cluster.lab import GCS_PORT, TOKEN_MODE, Lab, cluster_file, make_token, pid_space, start_cluster, wait_until


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200), pytest.mark.xdist_group("cluster")]

ROOT = Path(__file__).parents[2]
FEDSIM = [sys.executable, "-m", "fedsim"]
BUCKET = "results"
KEYS = {"aws_access_key_id": "AKIALABLABLABLABLABX", "aws_secret_access_key": secrets.token_hex(20)}
SERVER = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(sys.argv[1], int(sys.argv[2]), verbose=False)
server.start()
time.sleep(1e9)
"""
ONE_A_NODE = ["--set", *(f"tiers.{number}.num_cpus=2" for number in range(3))]  # of what each node has
LOOK = """
import boto3, json, sys
names = [each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket=sys.argv[1]).get("Contents", [])]
print("result:", json.dumps(names))
"""


class Cluster:
    """A cluster of three nodes that is up, an S3 server on the laptop, and what a user types there."""

    def __init__(self, lab: Lab, file: Path, token: str, source: Path, url: str) -> None:
        self.lab, self.file, self.token, self.source = lab, file, token, source
        self.environment = {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}

    def fedsim(self, *words: str, status: int = 0, timeout: float = 600) -> str:
        """What a command prints; its exit status must be `status`."""
        log = self.lab.folder / f"said-{time.monotonic_ns()}.txt"
        with open(log, "wb") as output:
            process = self.lab.popen(
                [*FEDSIM, *words], env=self.environment, cwd=self.source, stdout=output, stderr=output
            )
            try:
                process.wait(timeout)
            finally:
                if process.poll() is None:
                    self.lab.stop(process)
        said = log.read_text(errors="replace")
        assert process.returncode == status, said
        return said

    @contextlib.contextmanager
    def submitting(self, *words: str, out: str, fetch: Path) -> Iterator["Submitted"]:
        """`fedsim submit` while it runs."""
        log = self.lab.folder / f"said-{time.monotonic_ns()}.txt"
        command = [*FEDSIM, "submit", *words, "--cluster", str(self.file), "--out", out, "--fetch", str(fetch)]
        with open(log, "wb") as output:
            process = self.lab.popen(command, env=self.environment, cwd=self.source, stdout=output, stderr=output)
            try:
                yield Submitted(process, log)
            finally:
                if process.poll() is None:
                    self.lab.stop(process)

    def objects(self) -> list[str]:
        said = self.lab.run([sys.executable, "-c", LOOK, BUCKET], env=self.environment).stdout
        return json.loads(said.partition("result:")[2])

    def local(self, name: str) -> Path:
        return self.lab.folder / "fetched" / name


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A command on the laptop, and what it has printed."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 300) -> None:
        wait_until(lambda: text in self.said() or self.process.poll() is not None, f"{text!r}", seconds)
        assert self.process.poll() is None, self.said()

    def command(self) -> psutil.Process:
        [child] = psutil.Process(self.process.pid).children()
        return child

    def ended(self, seconds: float) -> int:
        """Its exit status."""
        return self.process.wait(seconds)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def source(lab: Lab) -> Path:
    """The working tree as a user would have it on a laptop: what git knows of this one."""
    tree = lab.folder / "tree"
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def cluster(lab: Lab, source: Path) -> Iterator[Cluster]:
    port = 5000
    server = lab.popen([sys.executable, "-c", SERVER, lab.address, str(port)])
    url = f"http://{lab.address}:{port}"
    (lab.home / ".aws").mkdir()
    lines = [f"{name} = {value}" for name, value in KEYS.items()]
    (lab.home / ".aws" / "credentials").write_text("[default]\n" + "\n".join(lines) + "\n")
    (lab.home / ".aws" / "credentials").chmod(0o600)
    token = make_token(lab)
    file = cluster_file(lab, lab.folder, source)
    config = yaml.safe_load(file.read_text())
    config["file_mounts"]["~/.aws/credentials"] = "~/.aws/credentials"
    config["metadata"] = {"head_resources": {"CPU": 0}, "worker_resources": {"CPU": 2}}
    there = f"export AWS_ENDPOINT_URL={url} AWS_REGION=us-east-1; "
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[commands] = [there + line if "ray start" in line else line for line in config[commands]]
    config["head_start_ray_commands"] = [
        line.replace("--num-cpus=2", "--num-cpus=0") for line in config["head_start_ray_commands"]
    ]
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    found = Cluster(lab, file, token, source, url)
    make = f"import boto3; boto3.client('s3').create_bucket(Bucket={BUCKET!r})"
    wait_until(lambda: not lab.run([sys.executable, "-c", make], found.environment, check=False).returncode, "S3", 60)
    start_cluster(lab, file)
    yield found
    lab.stop(server)


def run_here(out: Path, *words: str) -> Path:
    """The same, inline, in a process of its own, with the numerics that nodes have by default."""
    command = [
        sys.executable,
        "-m",
        "fedsim",
        *words,
        "--runtime",
        "inline",
        "--numerics",
        "portable",
        "--out",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800)
    return out


def rounds_of(results: Any) -> pd.DataFrame:
    return results.rounds.sort_values(["run_id", "round"])[["run_id", "round", "state_sha256"]].reset_index(drop=True)


def test_doctor_finds_nothing_wrong_before_and_on_the_cluster(cluster: Cluster) -> None:
    said = cluster.fedsim("doctor", "--cluster", str(cluster.file), "--out", f"s3://{BUCKET}/try")
    for node in cluster.lab.nodes:
        assert f"ok      versions {node.address}: Python " in said
        assert f"ok      storage {node.address}: s3://{BUCKET}/try can be read and written" in said
    assert "the job server refuses who brings none (401)" in said and "0 problems" in said
    assert cluster.objects() == [], "nothing is left of having tried"


def test_a_folder_that_not_all_nodes_see_is_refused(cluster: Cluster) -> None:
    said = cluster.fedsim(
        *("submit", "benchmarks.suites:tiny", "--cluster", str(cluster.file), "--out", "/tmp/mine", "--hosts", "2"),
        status=2,
    )
    assert "storage on node" in said and "give --out s3://BUCKET/PREFIX" in said
    said = cluster.fedsim("doctor", "--cluster", str(cluster.file), "--out", "/tmp/mine", status=1)
    assert said.count("problem storage") == 2, "the two workers do not see what the head wrote"


def test_nodes_with_other_sources_are_refused_before_the_run(cluster: Cluster) -> None:
    """From the head, with what lies there: one worker has an older tree."""
    worker, file = cluster.lab.workers[1], "fedsim/fedsim/core/seeding.py"
    worker.run(["sh", "-c", f"cp {file} kept.py && echo '# older' >> {file}"])
    command = f"cd ~/fedsim && export {TOKEN_MODE} && python -m fedsim run benchmarks.suites:tiny --hosts 2 "
    command += f"--address {cluster.lab.head.address}:{GCS_PORT} --out s3://{BUCKET}/other"
    finished = cluster.lab.head.run(["bash", "-ic", command], env=cluster.environment, check=False, timeout=600)
    worker.run(["sh", "-c", f"mv kept.py {file}"])
    said = finished.stdout + finished.stderr
    assert finished.returncode == 2, said
    assert f"versions on node {worker.address}: other sources of fedsim than the driver's" in said
    assert not [name for name in cluster.objects() if name.startswith("other/") and name != "other/"]


def test_ctrl_c_stops_the_job_and_it_can_be_resumed(cluster: Cluster, tmp_path: Path) -> None:
    out, here = f"s3://{BUCKET}/long", cluster.local("long")
    words = ["benchmarks.suites:tiny", "--set", "rounds=15", *ONE_A_NODE[1:], "--hosts", "2"]
    with cluster.submitting(*words, out=out, fetch=here) as submitted:
        submitted.wait_for("round 3/15")
        submitted.command().send_signal(signal.SIGINT)
        assert submitted.ended(120) == 130, submitted.said()
    assert "stopped; every finished round is in its results folder" in submitted.said()
    assert 3 < len(fedsim.load(here).rounds) < 16

    words = ["submit", *words, "--cluster", str(cluster.file), "--out", out, "--fetch", str(here)]
    assert "--resume" in cluster.fedsim(*words, status=2)
    assert "resumed at round" in cluster.fedsim(*words, "--resume")
    undisturbed = run_here(tmp_path / "here", "run", "benchmarks.suites:tiny", "--set", "rounds=15")
    pd.testing.assert_frame_equal(rounds_of(fedsim.load(here)), rounds_of(fedsim.load(undisturbed)))


def test_a_lost_connection_is_taken_up_again(cluster: Cluster) -> None:
    words = ["benchmarks.suites:tiny", "--set", "rounds=20", *ONE_A_NODE[1:], "--hosts", "2"]
    with cluster.submitting(*words, out=f"s3://{BUCKET}/again", fetch=cluster.local("again")) as submitted:
        submitted.wait_for("round 1/20")
        laptop = pid_space(submitted.command().pid)
        tunnels = [each for each in psutil.process_iter() if each.name() == "ssh" and pid_space(each.pid) == laptop]
        assert tunnels, "one of them serves several commands, and is a child of none"
        for tunnel in tunnels:
            tunnel.kill()
        assert submitted.ended(300) == 0, submitted.said()
    said = submitted.said()
    assert "connection lost" in said and "connected again" in said
    told = re.findall(r"^fedgrow \(paper\), seed 0: round (\d+)/20: ", said, re.MULTILINE)
    assert told == [str(number) for number in range(21)], "every round is told once"


def test_a_job_that_was_sent_and_left_can_be_followed_and_stopped_later(cluster: Cluster) -> None:
    words = ["benchmarks.suites:tiny", "--set", "rounds=2", "--cluster", str(cluster.file), "--hosts", "1"]
    said = cluster.fedsim("submit", *words, "--out", f"s3://{BUCKET}/left", "--detach")
    job = said.split("job ")[1].split(":")[0]
    here, where = cluster.local("left"), ["--cluster", str(cluster.file)]
    said = cluster.fedsim("submit", *where, "--attach", job, "--out", f"s3://{BUCKET}/left", "--fetch", str(here))
    assert "round 2/2" in said and len(fedsim.load(here).rounds) == 3
    assert "succeeded" in cluster.fedsim("submit", *where, "--stop", job)
    assert "no such job" in cluster.fedsim("submit", *where, "--stop", "fedsim-none", status=2)


def test_a_suite_equals_one_that_was_run_here_though_a_worker_is_lost_in_the_middle(
    cluster: Cluster, tmp_path: Path
) -> None:
    out, here = f"s3://{BUCKET}/quick", cluster.local("quick")
    words = ["--suite", "quick", "--seeds", "0", "--hosts", "2", *ONE_A_NODE]
    with cluster.submitting(*words, out=out, fetch=here) as submitted:
        submitted.wait_for("round 2/")
        busy = [node for node in cluster.lab.workers if any("ray::Host" in line for line in node.processes())]
        assert len(busy) == 2, "a host on each worker"
        busy[0].kill()
        assert submitted.ended(900) == 0, submitted.said()
    assert f"results: {out}; " in submitted.said()

    undisturbed = run_here(tmp_path / "here", "sweep", "--suite", "quick", "--seeds", "0")
    results = fedsim.load(here)
    pd.testing.assert_frame_equal(rounds_of(results), rounds_of(fedsim.load(undisturbed)))
    assert {*results.runs["status"]} == {"finished"}
    assert sum(results.rounds["retries"]) > 0, "what the lost worker was doing was done again"
    assert len({*results.clients["node"].dropna()}) == 2, "both computed"
    assert (here / "report.html").is_file() and not (here / "checkpoints").exists()
    assert any(name.startswith("quick/checkpoints/") for name in cluster.objects())


def test_no_secret_is_in_a_log_or_a_result(cluster: Cluster) -> None:
    hidden = [cluster.token.encode(), KEYS["aws_secret_access_key"].encode()]
    read = 0
    for node in cluster.lab.nodes:
        for path in (node.root / "tmp").rglob("*"):
            own = not str(path).startswith(f"{node.root}{sys.prefix}/")  # the interpreter's environment may lie there
            if own and path.is_file() and not path.is_symlink():
                content, read = path.read_bytes(), read + 1
                assert not any(secret in content for secret in hidden), path
    for path in [*cluster.lab.folder.glob("*.txt"), *(cluster.lab.folder / "fetched").rglob("*.*")]:
        if path.is_file():
            content, read = path.read_bytes(), read + 1
            assert not any(secret in content for secret in hidden), path
    assert read > 50


def test_ray_down_and_nothing_is_left(cluster: Cluster) -> None:
    cluster.lab.run(["ray", "down", "--yes", str(cluster.file)])
    up = [node for node in cluster.lab.nodes if node.processes()]
    for node in up[1:]:  # of own machines, the launcher stops the head alone
        node.run(["bash", "-ic", "ray stop"])

    def left() -> list[str]:
        return [line for node in up for line in node.processes() if "ray" in line and "log_monitor" not in line]

    wait_until(lambda: not left(), "Ray's processes to end", 60)
    words = ["submit", "benchmarks.suites:tiny", "--cluster", str(cluster.file), "--out", "/x"]
    said = cluster.fedsim(*words, status=2)
    assert "no job server answers" in said and "`ray up`" in said
