"""`docs/cluster/slurm.sh` in a dry run: programs that only note what they were asked stand in for Slurm and for Ray."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.clouds import CLUSTER, program


SCRIPT = CLUSTER / "slurm.sh"
JOB = 4711
BASE = 10000 + 11 * 200
ADDRESS = f"127.0.0.1:{BASE}"


class DryRun:
    """A job on some nodes, in which programs note their words in `noted`, and what they see of the token beside."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.out, self.nodes = folder, folder / "out", nodes
        self.programs, self.environment = folder / "programs", folder / "environment"
        self.folder.mkdir(exist_ok=True)
        note = f'echo "$(basename "$0") $*" >> {folder}/noted'
        seen = (
            f'stat -c "%a" "$RAY_AUTH_TOKEN_PATH" >> {folder}/modes; cat "$RAY_AUTH_TOKEN_PATH" > {folder}/token; '
            f'echo "$RAY_AUTH_MODE" >> {folder}/auth_modes'
        )
        program(self.programs / "sleep", "exec /bin/sleep 0.05")
        names = " ".join(f"n{i}" for i in range(nodes))
        program(self.programs / "scontrol", f'{note}; [ "$1" != show ] || printf "%s\\n" {names}')
        program(
            self.programs / "srun",
            f'case "$*" in *"ray start"*) trap "echo ended >> {folder}/noted; exit 143" TERM;; esac; {note}; '
            f'case "$*" in *"hostname "*) echo "127.0.0.1 10.9.9.9";; '
            f'*"ray start"*) {seen}; while [ ! -e {folder}/ray-fails ]; do /bin/sleep 0.05; done; exit 1;; esac',
        )
        bin_folder = self.environment / "bin"
        program(bin_folder / "ray", f"{note}; exit 99")  # only srun may start it
        program(bin_folder / "fedsim", f"{note}; {seen}; [ ! -e {folder}/doctor-fails ]")
        program(
            bin_folder / "python",
            f'if [ "$1" = -c ]; then if [ -e {folder}/joined ]; then cat {folder}/joined; '
            f'else grep -c "ray start" {folder}/noted; fi; exit 0; fi; '
            f'trap "echo sweep ended in order >> {folder}/noted; exit 143" TERM; {note}; {seen}; '
            f"while [ -e {folder}/sweep-lasts ]; do /bin/sleep 0.05; done; "
            f"exit $(cat {folder}/sweep-status 2> /dev/null || echo 0)",
        )

    def start(self, **more: str) -> "subprocess.Popen[str]":
        slurm = {
            "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NODELIST": f"n[0-{self.nodes - 1}]",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "1",
        }
        ours = {"ENV": str(self.environment), "OUT": str(self.out), "SUITE": "tiny"}
        return subprocess.Popen(
            ["bash", str(SCRIPT)],
            cwd=self.folder,
            env={"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.folder)} | slurm | ours | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, **more: str) -> tuple[int, str]:
        """Exit status, and what was printed."""
        process = self.start(**more)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    def noted(self) -> list[str]:
        return (self.folder / "noted").read_text().splitlines()

    def until(self, text: str) -> None:
        end = time.monotonic() + 30
        while not any(text in line for line in self.noted_so_far()):
            assert time.monotonic() < end, f"waited for {text!r}"
            time.sleep(0.02)

    def noted_so_far(self) -> list[str]:
        return self.noted() if (self.folder / "noted").exists() else []

    def expect_nothing_left(self, steps: int) -> None:
        """Every step of Ray was ended, and the token and the folders on the nodes are gone."""
        noted = self.noted()
        assert noted.count("ended") == steps
        assert noted[-1] == f"srun --overlap --ntasks-per-node=1 rm -rf /tmp/fedsim-{JOB}"
        assert not list(self.out.iterdir())


@pytest.fixture
def three(tmp_path: Path) -> DryRun:
    return DryRun(tmp_path / "three", 3)


def test_bash_reads_the_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    broken = SCRIPT.read_text().replace("done\nwait_for", "\nwait_for")
    assert subprocess.run(["bash", "-n"], input=broken, capture_output=True, text=True).returncode != 0


def test_what_slurm_is_asked_for() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["nodes"] == "3"
    assert asked["ntasks-per-node"] == "1"
    assert (asked["requeue"], asked["signal"]) == ("", "B:USR1@300")
    assert asked["open-mode"] == "append", "or what was printed before a requeue is lost"
    assert SCRIPT.read_text().index("#SBATCH --signal") < SCRIPT.read_text().index("\nset -euo pipefail\n")


def test_the_order_of_things(three: DryRun) -> None:
    status, printed = three.finish()
    assert (status, printed) == (0, "")
    noted = three.noted()
    started = [line for line in noted if "ray start" in line]
    assert "--nodelist=n0" in started[0] and "ray start --head" in started[0]
    workers = sorted(re.findall(r"--nodelist=(\S+)", " ".join(started[1:])))
    assert workers == ["n1", "n2"], "one start for each further node; all at once"
    for line in started[1:]:
        assert f"ray start --address={ADDRESS} " in line
        assert "--head" not in line
    doctor, sweep = (
        f"fedsim doctor --address {ADDRESS}",
        (f"python benchmarks/sweep.py --suite tiny --out {three.out} --address {ADDRESS}"),
    )
    steps = [noted.index(line) for line in (started[0], started[1], doctor, sweep)]
    assert steps == sorted(steps)
    assert noted.index(started[2]) < noted.index(doctor)
    assert (noted.count(doctor), noted.count(sweep)) == (1, 1)
    assert not any(line.startswith("ray ") for line in noted), "Ray is started by srun only"
    assert not any("requeue" in line for line in noted)
    three.expect_nothing_left(steps=3)


def test_ray_listens_where_this_job_may(three: DryRun, tmp_path: Path) -> None:
    three.finish()
    started = [line for line in three.noted() if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in started[0]
    for line in started:
        assert "--num-cpus=8 --num-gpus=1 --block" in line
        ports = [int(port) for port in re.findall(r"--[a-z-]*port=(\d+)", line)]
        assert len(ports) == len(set(ports)) == (11 if line is started[0] else 8)
        assert all(BASE <= port < BASE + 200 for port in ports)
    other = DryRun(tmp_path / "other", 1)
    other.finish(SLURM_JOB_ID=str(JOB + 1))
    (alone,) = [line for line in other.noted() if "ray start" in line]
    assert min(int(port) for port in re.findall(r"--[a-z-]*port=(\d+)", alone)) == BASE + 200
    assert f"--temp-dir=/tmp/fedsim-{JOB + 1} " in alone
    assert not any("--address=" in line for line in other.noted()), "one node: no workers"


def test_the_token_is_private_and_never_told(three: DryRun) -> None:
    _, printed = three.finish()
    token = (three.folder / "token").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert (three.folder / "modes").read_text().split() == ["600"] * 5, "head, two workers, doctor, sweep"
    assert (three.folder / "auth_modes").read_text().split() == ["token"] * 5
    assert token not in printed
    assert token not in (three.folder / "noted").read_text()
    again = DryRun(three.folder / "again", 1)
    again.finish()
    assert (again.folder / "token").read_text() != token


@pytest.mark.parametrize(
    ("troubles", "status", "says", "sweeps", "ended"),
    [
        ({"sweep-status": "3"}, 3, "", 1, 3),
        ({"doctor-fails": ""}, 1, "", 0, 3),
        ({"ray-fails": "", "joined": "0"}, 1, "fedsim: Ray ended on a node", 0, 0),
        ({"joined": "1"}, 1, "fedsim: fewer than 3 nodes after 3 s", 0, 3),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_trouble_is_told_and_cleaned_up(
    three: DryRun, troubles: dict[str, str], status: int, says: str, sweeps: int, ended: int
) -> None:
    for name, content in troubles.items():
        (three.folder / name).write_text(content)
    got, printed = three.finish(**{"WAIT": "3"} if troubles == {"joined": "1"} else {})
    assert got == status
    assert says in printed
    assert len([line for line in three.noted() if "sweep.py" in line]) == sweeps
    assert not any("requeue" in line for line in three.noted())
    three.expect_nothing_left(steps=ended)


@pytest.mark.parametrize(
    ("sent", "restarts", "requeued"), [(signal.SIGUSR1, 0, 1), (signal.SIGUSR1, 10, 0), (signal.SIGTERM, 0, 0)]
)
def test_a_signal_ends_the_sweep_in_order(three: DryRun, sent: int, restarts: int, requeued: int) -> None:
    """Shortly before the time is up, the job asks for more, but not forever; when it is cancelled, it does not."""
    (three.folder / "sweep-lasts").touch()
    process = three.start(SLURM_RESTART_COUNT=str(restarts))
    three.until("sweep.py")
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    noted = three.noted()
    assert noted.count("sweep ended in order") == 1
    assert noted.count(f"scontrol requeue {JOB}") == requeued
    assert ("asking Slurm for more" in printed) == bool(requeued)
    if requeued:
        assert noted.pop() == f"scontrol requeue {JOB}", "after everything else is gone"
        (three.folder / "noted").write_text("\n".join(noted))
    three.expect_nothing_left(steps=3)


def test_a_signal_before_the_sweep_ends_the_job(three: DryRun) -> None:
    (three.folder / "joined").write_text("1")
    process = three.start()
    three.until("--nodelist=n2")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert not any("sweep.py" in line for line in three.noted())
    three.expect_nothing_left(steps=3)
