"""What is frozen is lost after a while, and a participant that does not answer is not waited for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.experiment import Experiment, with_settings
from fedsim.runtime import liveness
from fedsim.runtime.inline import InlineRuntime
from fedsim.runtime.liveness import LOOKS, Liveness
from fedsim.sweeps.runner import run_all
from tests.support.disturbed import Disturbed, marks, small


pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(reference: Path) -> list[str]:
    """Hashes of an inline run of `small`."""
    rounds = fedsim.load(reference).rounds.sort_values("round")
    return list(rounds.state_sha256[rounds.algorithm == "fedgrow"])


def disturbed(event: str, folder: Path, on_error: Any = "stop", **where: Any) -> Experiment:
    experiment = small()
    algorithm = Disturbed(experiment.algorithm, event, str(folder), **where)
    return replace(experiment, algorithm=algorithm, on_error=on_error)


def hashes(out: Path) -> list[str]:
    return list(fedsim.load(out).rounds.sort_values("round").state_sha256)


@pytest.fixture
def impatient(two_hosts: Any) -> Any:
    """Lends a runtime with two hosts for which a process is lost after three seconds."""
    runtime = two_hosts().runtime
    before, runtime.liveness = runtime.liveness, 3.0
    yield two_hosts
    runtime.liveness = before


@pytest.mark.parametrize("at, client", [("client_update", 1), ("combine", -1)])
def test_a_frozen_host_is_lost_and_the_bits_stay(impatient, undisturbed, tmp_path, at, client):
    experiment = disturbed("freeze", tmp_path, at=at, client=client)
    assert run_all([experiment], out=tmp_path / "out", make_runtime=impatient) == []
    assert "Host" in marks(tmp_path)[0].read_text()
    assert hashes(tmp_path / "out") == undisturbed
    assert fedsim.load(tmp_path / "out").rounds.retries.sum() > 0


@pytest.mark.parametrize("at", ["server_broadcast", "server_init"])
def test_a_frozen_aggregator_is_lost_and_the_bits_stay(impatient, undisturbed, tmp_path, at):
    experiment = disturbed("freeze", tmp_path, at=at, client=-1, round=0 if at == "server_init" else 2)
    assert run_all([experiment], out=tmp_path / "out", make_runtime=impatient) == []
    assert "Server" in marks(tmp_path)[0].read_text()
    assert hashes(tmp_path / "out") == undisturbed


def test_a_host_that_computes_for_longer_is_not_lost(impatient, undisturbed, tmp_path):
    experiment = disturbed("busy", tmp_path)
    assert run_all([experiment], out=tmp_path / "out", make_runtime=impatient) == []
    assert marks(tmp_path)[0].exists() and hashes(tmp_path / "out") == undisturbed
    assert fedsim.load(tmp_path / "out").rounds.retries.sum() == 0


# a limit on calls -----------------------------------------------------------------------------------------------------

LATE = "participant 1: TimeoutError: no answer to 'train' of round 2 within call_seconds=5"


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_a_participant_that_does_not_answer_stops_the_run_and_is_named(two_hosts, undisturbed, tmp_path, where):
    experiment = replace(disturbed("stall", tmp_path), call_seconds=5.0)
    (failure,) = run_all([experiment], out=tmp_path, make_runtime=InlineRuntime if where == "inline" else two_hosts)
    assert failure.reason == LATE and marks(tmp_path)[0].exists()
    assert hashes(tmp_path) == undisturbed[:2]


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_a_participant_that_answers_when_it_is_asked_again_changes_nothing(two_hosts, undisturbed, tmp_path, where):
    experiment = replace(disturbed("stall", tmp_path, on_error="retry"), call_seconds=5.0)
    make_runtime = InlineRuntime if where == "inline" else two_hosts
    assert run_all([experiment], out=tmp_path / "out", make_runtime=make_runtime) == []
    assert marks(tmp_path)[0].exists() and hashes(tmp_path / "out") == undisturbed
    assert fedsim.load(tmp_path / "out").rounds.retries.sum() > 0


def test_a_participant_that_never_answers_is_dropped_with_the_same_bits_everywhere(two_hosts, tmp_path):
    found = []
    for name, make_runtime in {"inline": InlineRuntime, "ray": two_hosts}.items():
        (tmp_path / name).mkdir()
        experiment = replace(disturbed("stall_always", tmp_path / name, on_error="drop"), call_seconds=8.0)
        assert run_all([experiment], out=tmp_path / name / "out", make_runtime=make_runtime) == []
        found.append(hashes(tmp_path / name / "out"))
        assert fedsim.load(tmp_path / name / "out").rounds.failed.tolist() == [0, 0, 1, 0]
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_limit_is_where_a_run_is_computed_and_no_part_of_it():
    assert with_settings(small(), ["call_seconds=30"]).run_id == small().run_id
    for wrong in ("0", "-1", "nan", "true", "'x'"):
        with pytest.raises(ValueError, match="call_seconds"):
            with_settings(small(), [f"call_seconds={wrong}"])


# the clock ------------------------------------------------------------------------------------------------------------


class Silent:
    """An actor whose pings have no answer."""

    class ping:
        @staticmethod
        def remote() -> object:
            return object()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `Liveness` reads; pings have no answer."""
    now = [0.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(liveness.ray, "wait", lambda references, **_: ([], references))
    return now


def test_who_is_silent_for_as_long_as_the_limit_is_lost(clock):
    watched = Liveness(60.0)
    for second in range(0, 60, 5):
        clock[0] = float(second)
        assert watched.look({"host": Silent}) == ({}, [])
    clock[0] = 60.0
    assert watched.look({"host": Silent, "other": Silent}) == ({}, ["host"])


def test_a_machine_that_slept_loses_nobody(clock):
    watched = Liveness(60.0)
    watched.look({"host": Silent})
    for hour in (1, 2, 3):
        clock[0] = hour * 3600.0
        assert watched.look({"host": Silent}) == ({}, [])
    assert watched.every == 60 / LOOKS


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "0.5"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    from fedsim.core import environment

    monkeypatch.setenv("FEDSIM_LIVENESS_SECONDS", text)
    with pytest.raises(ValueError, match=f"FEDSIM_LIVENESS_SECONDS='{text}'"):
        environment.liveness_seconds()
