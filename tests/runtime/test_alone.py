"""A private Ray: nobody else may use it, and nothing is left of it, whatever becomes of its driver."""

import ipaddress
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import fedsim
from fedsim.core import environment
from fedsim.runtime import Choice, keeper, private_ray
from fedsim.runtime.ray_token import keep_token


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of a new account, in which whatever is made may be read by all unless it says otherwise."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    yield tmp_path
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_nobody_elses(home: Path) -> None:
    keep_token(lambda text: pytest.fail(text))
    token = home / ".ray" / "auth_token"
    assert mode(token) == 0o600 and mode(token.parent) == 0o700
    assert len(token.read_text()) == 64 and [*token.parent.iterdir()] == [token]
    before = token.read_text()
    keep_token(lambda text: pytest.fail(text))
    assert token.read_text() == before


@pytest.mark.parametrize("found", [0o644, 0o640, 0o602, 0o666, 0o611])
def test_a_token_that_others_may_read_or_write_is_mended_and_said(home: Path, found: int) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text("known")
    token.chmod(found)
    said: list[str] = []
    keep_token(said.append)
    assert mode(token) == 0o600 and token.read_text() == "known"
    assert said == [f"{token}: other users could read it ({found:04o}); now 0600"]


def test_a_folder_in_which_others_could_put_a_token_is_mended(home: Path) -> None:
    (home / ".ray").mkdir(mode=0o777)
    said: list[str] = []
    keep_token(said.append)
    assert mode(home / ".ray") == 0o755 and len(said) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="files of other users are root's to make")
def test_a_token_of_another_user_is_refused(home: Path) -> None:
    token = home / "mine"
    token.write_text("theirs")
    os.chown(token, 12345, 12345)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        with pytest.raises(ValueError, match=r"belongs to another user \(uid 12345\)"):
            keep_token(lambda text: None)


@pytest.mark.parametrize("name, value", [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_MODE", "disabled")])
def test_where_no_file_is_used_none_is_made(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    keep_token(lambda text: pytest.fail(text))
    assert [*home.iterdir()] == []


def test_the_token_is_there_before_a_ray_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, found = tmp_path / "ray" / "token", list[int]()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(private_ray, "connect_private", lambda *_: found.append(stat.S_IMODE(token.stat().st_mode)))
    monkeypatch.setattr(private_ray, "end_private", lambda: None)
    monkeypatch.setattr(private_ray, "end_in_order", lambda: None)
    with Choice("ray").ahead():
        pass
    assert found == [0o600]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, "/tmp"),
        ({"TMPDIR": "/scratch/me"}, "/scratch/me"),
        ({"TMPDIR": "/scratch/some-group/some-user/slurm_jobdir/1355700/tmp"}, "/tmp"),
        ({"TMPDIR": "/short", "RAY_TMPDIR": "/shorter"}, "/shorter"),
        ({"TMPDIR": "/" + "é" * 19}, "/tmp"),
    ],
)
def test_a_folder_whose_name_leaves_no_room_for_sockets_is_not_used(monkeypatch, variables, expected) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.temporary_folder() == expected


# a Ray of its own -----------------------------------------------------------------------------------------------------

UP = """
import sys, time
from fedsim.runtime import private_ray
private_ray.start_private(1, 0)
import ray
class Actor:
    def answer(self): return 1
actor = ray.remote(Actor).remote()
ray.get(actor.answer.remote())
print("up", flush=True)
sys.stdin.readline()
private_ray.end_private()
"""


@pytest.fixture
def driver(home: Path, tmp_path: Path):
    """A process with a private Ray, and all that it started."""
    program = [sys.executable, "-c", UP]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        started = psutil.Process(process.pid).children(recursive=True)
        yield process, started
        process.kill()


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_it_listens_on_this_machine_alone_and_keeps_its_token(driver, home: Path) -> None:
    process, started = driver
    ports = {
        f"{one.name()} {connection.laddr.ip}"
        for one in [*started, psutil.Process(process.pid)]
        for connection in one.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name.partition(" ")[0] for name in ports} >= {"gcs_server", "raylet"}
    for port in ports:
        address = ipaddress.ip_address(port.rpartition(" ")[2])
        assert (getattr(address, "ipv4_mapped", None) or address).is_loopback, ports
    assert mode(home / ".ray" / "auth_token") == 0o600


@pytest.mark.parametrize("end", ["in order", "killed"])
def test_nothing_is_left_of_it(driver, end: str) -> None:
    process, started = driver
    assert {"gcs_server", "raylet", "ray::DashboardAgent"} <= {one.name()[:19] for one in started}
    if end == "killed":
        process.kill()
    else:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    last = time.monotonic() + 10
    while running(started):
        assert time.monotonic() < last, running(started)
        time.sleep(0.05)


def test_a_keeper_ends_what_carries_its_mark_and_nothing_else() -> None:
    sleeping = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with (
        subprocess.Popen(sleeping, stdout=subprocess.PIPE, env={**os.environ, keeper.MARK: "mine"}) as marked,
        subprocess.Popen(sleeping, stdout=subprocess.PIPE, env={**os.environ, keeper.MARK: "other"}) as other,
    ):
        for one in (marked, other):
            assert one.stdout is not None and one.stdout.readline()
        marked.send_signal(signal.SIGSTOP)
        keeper.end("mine")
        assert marked.wait(10) == -signal.SIGKILL and other.poll() is None
        other.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_raylet_that_is_lost_is_blamed_and_the_run_goes_on(tmp_path: Path, reference: Path, number: int) -> None:
    out, words = tmp_path / "out", ["run", "tests.support.disturbed:stalling", "--hosts", "2", "--set"]
    command = [sys.executable, "-m", "fedsim", *words, f"algorithm.folder={tmp_path}", "--out", str(out)]
    surroundings = {**os.environ, "FEDSIM_LIVENESS_SECONDS": "4"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=surroundings) as process:
        while not (tmp_path / "happened").exists():
            assert process.poll() is None
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        next(one for one in started if one.name() == "raylet").send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "failed: RuntimeError: Ray's own process on this machine (raylet) died, or has not answered for 4 s" in said
    assert "go on with: fedsim run" in said and "participant 1" not in said
    last = time.monotonic() + 10
    while running(started):
        assert time.monotonic() < last, running(started)
        time.sleep(0.05)
    subprocess.run([*command, "--resume", "--runtime", "inline"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rounds = fedsim.load(reference).rounds.sort_values("round")
    expected = rounds.state_sha256[rounds.algorithm == "fedgrow"]
    assert [*fedsim.load(out).rounds.sort_values("round").state_sha256] == [*expected]
