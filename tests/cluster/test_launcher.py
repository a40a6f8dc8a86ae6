"""Ray's launcher on machines of one's own: what `ray up` starts, who is let in, what is lost with a machine."""

import json
import re
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import tests.cluster.lab
from tests.cluster.lab import (
    DASHBOARD_PORT,
    GCS_PORT,
    TOKEN_MODE,
    Lab,
    Node,
    check_machine,
    cluster_file,
    command_line,
    make_token,
    start_cluster,
    wait_until,
)


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.xdist_group("cluster")]

ROOT = Path(__file__).parents[2]

TASK_ON_EACH_NODE = """
import json, socket, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init("auto", logging_level="ERROR")
def where():
    return [ray.util.get_node_ip_address(), socket.gethostname()]
tasks = [
    ray.remote(where).options(scheduling_strategy=On(node["NodeID"], soft=False)).remote() for node in ray.nodes()
]
print("result:", json.dumps(ray.get(tasks, timeout=300)))
"""

# Argument: the address of the node that will be switched off.
LOSE_A_NODE = """
import json, sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init("auto", logging_level="ERROR")
class Host:
    def address(self):
        return ray.util.get_node_ip_address()
def alive():
    return {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
hosts = {
    address: ray.remote(Host).options(scheduling_strategy=On(node, soft=False)).remote()
    for address, node in alive().items()
}
ray.get([host.address.remote() for host in hosts.values()], timeout=300)
print("ready", flush=True)
while sys.argv[1] in alive():
    time.sleep(0.2)
answers = {}
for address, host in hosts.items():
    try:
        answers[address] = ray.get(host.address.remote(), timeout=120)
    except ray.exceptions.ActorDiedError as error:
        answers[address] = type(error).__name__
print("result:", json.dumps([answers, ray.cluster_resources()["CPU"]]), flush=True)
"""

# Arguments: addresses of pages. Prints what each answers to nobody, to a wrong token, and to the token of this home.
ASK = """
import json, pathlib, sys, urllib.error, urllib.request
file = pathlib.Path.home() / ".ray" / "auth_token"
tokens = [None, "wrong", file.read_text().strip() if file.exists() else None]
def status(url, token):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        return str(error.reason)
print("result:", json.dumps([[status(url, token) for token in tokens] for url in sys.argv[1:]]))
"""


def result(text: str):
    """What a program of this file has found out, among all that Ray prints around it."""
    found = re.search(r"^result: (.*?)\r?$", text, re.MULTILINE)
    assert found, text
    return json.loads(found[1])


def ask(machine: Lab | Node, *pages: str) -> list[list[int | str]]:
    return result(machine.run([sys.executable, "-c", ASK, *pages]).stdout)


def processes_with(text: str) -> list[str]:
    return [line for pid in psutil.pids() if text in (line := command_line(pid))]


def files_with(secret: bytes, folder: Path) -> Iterator[Path]:
    """Files anywhere below a folder that hold these bytes. Ray replaces some of its files while one looks."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if stat.S_ISREG(path.lstat().st_mode) and secret in path.read_bytes():
                yield path


def network_links() -> list[str]:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout.splitlines()


# A lab without a cluster


def test_a_lab_leaves_the_machine_as_it_was(tmp_path: Path) -> None:
    links, mounts = network_links(), Path("/proc/mounts").read_text()
    with Lab(tmp_path, workers=1) as lab:
        assert [node.name for node in lab.nodes] == ["head", "worker1"]
        assert [node.run(["hostname"]).stdout.strip() for node in lab.nodes] == ["head", "worker1"]
        assert network_links() == links
        assert Path("/proc/mounts").read_text() == mounts
        assert len(processes_with(str(tmp_path))) > 2
        for machine in (lab, *lab.nodes):
            refused = machine.run(["touch", "/usr/written"], check=False)
            assert refused.returncode != 0
            assert "Read-only file system" in refused.stderr
            assert not Path(machine.run(["mktemp", "--tmpdir=/tmp"]).stdout.strip()).exists()
    assert network_links() == links
    assert Path("/proc/mounts").read_text() == mounts
    assert processes_with(str(tmp_path)) == []


def test_machines_of_a_lab_see_each_other_and_nobody_else(tmp_path: Path) -> None:
    reach = ["python", "-c", "import socket, sys; socket.create_connection((sys.argv[1], 22), timeout=5)"]
    with Lab(tmp_path, workers=1) as lab:
        for machine in (lab, *lab.nodes):
            for node in lab.nodes:
                machine.run([*reach, node.address])
            assert machine.run([*reach, lab.address], check=False).returncode != 0  # a laptop has no SSH server
            outside = machine.run([*reach, "192.0.2.1"], check=False)
            assert "Network is unreachable" in outside.stderr


def test_nodes_admit_the_labs_key_and_no_other(tmp_path: Path) -> None:
    with Lab(tmp_path, workers=0) as lab:
        other = lab.folder / "other"
        lab.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)])
        ssh = ["ssh", "-o", "StrictHostKeyChecking=no", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"]
        admitted = lab.run([*ssh, "-i", str(lab.key), f"root@{lab.head.address}", "hostname; echo ~"])
        assert admitted.stdout.split() == ["head", "/run/home"]
        refused = lab.run([*ssh, "-i", str(other), f"root@{lab.head.address}", "hostname"], check=False)
        assert (refused.returncode, refused.stdout) == (255, "")
        assert "Permission denied (publickey)" in refused.stderr


def test_a_lab_ends_with_an_error_in_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="of the test"), Lab(tmp_path, workers=1):
        raise KeyError("of the test")
    assert processes_with(str(tmp_path)) == []


def test_a_lab_ends_with_whoever_made_it(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.cluster.lab import Lab
with Lab(Path(sys.argv[1])) as lab:
    lab.popen(["sleep", "1000"])
    print("up", flush=True)
    time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "up\n"
        assert len(processes_with(f"{tmp_path}/node.sh")) >= 3
        maker.send_signal(signal.SIGKILL)
    wait_until(lambda: processes_with(str(tmp_path)) == [], "the lab to end", seconds=5)


def test_a_command_ends_in_time_and_one_that_fails_says_so(tmp_path: Path) -> None:
    with Lab(tmp_path, workers=0) as lab:
        with pytest.raises(TimeoutError, match=r"sleep.*more than 1 s:\nbefore"):
            lab.run(["sh", "-c", "echo before; exec sleep 1234"], timeout=1)
        wait_until(lambda: processes_with("sleep 1234") == [], "what was started to end")
        with pytest.raises(RuntimeError, match=r"ended with 3:\n\nmy reason"):
            lab.run(["sh", "-c", "echo my reason >&2; exit 3"])
        assert lab.run(["sh", "-c", "exit 3"], check=False).returncode == 3


def test_what_a_machine_lacks_for_a_lab_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine()
    monkeypatch.setitem(tests.cluster.lab.TOOLS, "sshd-of-the-test", "openssh-server")
    monkeypatch.setitem(tests.cluster.lab.TOOLS, "rsync-of-the-test", "rsync")
    named = r"needs sshd-of-the-test, rsync-of-the-test: apt-get install --no-install-recommends openssh-server rsync$"
    with pytest.raises(RuntimeError, match=named):
        check_machine()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="this is user 1000: run these tests as root"):
        check_machine()


def test_without_a_token_nothing_starts(tmp_path: Path) -> None:
    with Lab(tmp_path, workers=0) as lab:
        cluster = cluster_file(lab, lab.folder)
        refused = lab.run(["ray", "up", "--yes", str(cluster)], check=False)
        assert refused.returncode == 1
        assert "No such file or directory" in refused.stderr
        assert ".ray/auth_token" in refused.stderr

        (lab.home / ".ray").mkdir()
        (lab.home / ".ray" / "auth_token").touch()
        refused = lab.run(["ray", "up", "--yes", str(cluster)], check=False)
        assert refused.returncode == 1
        assert "\nno token: ray get-auth-token --generate" in refused.stdout
        assert "Ray runtime started" not in refused.stdout
        assert [line for line in lab.head.processes() if "gcs_server" in line or "raylet" in line] == []


# A cluster. The tests share it, and go from those that change nothing to those that take it apart.


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def token(lab: Lab) -> str:
    return make_token(lab)


@pytest.fixture(scope="module")
def cluster(lab: Lab, token: str) -> Path:
    """The file of a cluster that is up. What `ray up` printed is beside it."""
    path = cluster_file(lab, lab.folder)
    path.with_suffix(".log").write_text(start_cluster(lab, path))
    return path


def on_head(lab: Lab, cluster: Path, program: str, *arguments: str) -> list[str]:
    """The command that runs a program on the head as a user does; the program is there when this returns."""
    name = "program.py"
    (lab.folder / name).write_text(program)
    lab.run(["ray", "rsync-up", str(cluster), str(lab.folder / name), f"~/{name}"])
    words = " ".join(["~/fedsim-env/bin/python", f"~/{name}", *arguments])
    return ["ray", "exec", str(cluster), f"export {TOKEN_MODE}; {words}"]


def test_a_task_runs_on_each_node(lab: Lab, cluster: Path) -> None:
    places = result(lab.run(on_head(lab, cluster, TASK_ON_EACH_NODE)).stdout)
    assert sorted(places) == [["10.77.0.11", "head"], ["10.77.0.12", "worker1"], ["10.77.0.13", "worker2"]]


def test_a_command_that_fails_on_the_head_fails_on_the_laptop(lab: Lab, cluster: Path) -> None:
    assert lab.run(["ray", "exec", str(cluster), "exit 3"], check=False).returncode == 1
    assert lab.run(["ray", "exec", str(cluster), "true"]).returncode == 0


def test_the_token_is_needed_to_join(lab: Lab, cluster: Path, token: str) -> None:
    status = ["ray", "status", "--address", f"{lab.head.address}:{GCS_PORT}"]
    nobody = {"HOME": "/nowhere"}
    wrong = {"HOME": "/nowhere", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" + token}
    for machine, env in ((lab, nobody), (lab, wrong), (lab.workers[0], nobody)):
        refused = machine.run(status, env=env, check=False)
        assert refused.returncode == 1
        assert "InvalidAuthToken" in refused.stderr
        assert "Total Usage" not in refused.stdout
    assert "/6.0 CPU" in lab.run(status, env={"RAY_AUTH_MODE": "token"}).stdout
    join = f"import ray; ray.init('{lab.head.address}:{GCS_PORT}')"
    refused = lab.run([sys.executable, "-c", join], env=nobody | {"RAY_NUM_REDIS_GET_RETRIES": "1"}, check=False)
    assert refused.returncode == 1
    assert "ConnectionError: Failed to connect to Ray cluster" in refused.stderr


def test_the_dashboard_answers_on_the_head_alone_and_asks_for_the_token(lab: Lab, cluster: Path) -> None:
    pages = [f"http://127.0.0.1:{DASHBOARD_PORT}/api/{page}" for page in ("version", "jobs/", "cluster_status")]
    assert ask(lab.head, *pages) == [[401, 403, 200]] * 3
    from_outside = f"http://{lab.head.address}:{DASHBOARD_PORT}/api/version"
    refused = ["[Errno 111] Connection refused"] * 3
    assert ask(lab, from_outside, pages[0]) == [refused, refused]
    assert ask(lab.workers[0], from_outside) == [refused]

    tunnel = lab.popen(["ray", "dashboard", str(cluster)])
    wait_until(lambda: ask(lab, pages[0]) != [refused], "the tunnel to the dashboard")
    assert ask(lab, *pages) == [[401, 403, 200]] * 3
    assert ask(lab, from_outside) == [refused]
    lab.stop(tunnel)


def listening(node: Node) -> Counter[str]:
    """Who listens on a node for other machines, but for processes of drivers and workers."""
    sockets = re.findall(
        r'^LISTEN\s+\d+\s+\d+\s+(\S+):(\d+)\s+\S+\s+users:\(\("(.*?)"', node.run(["ss", "-ltnp"]).stdout, re.MULTILINE
    )
    known = {"22", "6379", "10001", "44217", "44227", "52365"}
    local = ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]")
    return Counter(
        f"{process} {port if port in known else 'any'}"
        for address, port, process in sockets
        if address not in local and not process.startswith("ray::IDLE")
    )


def test_what_other_machines_reach_without_the_token(lab: Lab, cluster: Path) -> None:
    everywhere = Counter(
        {
            "sshd 22": 2,  # IPv4 and IPv6
            "raylet any": 2,  # tasks; objects
            "ray::DashboardA 52365": 1,  # jobs
            "ray::DashboardA any": 2,  # figures; reports and logs
            "ray::RuntimeEnv any": 1,
        }
    )
    on_head = Counter({"gcs_server 6379": 1, "python 10001": 1, "python 44217": 1, "python 44227": 1})
    assert listening(lab.head) == everywhere + on_head
    for worker in lab.workers:
        assert listening(worker) == everywhere

    head = f"http://{lab.head.address}"
    assert ask(lab, f"{head}:52365/api/job_agent/jobs/") == [[401, 403, 405]]
    figures, health = (f"{head}:44217/metrics", f"{head}:44227/metrics"), f"{head}:52365/api/healthz"
    assert ask(lab, *figures, health) == [[200, 200, 200]] * 3


def test_the_token_is_in_its_file_and_nowhere_else(lab: Lab, cluster: Path, token: str) -> None:
    secret = token.encode()
    kept = {lab.root / lab.home.relative_to("/")} | {node.home for node in lab.nodes}
    folders = [machine.root / name for machine in (lab, *lab.nodes) for name in ("tmp", "dev/shm")]
    found = {path for folder in [*folders, *(node.home for node in lab.nodes)] for path in files_with(secret, folder)}
    assert found == {home / ".ray" / "auth_token" for home in kept}
    assert {path.stat().st_mode & 0o777 for path in found} == {0o600}
    for node in lab.nodes:
        running = [Path(f"/proc/{pid}") for pid in node.pids()]
        assert any("raylet" in command_line(int(process.name)) for process in running)
        for process in running:
            assert secret not in (process / "cmdline").read_bytes()
            assert secret not in (process / "environ").read_bytes()
    printed = cluster.with_suffix(".log").read_text()
    assert "Ray runtime started" in printed
    assert token not in printed


def test_a_node_that_is_switched_off_is_missed_and_the_others_go_on(lab: Lab, cluster: Path) -> None:
    lost = lab.workers[1]
    printed = lab.folder / "lost.log"
    with open(printed, "wb") as out:
        driver = lab.popen(on_head(lab, cluster, LOSE_A_NODE, lost.address), stdout=out, stderr=out)
    wait_until(lambda: "ready" in printed.read_text() or driver.poll() is not None, "a host on each node", seconds=60)
    lost.kill()
    assert lost.processes() == []
    # Ray gives a node up after five questions without an answer: 10 s for each, and 3 s in between.
    assert driver.wait(240) == 0, printed.read_text()
    answers, cpus = result(printed.read_text())
    left = {node.address: node.address for node in (lab.head, lab.workers[0])}
    assert answers == left | {lost.address: "ActorDiedError"}
    assert cpus == 4


def test_ray_down_ends_the_head_and_ray_stop_a_worker(lab: Lab, cluster: Path) -> None:
    """`ray down` does not go to the machines of workers. Their raylets give up after 60 s without a head."""
    lab.run(["ray", "down", "--yes", str(cluster)])
    worker = lab.workers[0]
    assert any("raylet" in line for line in worker.processes())
    ssh = ["ssh", "-o", "StrictHostKeyChecking=no", "-i", str(lab.key), f"root@{worker.address}"]
    lab.run([*ssh, "~/fedsim-env/bin/ray stop"])
    for node in (lab.head, worker):
        wait_until(lambda node=node: len(node.processes()) == 2, f"Ray and the launcher's SSH to leave {node.name}")
        assert [line.split()[0] for line in node.processes()] == ["sh", "sshd:"]
