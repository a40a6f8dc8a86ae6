"""A small network of machines inside this one: what a user of Ray's cluster launcher has, made of Linux namespaces.

A laptop and a few nodes on one network that leads nowhere else. Each has its own processes, network, /tmp, /dev/shm,
/run and home folder; each node runs an SSH server. All see this machine's files, and may only read them. The laptop's
first process holds everything: when it ends, or whoever tests is killed, the kernel takes the rest away.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import psutil
import yaml


TOOLS = {  # and the Debian package of each
    "ip": "iproute2",
    "nsenter": "util-linux",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LAPTOP_ADDRESS = "10.77.0.1"
NODE_HOME = Path("/run/home")
GCS_PORT, DASHBOARD_PORT = 6379, 8265
TOKEN_MODE = "RAY_AUTH_MODE=token"  # `ray start` and all that joins ask for no token without it

WAIT_FOR_NODES = """
import sys, time, ray
ray.init("auto", logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.2)
"""

# Arguments: the lab's folder, which keeps its name under another /tmp and stays writable; the laptop's address; the
# interpreter's environment, which keeps its name too.
# The shell stays: the first process has to collect the orphans.
LAPTOP = """
set -e
mount -t tmpfs -o mode=755 lab /run
mkdir /run/netns
mkdir -m 1777 /run/tmp
case $1 in
/tmp/*) mkdir -p "/run$1"; mount --bind "$1" "/run$1" ;;
*) mount --bind "$1" "$1" ;;
esac
case $3 in
/tmp/*) mkdir -p "/run$3"; mount --bind "$3" "/run$3" ;;
esac
mount --rbind /run/tmp /tmp
mount -t tmpfs -o mode=1777 lab /dev/shm
for file in passwd shadow hosts; do mount --bind "$1/laptop/$file" "/etc/$file"; done
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi
mount -o remount,bind,ro /
ip link set lo up
ip link add lan type bridge
ip address add "$2/24" dev lan
ip link set lan up
echo 1 > /proc/sys/net/ipv4/ip_forward  # to nowhere: a node that calls an address outside is told so at once
echo ready
sleep infinity &
wait
"""

# Arguments: the node's name and address, the laptop's address. Runs on the laptop.
CABLE = """
set -e
ip netns add "$1"
ip link add "$1" type veth peer name eth0 netns "$1"
ip link set "$1" master lan up
ip -n "$1" link set lo up
ip -n "$1" address add "$2/24" dev eth0
ip -n "$1" link set eth0 up
ip -n "$1" route add default via "$3"
"""

# Arguments: the lab's folder, the node's name, the SSH server, the interpreter's environment.
NODE = """
set -e
mount -t tmpfs -o mode=755 node /run
mkdir -m 700 /run/home /run/home/.ssh /run/sshd
cp "$1/key.pub" /run/home/.ssh/authorized_keys
cp "$1/host_key" "$1/sshd_config" /run/sshd
for file in .bashrc .profile; do cp "/etc/skel/$file" /run/home || touch "/run/home/$file"; done
for file in passwd shadow; do mount --bind "$1/node/$file" "/etc/$file"; done
mount -t tmpfs -o mode=1777 node /dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 node /dev/pts
mkdir /run/environment
mount --bind "$4" /run/environment
mount -t tmpfs -o mode=1777 node /tmp
case $4 in
/tmp/*) mkdir -p "$4"; mount --bind /run/environment "$4" ;;
esac
umount /run/environment
echo "$2" > /proc/sys/kernel/hostname
cd /
"$3" -D -e -f /run/sshd/sshd_config >&2 &
until [ -s /run/sshd/pid ]; do kill -0 $!; sleep 0.02; done
echo ready
wait
"""

SSHD_CONFIG = """
AuthenticationMethods publickey
HostKey /run/sshd/host_key
PermitRootLogin prohibit-password
PidFile /run/sshd/pid
PrintMotd no
UseDNS no
UsePAM no
"""


def check_machine() -> None:
    """Raise if a lab cannot be made here, with what is missing and what to do about it."""
    if os.geteuid() != 0:
        raise RuntimeError(f"a lab of machines is made by root; this is user {os.geteuid()}: run these tests as root")
    packages = {tool: package for tool, package in TOOLS.items() if shutil.which(tool, path=SYSTEM_PATH) is None}
    if packages:
        missing, remedy = ", ".join(packages), " ".join(sorted(set(packages.values())))
        raise RuntimeError(f"a lab of machines needs {missing}: apt-get install --no-install-recommends {remedy}")
    hidden = [folder for folder in ("/run", "/dev/shm") if Path(sys.prefix).is_relative_to(folder)]
    if hidden:
        raise RuntimeError(f"machines of a lab have a {hidden[0]} of their own: move {sys.prefix} out of it")


def command_line(pid: int) -> str:
    """How a process was called; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def pid_space(pid: int) -> str:
    """Which space of process numbers a process lives in; nothing if it has ended, or if even root may not know."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def is_first(pid: int) -> bool:
    """Whether a process is the first of a space of process numbers that is not this machine's."""
    numbers = re.search(r"^NSpid:(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return numbers is not None and numbers[1].split()[-1] == "1"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.05)


def inside(init: int, argv: Sequence[str], cwd: Path) -> list[str]:
    """A command that runs another on the machine whose first process is `init`, and that does not survive alone."""
    enter = ["nsenter", "--target", str(init), "--mount", "--net", "--pid", "--uts"]
    return [*enter, "setpriv", "--pdeathsig", "KILL", "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *argv]


def run_inside(
    init: int, argv: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, check: bool
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, but it does not wait for who merely keeps the output open: `ray` leaves an `ssh` behind."""
    entered = inside(init, argv, cwd)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(entered, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            in_time = process.returncode is not None
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        finished = subprocess.CompletedProcess(argv, process.returncode, out.read(), err.read())
    if not in_time:
        raise TimeoutError(f"{argv} ran for more than {timeout} s:\n{finished.stdout}\n{finished.stderr}")
    if check and finished.returncode != 0:
        raise RuntimeError(f"{argv} ended with {finished.returncode}:\n{finished.stdout}\n{finished.stderr}")
    return finished


@dataclass(frozen=True)
class Node:
    """A machine of the lab that is reached by SSH."""

    name: str
    address: str
    init: int  # its first process, as this machine counts
    laptop: int  # the laptop's

    @property
    def root(self) -> Path:
        """Its files, as seen from here. Symbolic links to absolute names lead elsewhere."""
        return Path(f"/proc/{self.init}/root")

    @property
    def home(self) -> Path:
        return self.root / NODE_HOME.relative_to("/")

    def pids(self) -> list[int]:
        """Its processes, as this machine counts; none once it is switched off."""
        space = pid_space(self.init)
        return [pid for pid in psutil.pids() if space and pid_space(pid) == space]

    def processes(self) -> list[str]:
        """Command lines of all that runs on it, its first process and its SSH server included."""
        return [line for pid in self.pids() if (line := command_line(pid))]

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """As `Lab.run`, on this machine and in its home folder, without SSH."""
        return run_inside(self.init, argv, NODE_HOME, environment(NODE_HOME, env), timeout, check)

    def kill(self) -> None:
        """Switch it off: all that runs on it ends at once, and no connection is closed."""
        ending = self.pids()
        cut = ["ip", "link", "set", self.name, "down"]
        run_inside(self.laptop, cut, Path("/"), environment(Path("/")), timeout=20, check=True)
        os.kill(self.init, signal.SIGKILL)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ending), f"{self.name} to be off")


class Lab:
    """A laptop, a head and workers, on which nothing runs but SSH servers. To be entered by `with`.

    **Arguments:**

    - `folder`: an empty folder of this machine. The laptop sees it under the same name and may write there, and of this
      machine's files to no others.
    - `workers`: how many nodes there are besides the head.

    **Attributes:** `head`, `workers` and `nodes`, the head first; `key`, the private key with which one is root on all
    nodes; `home`, the laptop's home folder; `address`, the laptop's, as nodes see it.
    """

    head: Node
    workers: tuple[Node, ...]

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder = folder.resolve()
        self.home, self.key = self.folder / "home", self.folder / "key"
        self.address = LAPTOP_ADDRESS
        self._worker_names = [f"worker{number}" for number in range(1, workers + 1)]
        self._started: list[subprocess.Popen[bytes]] = []
        self._init = 0

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.head, *self.workers)

    @property
    def root(self) -> Path:
        """The laptop's files, as seen from here."""
        return Path(f"/proc/{self._init}/root")

    def __enter__(self) -> Self:
        check_machine()
        self._write_files()
        try:
            spaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
            laptop = [
                "unshare",
                *spaces,
                "sh",
                str(self.folder / "laptop.sh"),
                str(self.folder),
                self.address,
                sys.prefix,
            ]
            self._init = self._start(["setpriv", "--pdeathsig", "KILL", *laptop], "laptop")
            self.head = self._start_node("head", 11)
            self.workers = tuple(self._start_node(name, 12 + i) for i, name in enumerate(self._worker_names))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        cwd: Path | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop to its end. Raises, with all that it printed, if it fails.

        `env` is added to an environment in which nothing of this machine's is.
        """
        return run_inside(self._init, argv, cwd or self.folder, environment(self.home, env), timeout, check)

    def popen(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: int | IO[bytes] | None = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a command on the laptop. It is the only child of what is returned, and ends no later than the lab."""
        entered, variables = inside(self._init, argv, cwd or self.folder), environment(self.home, env)
        process = subprocess.Popen(
            entered,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            # what a shell runs in the background ignores Ctrl-C, and hands that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._started.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End what `popen` started, and all that this has started in turn."""
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait(20)

    def _write_files(self) -> None:
        self.home.mkdir(mode=0o700, parents=True)
        for owner, home in (("laptop", self.home), ("node", NODE_HOME)):
            (self.folder / owner).mkdir()
            users = Path("/etc/passwd").read_text().splitlines()
            users = [f"root:x:0:0:root:{home}:/bin/bash" if user.startswith("root:") else user for user in users]
            (self.folder / owner / "passwd").write_text("\n".join(users) + "\n")
            (self.folder / owner / "shadow").write_text("root:*:19000:0:99999:7:::\n")
            (self.folder / owner / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        texts = {"laptop.sh": LAPTOP, "cable.sh": CABLE, "node.sh": NODE, "sshd_config": SSHD_CONFIG}
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        for name in ("key", "host_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
            subprocess.run(make, check=True)

    def _start_node(self, name: str, number: int) -> Node:
        address = f"{self.address.rpartition('.')[0]}.{number}"
        self.run(["sh", str(self.folder / "cable.sh"), name, address, self.address])
        spaces = ["--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        sshd = shutil.which("sshd", path=SYSTEM_PATH)
        made_by = ["sh", str(self.folder / "node.sh"), str(self.folder), name, str(sshd), sys.prefix]
        node = ["unshare", *spaces, *made_by]
        entered = inside(self._init, ["nsenter", f"--net=/run/netns/{name}", *node], self.folder)
        return Node(name, address, self._start(entered, name), self._init)

    def _start(self, argv: Sequence[str], name: str) -> int:
        """Start a machine and return its first process, as this machine counts."""
        log = self.folder / f"{name}.log"
        with open(log, "w") as errors:
            process = subprocess.Popen(
                argv,
                env=environment(self.home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        self._started.append(process)
        assert process.stdout is not None
        with process.stdout as output:
            if output.readline() != b"ready\n":
                raise RuntimeError(
                    f"the lab's {name} did not start; in a container, namespaces take --privileged:\n{log.read_text()}"
                )
        return next(child.pid for child in psutil.Process(process.pid).children(recursive=True) if is_first(child.pid))

    def _end(self) -> None:
        """The laptop's first process takes all others along."""
        if self._init:
            with suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
        for process in self._started:
            if not self._init:
                process.kill()
            process.wait(20)


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of whoever works in `home`, with the commands of this interpreter's environment, and more."""
    path = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
    user = {"HOME": str(home), "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8", "TERM": "dumb"}
    return user | {"PATH": path} | dict(more or {})


def make_token(lab: Lab) -> str:
    """Make the token of the laptop's user. By itself Ray prints it and lets everybody read its file."""
    lab.run(["sh", "-c", "umask 077 && ray get-auth-token --generate > /dev/null"])
    return (lab.home / ".ray" / "auth_token").read_text().strip()


def cluster_file(lab: Lab, folder: Path, source: Path | None = None) -> Path:
    """Write a cluster file for Ray's launcher with all nodes of the lab, and return its path.

    The environment of this interpreter stands in for one that is installed over a network. `folder` is one that the
    laptop sees. With `source`, that folder is at `~/fedsim` on all nodes.
    """
    start = f"ray start --num-cpus=2 --object-store-memory={200 * 2**20}"
    token = "test -s ~/.ray/auth_token || { echo 'no token: ray get-auth-token --generate'; exit 1; }"
    head = f"--head --port={GCS_PORT} --dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD_PORT}"
    # The launcher asks for its second autoscaler, which takes the head for one of the workers and leaves one out.
    launcher = "export RAY_enable_autoscaler_v2=0"
    config = {
        "cluster_name": "lab",
        "provider": {
            "type": "local",
            "head_ip": lab.head.address,
            "worker_ips": [worker.address for worker in lab.workers],
        },
        "auth": {"ssh_user": "root", "ssh_private_key": str(lab.key)},
        "min_workers": len(lab.workers),
        "max_workers": len(lab.workers),
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"} | ({"~/fedsim": str(source)} if source else {}),
        "rsync_exclude": [".git", ".venv", ".scratch", "/results", "__pycache__", ".*_cache", ".hypothesis"],
        "setup_commands": [
            f"ln -sfn {sys.prefix} ~/fedsim-env",
            "grep -q fedsim-env ~/.bashrc || echo 'export PATH=~/fedsim-env/bin:$PATH' >> ~/.bashrc",
        ],
        "head_start_ray_commands": [
            token,
            "ray stop",
            f"{launcher} {TOKEN_MODE}; {start} {head} --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            token,
            "ray stop",
            f"export {TOKEN_MODE}; {start} --address=$RAY_HEAD_IP:{GCS_PORT}",
        ],
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def start_cluster(lab: Lab, cluster: Path) -> str:
    """Run `ray up`, which returns when the head is up, and wait for the workers. Returns what `ray up` printed."""
    finished = lab.run(["ray", "up", "--yes", str(cluster)])
    count = ["python", "-c", WAIT_FOR_NODES, str(len(lab.nodes))]
    lab.head.run(count, env={"RAY_AUTH_MODE": "token"}, timeout=600)
    return finished.stdout + finished.stderr
