"""Jobs on a Ray cluster elsewhere: reaching it through SSH, sending a job, following what it prints, ending it.

Ray's own command line (`ray dashboard`, `ray rsync-down`) does what concerns a launcher's file, its Jobs API the rest.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient


UP_SECONDS = 45.0  # in which the way to the head must be open: an SSH connection, and a server that answers
LOST_SECONDS = 900.0  # in which a lost connection is tried again
QUIET_SECONDS = 30.0  # without a word from the job, after which it is asked whether anybody is there
STOP_SECONDS = 60.0
LOST = (ConnectionError, OSError, RuntimeError, asyncio.TimeoutError, aiohttp.ClientError, requests.RequestException)


class NoHead(ValueError):
    """The launcher knows of no head: the cluster was never started, or was ended."""


class JobServer:
    """The way to a cluster's job server.

    - `address`: `http://HOST:PORT`, or a launcher's file, whose head is reached through SSH (`ray dashboard`).
    """

    def __init__(self, address: str | Path) -> None:
        self.address, self.tunnel, self.reason = address, None, ""
        self.log: IO[bytes] | None = None
        self.url = address if isinstance(address, str) else ""

    def client(self) -> JobSubmissionClient:
        """A client of the job server. **Raises:** what `LOST` lists; `ValueError` if the server refuses the token."""
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # each of them has a level of its own
        if isinstance(self.address, Path):
            self._open_tunnel(self.address)
        try:
            return JobSubmissionClient(self.url)
        except AuthenticationError as error:
            raise ValueError(f"{self.address}: the cluster refuses this token, or the lack of one: {error}") from error
        except RuntimeError as error:
            if any(status in str(error) for status in ("401", "403")):
                raise ValueError(f"{self.address}: the cluster refuses this token, or the lack of one") from error
            raise

    def first(self) -> JobSubmissionClient:
        """The same, when nothing is known of the cluster yet. **Raises:** `ValueError` saying what is wrong."""
        end = time.monotonic() + (UP_SECONDS if isinstance(self.address, Path) else 0)
        while True:
            try:
                return self.client()
            except LOST as error:
                ended = self.tunnel is not None and self.tunnel.poll() is not None
                if ended and "Head node" in self.said():
                    raise NoHead(f"{self.address}: {self.said()}: `ray up` starts it") from error
                if time.monotonic() >= end:
                    said = (self.said() if ended else "") or self.reason or _short(error)
                    raise ValueError(
                        f"{self.address}: no job server answers ({said}): is the cluster up (`ray up`)?"
                    ) from error
                time.sleep(1.0)

    def _open_tunnel(self, file: Path) -> None:
        if self.tunnel is not None and self.tunnel.poll() is None:
            return
        self.reason = self.said()
        self._close_tunnel()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 open as long as the tunnel is
        command = [*RAY, "dashboard", "--port", str(port), str(file)]
        self.tunnel = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.url = f"http://127.0.0.1:{port}"

    def said(self) -> str:
        """The last line of what opened the way, as it may say why it is closed."""
        if self.log is None:
            return ""
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def _close_tunnel(self) -> None:
        if self.tunnel is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.tunnel.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.tunnel.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.tunnel.pid, signal.SIGKILL)
            self.tunnel.wait()
        if self.log is not None:
            self.log.close()
        self.tunnel, self.log = None, None

    def __enter__(self) -> "JobServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._close_tunnel()


RAY = (sys.executable, "-m", "ray.scripts.scripts")  # the command `ray` of this environment, wherever PATH leads


def send(
    link: JobServer, id_: str, entrypoint: str, folder: Path, leave_out: Sequence[str], variables: Mapping[str, str]
) -> None:
    """Send a folder and run a command in it, on the head.

    - `variables`: of the environment. They can be read by everybody who can use the cluster.

    **Raises:** `ValueError` if the cluster cannot be reached, or the folder cannot be sent.
    """
    surroundings: dict[str, Any] = {
        "working_dir": str(folder),
        "excludes": list(leave_out),
        "env_vars": dict(variables),
    }
    try:
        link.first().submit_job(entrypoint=entrypoint, submission_id=id_, runtime_env=surroundings)
    except LOST as error:
        raise ValueError(f"{link.address}: the job was not taken: {' '.join(str(error).split())}") from error


def follow(link: JobServer, id_: str, write: Callable[[str], None], tell: Callable[[str], None]) -> JobDetails:
    """Pass on what a job prints until it ends. A lost connection is tried again, and nothing is printed twice.

    **Raises:** `ConnectionError` if the cluster cannot be reached for `LOST_SECONDS`, or knows nothing of the job.
    """
    printed, lost = Printed(write), None
    while True:
        try:
            client = link.client()
            client.get_job_info(id_)
            with contextlib.closing(_chunks(client, id_)) as chunks:
                before = 0
                for chunk in chunks:
                    if lost is not None:
                        tell("connected again")
                        lost = None
                    printed.see(chunk, before)
                    before += len(chunk)
            details = client.get_job_info(id_)
            if details.status.is_terminal():
                printed.see(client.get_job_logs(id_), 0)
                return details
            time.sleep(1.0)
        except BrokenPipeError:  # whoever read what is printed here
            raise
        except LOST as error:
            if "does not exist" in str(error):
                raise ConnectionError(f"the head knows nothing of job {id_}: it was started again") from error
            now = time.monotonic()
            if lost is None:
                lost = now
                tell(f"connection lost ({_short(error)}); the job goes on; trying again")
            if now - lost > LOST_SECONDS:
                raise ConnectionError(f"no connection for {LOST_SECONDS:g} s: {_short(error)}") from error
            time.sleep(2.0)


class Printed:
    """How much of a log has been passed on."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.length = write, 0

    def see(self, text: str, before: int) -> None:
        """Pass on what is new of a part of the log that begins after `before` characters."""
        new = text[max(0, self.length - before) :]
        self.length += len(new)
        if new:
            self.write(new)


def stop(link: JobServer, id_: str) -> JobDetails | None:
    """End a job, by an interrupt first. **Returns:** what became of it; None: it did not end in time."""
    client, end = link.first(), time.monotonic() + STOP_SECONDS
    if not client.get_job_info(id_).status.is_terminal():
        client.stop_job(id_)
    while time.monotonic() < end:
        details = client.get_job_info(id_)
        if details.status.is_terminal():
            return details
        time.sleep(0.5)
    return None


def known(link: JobServer, id_: str) -> bool:
    """Whether a cluster has such a job. **Raises:** `ValueError` if it cannot be reached."""
    return id_ in {job.submission_id for job in link.first().list_jobs()}


def fetch(file: Path, source: str, to: Path) -> str | None:
    """Copy a file or folder from the head (`ray rsync-down`). **Returns:** None, or why it could not be."""
    to.mkdir(parents=True, exist_ok=True)
    command = [*RAY, "rsync-down", str(file), source, str(to)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return None if done.returncode == 0 else " ".join(said[-3:])


def _chunks(client: JobSubmissionClient, id_: str) -> Generator[str, None, None]:
    """What a job has printed, from the start, and goes on printing; ends when it does."""
    loop = asyncio.new_event_loop()
    try:
        stream = aiter(client.tail_job_logs(id_))
        pending = None
        while True:
            pending = pending or loop.create_task(_next(stream))
            done, _ = loop.run_until_complete(asyncio.wait({pending}, timeout=QUIET_SECONDS))
            if not done:
                client.get_job_info(id_)  # raises if nobody is there any more
                continue
            chunk, pending = pending.result(), None
            if chunk is None:
                return
            yield chunk
    finally:
        loop.run_until_complete(_end_all())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _end_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
