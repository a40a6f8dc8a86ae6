"""Workers of a private Ray, forked from one process that has imported what they all need: a fork takes milliseconds and
shares the memory, where every worker by itself imports torch and transformers for seconds.

Run as a script, twice. By the process that starts the Ray, with the paths and modules to import: the process that is
forked. By Ray, in the place of its own `setup_worker.py`: asks for a fork, or, where nobody answers or the worker is an
unusual one, does as Ray would. It imports nothing of fedsim, and nothing slow before it is known to be needed.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


NAME = "FEDSIM_FORKS"  # the variable: what the process that is forked is called
MODULES = ("fedsim.simulation", "fedsim.runtime.answering")  # not Ray: it reads as it is imported whose worker it is in
CONTEXT = "--serialized-runtime-env-context="  # Ray's words before those of the worker itself
LANGUAGE = "--language="
ASKED_SECONDS = 5.0  # in which a request is read
SECONDS = 30.0  # in which a fork is made, or the worker is started as Ray does it


# whoever starts a Ray -------------------------------------------------------------------------------------------------


class Mirror:
    """Of `sys.meta_path`: models that this process imports, the process that is forked imports as well, meanwhile."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, module: str, path: Any = None, target: Any = None) -> None:
        if about_models(module) and (connection := connected(self.name)) is not None:
            with connection, contextlib.suppress(OSError):  # it has just ended
                connection.sendall(json.dumps({"module": module}).encode())


def about_models(module: str) -> bool:
    return module.startswith("fedsim.models.") or ".modeling_" in module


def start(name: str) -> "subprocess.Popen[bytes]":
    """Start the process that is forked; what Ray is to start must have the name in its environment."""
    modules = [*MODULES, *filter(about_models, sys.modules)]
    words, nowhere = [sys.executable, "-P", __file__, name, json.dumps([sys.path, modules])], subprocess.DEVNULL
    sys.meta_path.insert(0, Mirror(name))
    return subprocess.Popen(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def forget() -> None:
    """What this process imports, nobody imports as well."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Mirror)]


def connected(name: str) -> socket.socket | None:
    """A connection to the process of a name, which is this user's own; None: there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"\0{name}")  # no file: it is gone with the process
    except OSError:
        connection.close()
        return None
    if own(connection):
        return connection
    connection.close()
    return None


def own(connection: socket.socket) -> bool:
    """Whether this user's process is at the other end."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return user == os.geteuid()


# the process that is forked -------------------------------------------------------------------------------------------


def serve(name: str, paths: Sequence[str], modules: Sequence[str]) -> NoReturn:
    """Import, then answer one request after another."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0{name}")
    listening.listen(1024)  # who asks meanwhile waits
    sys.path[:] = paths
    for module in modules:
        imported(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    while True:
        connection, _ = listening.accept()
        connection.settimeout(ASKED_SECONDS)
        with connection:
            if not own(connection):
                continue
            try:
                request = json.loads(connection.makefile("rb").read())
            except (OSError, ValueError):  # whoever asks ended, or does not go on
                continue
            if "module" in request:
                imported(request["module"])
                continue
            gc.freeze()  # to look for garbage among what was imported would copy it
            if os.fork() == 0:
                listening.close()
                connection.sendall(b"\1")
                connection.close()
                become(**request)


def imported(module: str) -> None:
    """Import a module, if it can be: what is wrong with it, whoever needs it is told."""
    with contextlib.suppress(Exception, SystemExit):
        importlib.import_module(module)


def become(words: list[str], variables: dict[str, str], nice: int) -> NoReturn:
    """Be the worker that Ray would have started with these words, variables and priority."""
    import numpy as np

    os.setpgid(0, 0)
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(variables)
    np.random.seed()  # Python's own generator sees to this by itself
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()


# in the place of Ray's setup_worker.py --------------------------------------------------------------------------------


def set_up(words: list[str]) -> NoReturn:
    """Have a worker forked, or start it as Ray does."""
    own_words = [word for word in words if not word.startswith((CONTEXT, LANGUAGE))]
    context: dict[str, Any] = {}
    for word in words:
        if word.startswith(CONTEXT):
            context = json.loads(word.removeprefix(CONTEXT) or "{}")
    variables = context.pop("env_vars", {})
    usual = f"{LANGUAGE}PYTHON" in words and context.get("py_executable", sys.executable) == sys.executable
    usual &= not any(value for key, value in context.items() if key != "py_executable")
    connection = connected(os.environ.get(NAME, "")) if usual else None
    if connection is not None:
        connection.settimeout(SECONDS)
        with connection, contextlib.suppress(OSError):
            request = {"words": own_words, "variables": {**os.environ, **variables}, "nice": os.nice(0)}
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            if connection.recv(1):
                sys.exit()
    import ray._private.workers as workers

    script = os.path.join(workers.__path__[0], "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *words])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(sys.argv[1], *json.loads(sys.argv[2]))
    set_up(sys.argv[1:])
