"""Joining a Ray cluster: an answer in words and in seconds, where Ray may wait for minutes or end the process."""

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator

import ray
from ray.exceptions import AuthenticationError

from fedsim.runtime.ray_prestart import end_in_order


ANSWER_SECONDS = 10.0  # in which something at the address must answer
# What a client of HTTP/2, which Ray's RPC goes over, begins with (RFC 9113, section 3.4), and an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
TOKEN = (
    "supply it as RAY_AUTH_TOKEN, or in ~/.ray/auth_token (or the file RAY_AUTH_TOKEN_PATH), with RAY_AUTH_MODE=token"
)


def join(address: str | None) -> str | None:
    """Connect this process to a cluster.

    - `address`: "auto", HOST:PORT, or None for what Ray finds by itself.

    **Returns:** HOST:PORT of its job server, which is its dashboard; None if it has none.

    **Raises:** `ValueError` saying what is at the address, if it is no cluster that this process can join.
    """
    if address is not None and ":" in address and "://" not in address:
        _expect_rpc(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    noise, reason, context = list[str](), None, None
    with _heard(noise):
        try:
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, AuthenticationError, SystemExit) as error:
            reason = error
    if reason is None:
        end_in_order()
        return getattr(context, "dashboard_url", None) or None
    if isinstance(reason, AuthenticationError):
        raise ValueError(f"--address={address!r}: the cluster asks for a token, and there is none: {TOKEN}") from reason
    if any("InvalidAuthToken" in line for line in noise):
        raise ValueError(
            f"--address={address!r}: the cluster refuses this token, or the lack of one: {TOKEN}"
        ) from reason
    if "ersion mismatch" in str(reason):
        said = " ".join(str(reason).split())
        raise ValueError(
            f"--address={address!r}: {said}. Install the cluster's versions here, or these there"
        ) from reason
    raise ValueError(f"--address={address!r}: no Ray cluster answers there ({reason})") from reason


def expect_connected(address: str | None) -> None:
    """**Raises:** `ValueError` if HOST:PORT is not the cluster this process is connected to: it can be in one only."""
    if address in (None, "auto"):
        return
    there = ray.get_runtime_context().gcs_address
    if _resolved(address) != _resolved(there):
        raise ValueError(
            f"--address={address!r}: this process is connected to {there} already; disconnect it (ray.shutdown()), or "
            "leave the address out to use that cluster"
        )


def _resolved(address: str) -> str:
    """IP:PORT of HOST:PORT, where its name is known."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)
    return f"{host}:{port}"


def _expect_rpc(address: str) -> None:
    """**Raises:** `ValueError` if nothing that speaks Ray's protocol answers at HOST:PORT within `ANSWER_SECONDS`."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host:
        raise ValueError(f"--address={address!r}: must be 'auto' or HOST:PORT")
    end = time.monotonic() + ANSWER_SECONDS
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS) as connection:
            connection.settimeout(max(0.1, end - time.monotonic()))
            connection.sendall(PREFACE)
            frame = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--address={address!r}: nothing answers there ({error}); looked for {ANSWER_SECONDS:g} s"
        ) from None
    if len(frame) < 4 or frame[3] != 4:  # the type of a frame of settings, with which every server begins
        raise ValueError(f"--address={address!r}: what answers there is no Ray cluster")


@contextlib.contextmanager
def _heard(lines: list[str]) -> Iterator[None]:
    """Collect what Ray's own code prints to the error stream, of which a refused token is the only sign."""
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.readlines()
