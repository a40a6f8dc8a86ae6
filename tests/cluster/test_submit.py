"""`fedsim submit` without a cluster: what is refused, what is sent, and how a log is followed when it is cut."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from fedsim.cli import main, parser
from fedsim.cli.commands import experiments_for
from fedsim.cluster.submit import asked_by, entrypoint
from fedsim.runtime import submission
from fedsim.runtime.submission import follow, stop


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(submission, "QUIET_SECONDS", 0.05)


class Cluster:
    """A job server. `tails`: what each connection to the log gives; an error ends it in the middle."""

    def __init__(self, tails: Sequence[Sequence[str | Exception]], log: str = "") -> None:
        self.tails, self.log, self.asked = [*tails], log, 0
        self.stopped: list[str] = []
        self.connections = 0

    def client(self) -> Any:
        self.connections += 1
        return self

    first = client

    async def tail_job_logs(self, id_: str) -> AsyncIterator[str]:
        for each in self.tails.pop(0):
            await asyncio.sleep(0)
            if isinstance(each, BaseException):
                raise each
            yield each

    def get_job_logs(self, id_: str) -> str:
        return self.log

    def get_job_info(self, id_: str) -> Any:
        self.asked += 1
        over = not self.tails or self.stopped
        return SimpleNamespace(status=JobStatus.SUCCEEDED if over else JobStatus.RUNNING, driver_exit_code=0)

    def stop_job(self, id_: str) -> None:
        self.stopped.append(id_)


def followed(cluster: Any) -> tuple[str, list[str]]:
    written, told = [], []
    assert follow(cluster, "job", written.append, told.append).status == JobStatus.SUCCEEDED
    return "".join(written), told


def test_a_log_is_passed_on_as_it_comes_with_what_came_after_the_end() -> None:
    assert followed(Cluster([["one\n", "two\n"]], "one\ntwo\nthree\n")) == ("one\ntwo\nthree\n", [])


def test_a_lost_connection_is_tried_again_and_nothing_is_printed_twice() -> None:
    cut = ConnectionError("reset by peer")
    cluster = Cluster([["one\n", cut], [cut], ["one\ntw", "o\nthr", cut], ["one\n", "two\nthree\n", "four\n"]])
    cluster.log = "one\ntwo\nthree\nfour\n"
    written, told = followed(cluster)
    assert written == "one\ntwo\nthree\nfour\n" and cluster.connections == 4
    assert told[0].startswith("connection lost (reset by peer); the job goes on")
    assert told.count("connected again") == 2, "the second was lost before a word came"


def test_a_silent_job_is_asked_after_and_waited_for() -> None:
    class Slow(Cluster):
        async def tail_job_logs(self, id_: str) -> AsyncIterator[str]:
            await asyncio.sleep(0.2)
            yield "at last\n"
            self.tails.clear()

    cluster = Slow([[]], "at last\n")
    assert followed(cluster) == ("at last\n", []) and cluster.asked >= 3


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LOST_SECONDS", -1.0)
    cluster = Cluster([[ConnectionError("gone")]] * 99)
    with pytest.raises(ConnectionError, match="no connection for"):
        follow(cluster, "job", lambda text: None, lambda text: None)  # type: ignore[arg-type]


def test_a_job_that_the_head_does_not_know_ends_it() -> None:
    class Restarted(Cluster):
        def get_job_info(self, id_: str) -> Any:
            raise RuntimeError(f"Request failed with status code 404: Job {id_} does not exist")

    with pytest.raises(ConnectionError, match="knows nothing of job job: it was started again"):
        follow(Restarted([["one\n"]]), "job", lambda text: None, lambda text: None)  # type: ignore[arg-type]


def test_who_reads_the_output_may_leave() -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(Cluster([["one\n"]]), "job", gone, lambda text: None)  # type: ignore[arg-type]


def test_local_results_are_not_copied_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    words = ["submit", "benchmarks.suites:tiny", "--address", "http://127.0.0.1:1", "--out", "s3://bucket/x"]
    assert main([*words, "--fetch", str(tmp_path)]) == 2
    assert "holds runs that were computed here: give another folder" in capsys.readouterr().err


def test_an_interrupt_is_not_taken_for_a_lost_connection() -> None:
    cluster = Cluster([["one\n", KeyboardInterrupt()]])  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        follow(cluster, "job", lambda text: None, lambda text: None)  # type: ignore[arg-type]


def test_a_job_is_stopped_once() -> None:
    cluster = Cluster([["x"]])
    assert stop(cluster, "job") is not None and cluster.stopped == ["job"]  # type: ignore[arg-type]
    assert stop(cluster, "job") is not None and cluster.stopped == ["job"], "it had ended"  # type: ignore[arg-type]


# what is sent -------------------------------------------------------------------------------------------------------


def options(*words: str) -> Namespace:
    return parser().parse_args(["submit", "--cluster", "cluster.yaml", "--out", "s3://bucket/x", *words])


def test_what_is_run_on_the_head() -> None:
    words = entrypoint(options("my.module:study", "--set", "rounds=2", "--resume"), 4, 20.0)
    assert words == [
        *("python", "-m", "fedsim", "run", "my.module:study", "--address", "auto", "--out", "s3://bucket/x"),
        *("--hosts", "4", "--wait", "20", "--resume", "--set", "rounds=2"),
    ]
    words = entrypoint(options("--suite", "quick", "text", "--seeds", "0", "1", "--only", "fedavg"), None, 20.0)
    assert words == [
        *("python", "-m", "benchmarks.sweep", "--suite", "quick", "text", "--address", "auto", "--out"),
        *("s3://bucket/x", "--seeds", "0", "1", "--only", "fedavg"),
    ]
    words = entrypoint(options("my.module:study", "--keep-updates"), None, 0.0)
    assert words[-1] == "--keep-updates"
    assert entrypoint(options("--suite", "quick", "--publish"), None, 0.0)[-1] == "--publish"
    with pytest.raises(ValueError, match="--seeds: only with --suite"):
        entrypoint(options("my.module:study", "--seeds", "1"), None, 0.0)


def test_the_experiments_are_made_here_first() -> None:
    [experiment] = experiments_for(options("benchmarks.suites:tiny", "--set", "rounds=7"))
    assert experiment.rounds == 7 and len(asked_by(experiment)) == experiment.participants
    chosen = experiments_for(options("--suite", "quick", "--only", "fedavg"))
    assert {each.algorithm.name for each in chosen} == {"fedavg"}
    with pytest.raises(ValueError, match="rundes"):
        experiments_for(options("benchmarks.suites:tiny", "--set", "rundes=7"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x:y", "--out", "s3://b/x", "--address", "host:6379"], "--address='host:6379': must be http://HOST:PORT"),
        (["x:y", "--out", "s3://b/x"], "--address=None: must be http"),
        (["x:y", "--out", "s3://b/x", "--cluster", "missing.yaml"], "--cluster='missing.yaml': must be a file for"),
        (["--out", "s3://b/x", "--address", "http://127.0.0.1:1"], "give either MODULE:FUNCTION or --suite"),
        (["x:y", "--suite", "q", "--address", "http://127.0.0.1:1"], "give either MODULE:FUNCTION or --suite"),
        (["x:y", "--address", "http://127.0.0.1:1"], "--out: must say where results go"),
        (["x:y", "--out", "results/x", "--address", "http://127.0.0.1:1"], "must be an absolute path there"),
        (["x:y", "--out", "ftp://x", "--address", "http://127.0.0.1:1"], "--out='ftp://x'"),
        (
            ["x:y", "--out", "/x", "--address", "http://127.0.0.1:1", "--env", "MY_SECRET_KEY=hush"],
            "--env: MY_SECRET_KEY: looks like a secret",
        ),
        (["x:y", "--out", "/x", "--address", "http://127.0.0.1:1", "--env", "1A=2"], "--env='1A': must be NAME=VALUE"),
        (
            ["benchmarks.suites:tiny", "--out", "/x", "--address", "http://127.0.0.1:1"],
            "http://127.0.0.1:1: no job server answers",
        ),
        (
            ["benchmarks.suites:tiny", "--out", "/x", "--address", "http://127.0.0.1:1", "--wait", "3"],
            "--wait=3: needs --hosts",
        ),
        (["benchmarks.suites:none", "--out", "/x", "--address", "http://127.0.0.1:1"], "none"),
        (["--suite", "quikc", "--out", "/x", "--address", "http://127.0.0.1:1"], "no such suite"),
        (["--stop", "job", "--address", "http://127.0.0.1:1"], "no job server answers"),
    ],
)
def test_what_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["submit", *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "hush" not in error


def test_a_cluster_without_room_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cluster.test_cluster_file import written

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(submission, "send", lambda *words: pytest.fail("sent"))
    words = ["submit", "benchmarks.suites:tiny", "--cluster", written(tmp_path), "--out", "s3://bucket/x"]
    assert main([*words, "--hosts", "40"]) == 2 and "has room for 24 " in capsys.readouterr().err
    assert main([*words, "--set", "tiers.0.num_gpus=2"]) == 2 and "no node has" in capsys.readouterr().err
