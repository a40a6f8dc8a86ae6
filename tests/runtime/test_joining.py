"""A request to join a cluster that cannot be met is answered in seconds, in words."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import grpc
import pytest
import ray
from ray.exceptions import AuthenticationError

from fedsim.cli import main
from fedsim.runtime import joining
from fedsim.runtime.joining import expect_connected, join


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "ANSWER_SECONDS", 0.3)


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def answering(server: socket.socket, answer: bytes) -> None:
    """Answer once, as a server would."""

    def answer_once() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)

    threading.Thread(target=answer_once, daemon=True).start()


def test_nothing_listens(listening: socket.socket) -> None:
    address = address_of(listening)
    listening.close()
    with pytest.raises(ValueError, match=rf"--address='{address}': nothing answers there"):
        join(address)


def test_what_listens_says_nothing(listening: socket.socket, short: None) -> None:
    with pytest.raises(ValueError, match=r"what answers there is no Ray cluster: no gRPC within 0\.3 s"):
        join(address_of(listening))


def test_what_answers_is_something_else(listening: socket.socket, short: None) -> None:
    answering(listening, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ValueError, match="what answers there is no Ray cluster"):
        join(address_of(listening))


@pytest.mark.parametrize("address", ["somewhere", "host:port:6379x", ":6379"])
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise ConnectionError("nothing of that name")

    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(ValueError, match="--address="):
        join(address)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (AuthenticationError("no token found"), "asks for a token, and there is none.*RAY_AUTH_TOKEN"),
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1"), "Ray: 2.1. Install"),
        (SystemExit(15), "no Ray cluster answers"),
    ],
)
def test_what_ray_refuses(raised: BaseException, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", refused)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ValueError, match=said):
            join(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


GUARDED = """
import time, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(600)
"""
JOINING = "import sys; from fedsim.runtime.joining import join; join(sys.argv[1])"


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_cluster_refuses_a_wrong_token(tmp_path: Path) -> None:
    """How Ray says so is nothing it promises: this fails where a version of Ray says it otherwise."""
    (tmp_path / "right").write_text(64 * "a")
    (tmp_path / "wrong").write_text(64 * "b")

    def started(program: list[str], token: str) -> subprocess.Popen[str]:
        told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / token)}
        retries = {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # Ray asks 20 times, a second apart
        python = [sys.executable, "-c", *program]
        return subprocess.Popen(python, env={**os.environ, **told, **retries}, stdout=PIPE, stderr=PIPE, text=True)

    with started([GUARDED], "right") as cluster:
        try:
            assert cluster.stdout is not None
            address = cluster.stdout.readline().strip()
            with started([JOINING, address], "wrong") as joining:
                said = joining.communicate(timeout=60)[1]
            assert f"ValueError: --address='{address}': the cluster refuses this token, or the lack of one" in said
            with started([JOINING, address], "right") as joining:
                assert joining.wait(timeout=60) == 0
        finally:
            cluster.terminate()


@pytest.mark.ray
def test_a_process_is_in_one_cluster_only(cluster: None, listening: socket.socket) -> None:
    here = ray.get_runtime_context().gcs_address
    for same in (None, "auto", here):
        expect_connected(same)
    with pytest.raises(ValueError, match=f"this process is connected to {here} already"):
        expect_connected(address_of(listening))


def test_the_command_ends_with_2_before_anything_starts(
    listening: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a user who has a token would else send it from here on
    address = address_of(listening)
    listening.close()
    words = ["run", "benchmarks.suites:tiny", "--address", address, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"--address='{address}'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*"))
