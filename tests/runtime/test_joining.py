"""A request to join a cluster that cannot be met is answered in seconds, in words."""

import socket
import threading
from collections.abc import Iterator

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
    with pytest.raises(ValueError, match="nothing answers there"):
        join(address_of(listening))


def test_what_answers_is_something_else(listening: socket.socket) -> None:
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
    ("raised", "printed", "said"),
    [
        (AuthenticationError("no token found"), "", "asks for a token, and there is none.*RAY_AUTH_TOKEN"),
        (
            ConnectionError("Failed"),
            "gcs: InvalidAuthToken: missing or incorrect",
            "refuses this token.*RAY_AUTH_TOKEN",
        ),
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1"), "", "Ray: 2.1. Install"),
        (SystemExit(15), "", "no Ray cluster answers"),
    ],
)
def test_what_ray_refuses(
    raised: BaseException, printed: str, said: str, listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refused(**_: object) -> None:
        os.write(2, printed.encode())
        raise raised

    monkeypatch.setattr(ray, "init", refused)
    answering(listening, b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    with pytest.raises(ValueError, match=said):
        join(address_of(listening))


@pytest.mark.ray
def test_a_process_is_in_one_cluster_only(cluster: None, listening: socket.socket) -> None:
    here = ray.get_runtime_context().gcs_address
    for same in (None, "auto", here):
        expect_connected(same)
    with pytest.raises(ValueError, match=f"this process is connected to {here} already"):
        expect_connected(address_of(listening))


def test_the_command_ends_with_2_before_anything_starts(listening: socket.socket, tmp_path, capsys) -> None:
    address = address_of(listening)
    listening.close()
    words = ["run", "benchmarks.suites:tiny", "--address", address, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"--address='{address}'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*"))
