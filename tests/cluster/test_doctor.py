"""What `fedsim doctor` finds, and what a run on a cluster refuses before it starts."""

import dataclasses
import functools
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import main
from fedsim.cluster.doctor import (
    OK,
    PROBLEM,
    WARNING,
    Finding,
    Seen,
    check_nodes,
    compared,
    examine,
    of_job_server,
    of_token,
)
from fedsim.experiment import Experiment
from fedsim.results import machine
from fedsim.results.machine import Different, Facts, Gpu, SameEnvironment, facts
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all


HERE = facts()


def seen(now: float = 1000.0, **changes: Any) -> Seen:
    """A node like this one, but for the changes; its clock is asked at `now`."""
    there = dataclasses.replace(HERE, **({"clock": now, "open_files": 65536} | changes))
    return Seen(there, now, now, {"CPU": 2.0, "object_store_memory": 2**30})


def wrong(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(found.level, found.check, found.node) for found in findings if found.level != OK]


class Joined(InlineRuntime):
    """A cluster whose nodes answer as they are told to."""

    joined = True  # type: ignore[assignment]

    def __init__(self, answers: Mapping[str, Callable[[Any], Any]]) -> None:
        super().__init__()
        self.answers = answers

    def everywhere(self, call: Callable[[], Any]) -> Mapping[str, Any]:
        return {name: answer(call) for name, answer in self.answers.items()}


def changed(call: Callable[[], Facts], **changes: Any) -> Facts:
    return dataclasses.replace(call(), **changes)


# nodes --------------------------------------------------------------------------------------------------------------


def test_equal_nodes_with_enough_of_everything_have_nothing_wrong() -> None:
    assert wrong(compared(HERE, {"a": seen(), "b": seen()})) == []


@pytest.mark.parametrize(
    ("changes", "level", "check", "said"),
    [
        ({"versions": HERE.versions | {"torch": "2.0.0"}}, PROBLEM, "versions", "torch 2.0.0 (the driver has "),
        ({"versions": HERE.versions | {"python": "3.9.1"}}, PROBLEM, "versions", "python 3.9.1"),
        ({"code_sha256": "0" * 64}, PROBLEM, "versions", "other sources"),
        ({"disk_free": 100 * 2**20}, PROBLEM, "disk", "0.1 GB free"),
        ({"memory_free": 2**28}, PROBLEM, "memory", "0.2 of"),
        ({"open_files": 1024}, WARNING, "limits", "1024 open files"),
        ({"shared_memory": 64 * 2**20}, WARNING, "object store", "/dev/shm has 0.1 GB"),
        ({"clock": 1000.0 + 100}, PROBLEM, "clock", "100 s ahead of the driver"),
        ({"clock": 1000.0 - 100}, PROBLEM, "clock", "100 s behind the driver"),
    ],
)
def test_what_is_wrong_with_one_node(changes: dict[str, Any], level: str, check: str, said: str) -> None:
    findings = compared(HERE, {"good": seen(), "bad": seen(**changes)})
    assert wrong(findings) == [(level, check, "bad")]
    [found] = [found for found in findings if found.level != OK]
    assert said in found.text and found.remedy


def test_a_node_that_cannot_import_fedsim() -> None:
    findings = compared(HERE, {"a": Seen("ModuleNotFoundError: No module named 'fedsim'", 0.0, 0.0)})
    assert wrong(findings) == [(PROBLEM, "versions", "a")] and "No module named" in findings[0].text


def test_processors_and_gpus_of_several_models_are_a_warning() -> None:
    a, b = (Gpu(name, 24 * 2**30, 2**30, "550") for name in ("A10G", "T4"))
    findings = compared(HERE, {"a": seen(gpus=(a, a)), "b": seen(gpus=(b,), cpu="another")})
    assert wrong(findings) == [(WARNING, "cpu", ""), (WARNING, "gpu models", "")]
    assert wrong(compared(HERE, {"a": seen(gpus=(a, a)), "b": seen(gpus=(a,))})) == []


def test_models_of_one_node_and_of_nodes_that_compute_nothing() -> None:
    a, b = (Gpu(name, 24 * 2**30, 2**30, "550") for name in ("A10G", "T4"))
    assert wrong(compared(HERE, {"a": seen(gpus=(a, b))})) == [(WARNING, "gpu models", "")]
    head = dataclasses.replace(seen(cpu="another"), counted={"object_store_memory": 1.0})
    assert wrong(compared(HERE, {"head": dataclasses.replace(head, counted={"CPU": 0.0}), "a": seen()})) == []
    assert wrong(compared(HERE, {"head": dataclasses.replace(head, counted={"CPU": 1.0}), "a": seen()})) != []


def test_a_node_that_does_not_answer_is_not_said_to_lack_fedsim() -> None:
    [found] = compared(HERE, {"a": Seen("no answer within 120 s", 0.0, 0.0)})[:1]
    assert found.level == PROBLEM and "ray status" in found.remedy and "install" not in found.remedy


def test_time_that_passes_while_nodes_are_asked_is_no_skew() -> None:
    there = dataclasses.replace(HERE, clock=1050.0, open_files=-1)
    assert wrong(compared(HERE, {"a": Seen(there, asked=1000.0, answered=1100.0)})) == []


# the token ----------------------------------------------------------------------------------------------------------


def test_a_token_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert wrong(of_token()) == [(WARNING, "token", "")]
    file.write_text("")
    assert wrong(of_token()) == [(PROBLEM, "token", "")]
    file.write_text("a-secret")
    file.chmod(0o644)
    assert wrong(of_token()) == [(WARNING, "token", "")] and "chmod 600" in of_token()[0].remedy
    file.chmod(0o600)
    assert wrong(of_token()) == [] and "a-secret" not in str(of_token())
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-secret")
    assert wrong(of_token()) == [] and "another-secret" not in str(of_token())


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """Answers every request with `server.status`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *words: object) -> None:
            """Not into the tests' output."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("status", "level"), [(200, PROBLEM), (401, OK), (403, OK), (502, None)])
def test_a_job_server_that_answers_without_a_token_is_a_problem(
    server: http.server.HTTPServer, status: int, level: str | None
) -> None:
    server.status = status  # type: ignore[attr-defined]
    there = facts(job_server=f"127.0.0.1:{server.server_port}")
    assert there.unasked == status
    nodes = {"head": Seen(there, 0.0, 0.0), "worker": seen(unasked=None)}
    assert [found.level for found in of_job_server(nodes, joined=True)] == ([level] if level else [])
    assert of_job_server(nodes, joined=False) == [], "a private Ray is nobody else's"


def test_the_job_server_of_a_cluster_that_is_joined_is_asked(server: http.server.HTTPServer, tmp_path: Path) -> None:
    server.status = 200  # type: ignore[attr-defined]

    class Open(Joined):
        def job_server(self) -> str | None:
            return f"127.0.0.1:{server.server_port}"

    runtime = Open({"head": lambda call: call()})
    assert (PROBLEM, "token", "head") in wrong(examine(runtime, None))
    with pytest.raises(ValueError, match="the job server answers without a token"):
        check_nodes(runtime, tmp_path)
    runtime.close()


def test_a_job_server_that_is_not_there() -> None:
    assert facts(job_server="127.0.0.1:1").unasked is None
    assert of_job_server({"head": seen()}, joined=True) == []


# storage ------------------------------------------------------------------------------------------------------------


def test_a_folder_that_a_node_does_not_see(tmp_path: Path) -> None:
    def elsewhere(call: functools.partial[Facts]) -> Facts:
        out, secret = call.args
        return facts(out.replace("out", "other"), secret)

    (tmp_path / "other").mkdir()
    runtime = Joined({"a": lambda call: call(), "b": elsewhere})
    findings = examine(runtime, tmp_path / "out")
    storage = [(found.level, found.node) for found in findings if found.check == "storage"]
    assert storage == [(OK, "a"), (PROBLEM, "b")] and [*(tmp_path / "out").iterdir()] == []
    with pytest.raises(ValueError, match=r"storage on node b: .* is not seen: give --out s3://BUCKET/PREFIX, .* share"):
        check_nodes(runtime, tmp_path / "out")
    runtime.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runtime = Joined({"a": lambda call: call()})
    findings = examine(runtime, tmp_path / "file" / "out")
    assert (PROBLEM, "storage", "") in wrong(findings)
    runtime.close()


# before a run -------------------------------------------------------------------------------------------------------


def test_a_run_on_unlike_nodes_is_refused_before_anything_is_computed(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    others = HERE.versions | {"numpy": "1.0"}
    runtime = Joined({"good": lambda call: call(), "bad": lambda call: changed(call, versions=others)})
    with pytest.raises(ValueError, match=r"versions on node bad: numpy 1\.0 \(the driver has .*\): .*constraints\.txt"):
        run_all([tiny_experiment], out=tmp_path, make_runtime=lambda: runtime)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_on_equal_nodes_goes_on_and_says_what_is_odd(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    runtime = Joined({"a": lambda call: call(), "b": lambda call: changed(call, cpu="another", open_files=9)})
    assert run_all([tiny_experiment], out=tmp_path, make_runtime=lambda: runtime, console=Console()) == []
    said = capsys.readouterr().out
    assert "cpu: " in said and "another on 1" in said and "open files" not in said


def test_runtimes_of_this_process_alone_are_not_examined(tmp_path: Path) -> None:
    class Alone(InlineRuntime):
        def everywhere(self, call: Callable[[], Any]) -> Mapping[str, Any]:
            raise AssertionError("examined")

    runtime = Alone()
    assert check_nodes(runtime, tmp_path) == []
    runtime.close()


def test_a_machine_unlike_the_drivers_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = SameEnvironment.here(str(tmp_path / "not-there"), None)
    here.check()  # the driver itself: it makes the folder later
    elsewhere = dataclasses.replace(here, driver=("laptop", 1))
    with pytest.raises(Different, match=r"does not see .*not-there: --out must be on storage that all nodes share"):
        elsewhere.check()
    seen = dataclasses.replace(elsewhere, folder=str(tmp_path))
    seen.check()
    dataclasses.replace(elsewhere, folder="s3://bucket/x").check()
    with pytest.raises(Different, match="other sources of fedsim than the driver"):
        dataclasses.replace(seen, code_sha256="0").check()
    monkeypatch.setattr(machine, "versions", lambda: dict(here.versions) | {"torch": "1.0"})
    with pytest.raises(Different, match=r"has torch 1\.0, the driver "):
        dataclasses.replace(seen, folder=str(tmp_path.parent)).check()


# the command --------------------------------------------------------------------------------------------------------


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes: dict[str, Callable[[Any], Any]] = {"10.0.0.1": lambda call: changed(call, open_files=-1)}
    monkeypatch.setattr("fedsim.runtime.Choice.__call__", lambda choice: Joined(nodes))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-secret")
    assert main(["doctor", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "ok      storage 10.0.0.1" in said and "0 problems, 0 warnings" in said

    nodes["10.0.0.2"] = lambda call: changed(call, clock=time.time() + 1000)
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == 1 and {found["node"] for found in told["findings"] if found["level"] == PROBLEM} == {
        "10.0.0.2"
    }
    assert "the-secret" not in said + json.dumps(told)


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "check.x").write_text("")
    found = facts(str(tmp_path), "x")
    assert found.storage is None and len([*tmp_path.iterdir()]) == 2
    assert found.cores == os.cpu_count() and found.memory > found.memory_free > 0 and len(found.code_sha256) == 64
    assert facts(str(tmp_path), "other").storage == "what was written there by the driver is not seen"


def test_gpus_are_read_from_their_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A10G, 23028, 22500, 550.54.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.gpus() == (Gpu("NVIDIA A10G", 23028 * 2**20, 22500 * 2**20, "550.54.15"),)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == ()
