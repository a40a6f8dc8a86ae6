"""Joining a Ray cluster: an answer in words and in seconds, where Ray may wait for minutes or end the process."""

import contextlib
import logging
import socket
import traceback

import grpc
import ray
from ray.exceptions import AuthenticationError

from fedsim.core import environment
from fedsim.runtime.private_ray import end_in_order, on_loopback


ANSWER_SECONDS = 10.0  # in which something at the address must answer
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
    try:
        with on_loopback() if _here_alone(address) else contextlib.nullcontext():
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError, SystemExit) as error:
        raise ValueError(f"{_named(address)}: {_why(error)}") from error
    end_in_order()
    return getattr(context, "dashboard_url", None) or None


def _here_alone(address: str | None) -> bool:
    """Whether what answers at HOST:PORT listens on 127.0.0.1 alone, as a private Ray does."""
    host, _, port = (address or "").rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError:
        return True
    return False


def _named(address: str | None) -> str:
    """An address, and where it was said: in the environment it may be left over."""
    if address is not None and address == environment.ray_address():
        return f"RAY_ADDRESS={address!r} (unset it to start a Ray here)"
    return f"--address={address!r}"


def _why(error: BaseException) -> str:
    """What keeps this process out of a cluster, in words and with the remedy."""
    if isinstance(error, AuthenticationError):
        return f"the cluster asks for a token, and there is none: {TOKEN}"
    if "InvalidAuthToken" in "".join(traceback.format_exception(error)):  # said by a cause, as text
        return f"the cluster refuses this token, or the lack of one: {TOKEN}"
    if "ersion mismatch" in str(error):
        return f"{' '.join(str(error).split())}. Install the cluster's versions here, or these there"
    return f"no Ray cluster answers there ({error})"


def expect_connected(address: str | None) -> None:
    """**Raises:** `ValueError` if HOST:PORT is not the cluster this process is connected to: it can be in one only."""
    if address in (None, "auto"):
        return
    there = ray.get_runtime_context().gcs_address
    if _resolved(address) != _resolved(there):
        raise ValueError(
            f"{_named(address)}: this process is connected to {there} already; disconnect it (ray.shutdown()), or "
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
        raise ValueError(f"{_named(address)}: must be 'auto' or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{_named(address)}: nothing answers there ({error}); looked for {ANSWER_SECONDS:g} s"
        ) from None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # nor does Ray use one
        try:
            grpc.channel_ready_future(channel).result(ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise ValueError(
                f"{_named(address)}: what answers there is no Ray cluster: no gRPC within {ANSWER_SECONDS:g} s"
            ) from None
