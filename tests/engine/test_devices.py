"""Simulated time, and those who are away, too slow or too small: by hand, and against runs without any of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from baselines.fedavg import FedAvg
from fedsim.devices import PROFILES, Conditions, Device
from fedsim.engine.cohort import cohort_of, round_cohort_of
from fedsim.engine.report import ClientReport
from fedsim.experiment import Experiment, with_settings
from fedsim.results.tables import Results, load
from fedsim.runtime.base import Runtime
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from tests.support.disturbed import small


ALWAYS = Conditions()
SLOW, FAST = Device(1e6, 1000, 8, 4), Device(1e9, 1000, 800, 400)


def on_devices(*devices: Device | str | None, conditions: Conditions = ALWAYS, **changes: Any) -> Experiment:
    """FedAvg with six participants of three tiers, each with a device of its own."""
    experiment = small()
    tiers = tuple(dataclasses.replace(t, device=d) for t, d in zip(experiment.tiers, devices, strict=True))
    algorithm = FedAvg(lr=1e-2, epochs=1, batch_size=32)
    return dataclasses.replace(experiment, tiers=tiers, algorithm=algorithm, conditions=conditions, **changes)


def results_of(experiment: Experiment, out: Path, runtime: Runtime | None = None) -> Results:
    runtime = runtime or InlineRuntime()
    run(experiment, runtime=runtime, out=out)
    runtime.close()
    return load(out)


def hashes(results: Results) -> list[str]:
    return results.rounds.sort_values("round").state_sha256.tolist()


def of_round(results: Results, round: int) -> pd.DataFrame:
    return results.clients[results.clients["round"] == round].set_index("client")


# simulated time -------------------------------------------------------------------------------------------------------


def test_time_by_hand() -> None:
    """1 MB at 8 Mbit/s is a second; so are a million operations; 1 MB at 4 Mbit/s are two."""
    report = ClientReport(bytes_down=10**6, bytes_up=10**6, flops=3_500_000, init_flops=2_500_000)
    assert report.client_round_seconds(SLOW) == pytest.approx(1 + 1 + 2)
    assert report.init_seconds(SLOW) == pytest.approx(2.5)
    assert report.client_round_seconds(None) is None and report.init_seconds(None) is None


def test_profiles_differ_as_devices_do() -> None:
    """A phone has the slowest line; a board computes slowest; a workstation does everything fastest."""
    assert min(PROFILES, key=lambda name: PROFILES[name].up_mbps) == "phone"
    assert min(PROFILES, key=lambda name: PROFILES[name].flops) == "board"
    assert max(PROFILES, key=lambda name: PROFILES[name].flops) == "workstation"
    assert [PROFILES[name].memory_mb for name in ("board", "phone", "laptop", "workstation")] == [
        1024, 2048, 4096, 24576,
    ]  # fmt: skip


def test_rows_hold_simulated_time(tmp_path: Path) -> None:
    experiment = on_devices(SLOW, FAST, FAST)
    results = results_of(experiment, tmp_path)
    for round in (1, 2, 3):
        rows = of_round(results, round)
        for row in rows.to_dict("records"):
            device = SLOW if row["tier"] == experiment.tiers[0].name else FAST
            seconds = device.seconds(down=row["bytes_down"], flops=int(row["flops"]), up=row["bytes_up"])
            assert row["simulated_seconds"] == pytest.approx(seconds) and row["outcome"] == "in_time"
        found = results.rounds.set_index("round").simulated_seconds[round]
        assert found == rows.simulated_seconds.max() > 100 * rows.simulated_seconds.min()
    assert results.rounds.set_index("round").simulated_seconds[0] == 0, "FedAvg's participants prepare nothing"
    counts = results.rounds[["late", "dropped_out", "excluded"]]
    assert (counts == 0).to_numpy().all()


def test_the_local_stage_takes_its_time_before_the_first_round(tmp_path: Path) -> None:
    experiment = dataclasses.replace(on_devices(SLOW, SLOW, SLOW), algorithm=small().algorithm)
    results = results_of(experiment, tmp_path)
    start = of_round(results, 0)
    assert (start.flops > 0).all() and (start.simulated_seconds == start.flops / SLOW.flops).all()
    assert results.rounds.set_index("round").simulated_seconds[0] == start.simulated_seconds.max()


def test_time_of_an_unknown_device_is_unknown_and_changes_nothing(tmp_path: Path) -> None:
    some = results_of(on_devices(SLOW, None, FAST), tmp_path / "some")
    none = results_of(on_devices(None, None, None), tmp_path / "none")
    assert hashes(some) == hashes(none)
    assert some.rounds.simulated_seconds.isna().all() and none.clients.simulated_seconds.isna().all()
    timed = some.clients[some.clients.simulated_seconds.notna()]
    assert {*timed.tier} == {small().tiers[0].name, small().tiers[2].name}


# too late -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Everybody is waited for."""
    return results_of(on_devices(SLOW, FAST, FAST), tmp_path_factory.mktemp("patient"))


def test_a_deadline_after_everyone_changes_nothing(patient: Results, tmp_path: Path) -> None:
    latest = float(patient.clients.simulated_seconds.max())
    results = results_of(on_devices(SLOW, FAST, FAST, conditions=Conditions(deadline=latest)), tmp_path)
    assert hashes(results) == hashes(patient)
    assert results.rounds.simulated_seconds.tolist() == patient.rounds.simulated_seconds.tolist()


def test_who_is_late_is_left_out_and_counted(patient: Results, tmp_path: Path) -> None:
    slow = small().tiers[0].name
    fastest = float(patient.clients[patient.clients.tier == slow].simulated_seconds[lambda s: s > 0].min())
    deadline = 0.5 * fastest
    results = results_of(on_devices(SLOW, FAST, FAST, conditions=Conditions(deadline=deadline)), tmp_path)
    assert hashes(results) != hashes(patient)
    for round in (1, 2, 3):
        rows = of_round(results, round)
        assert set(rows.index[rows.outcome == "late"]) == set(rows.index[rows.tier == slow]) and len(rows) == 6
        assert (rows.bytes_up > 0).all(), "they have sent it"
    rounds = results.rounds.set_index("round")
    assert rounds.late.tolist() == [0, 2, 2, 2] and rounds.participants.tolist() == [6] * 4
    assert rounds.simulated_seconds[1:].tolist() == [deadline] * 3


def test_over_selection_keeps_the_first(patient: Results, tmp_path: Path) -> None:
    """Six are sampled for a cohort of three: the same three are left as with a deadline between third and fourth."""
    three = on_devices(SLOW, FAST, FAST, conditions=Conditions(over_selection=1.0), cohort=3)
    results = results_of(three, tmp_path / "first")
    times = of_round(patient, 1).simulated_seconds.sort_values()
    rows = of_round(results, 1)
    assert set(rows.index[rows.outcome == "in_time"]) == set(times.index[:3])
    assert results.rounds.set_index("round").simulated_seconds[1] == times.iloc[2]
    assert results.rounds.late.tolist() == [0, 3, 3, 3]
    between = Conditions(deadline=float(times.iloc[2:4].mean()))
    others = results_of(on_devices(SLOW, FAST, FAST, conditions=between, rounds=1), tmp_path / "deadline")
    assert hashes(results)[1] == hashes(others)[1]


@pytest.mark.ray
def test_the_same_on_hosts(tmp_path: Path, two_hosts: Any) -> None:
    conditions = Conditions(over_selection=0.5, dropout=0.2, availability=0.9)
    experiment = on_devices(SLOW, FAST, FAST, conditions=conditions, cohort=4)
    inline = results_of(experiment, tmp_path / "inline")
    assert hashes(results_of(experiment, tmp_path / "ray", two_hosts())) == hashes(inline)
    assert inline.rounds.late.sum() + inline.rounds.dropped_out.sum() > 0


# away -----------------------------------------------------------------------------------------------------------------


def test_only_those_available_are_sampled() -> None:
    base = on_devices(None, None, None, participants=400, cohort=50, rounds=3)
    away = dataclasses.replace(base, conditions=Conditions(availability=0.3))
    cohorts = [cohort_of(away, round) for round in range(1, 40)]
    assert all(len(cohort) == 50 and list(cohort) == sorted({*cohort}) for cohort in cohorts)
    everyone = dataclasses.replace(away, cohort=None)
    there = [cohort_of(everyone, round) for round in range(1, 40)]
    assert all({*cohort} <= {*available} for cohort, available in zip(cohorts, there, strict=True))
    assert 0.27 < sum(map(len, there)) / (39 * 400) < 0.33
    assert len({*there}) == 39, "another part of the population in every round"
    assert cohort_of(dataclasses.replace(away, cohort=300), 1) == there[0], "fewer where there are no more"


def test_who_drops_out_is_drawn_by_the_seed_and_keeps_its_state(tmp_path: Path) -> None:
    experiment = on_devices(SLOW, FAST, FAST, conditions=Conditions(dropout=0.5))
    results = results_of(experiment, tmp_path)
    for round in (1, 2, 3):
        round_cohort, rows = round_cohort_of(experiment, round), of_round(results, round)
        assert round_cohort.reached == (0, 1, 2, 3, 4, 5) and round_cohort == round_cohort_of(experiment, round)
        assert tuple(rows.index[rows.outcome == "dropped_out"]) == round_cohort.dropped_out
        gone = rows.loc[list(round_cohort.dropped_out)]
        assert (gone.bytes_up == 0).all() and (gone.bytes_down > 0).all() and gone.train_loss.isna().all()
    assert results.rounds.dropped_out.sum() > 0
    assert round_cohort_of(experiment, 0).dropped_out == ()


def test_a_round_in_which_nobody_is_there_changes_nothing(tmp_path: Path) -> None:
    results = results_of(on_devices(None, None, None, conditions=Conditions(availability=1e-9)), tmp_path)
    assert len({*hashes(results)[1:]}) == 1
    assert results.rounds.participants.tolist() == [0] * 4 and (results.rounds.bytes_up == 0).all()
    assert results.rounds.accuracy_mean.notna().all(), "they are scored all the same"


# too small ------------------------------------------------------------------------------------------------------------


def tight(memory: str, *mib: float) -> Experiment:
    devices = [dataclasses.replace(FAST, memory_mb=each) for each in mib]
    return on_devices(*devices, conditions=Conditions(memory=memory))  # type: ignore[arg-type]


def test_a_device_that_cannot_hold_a_step_is_refused_before_anything_starts(tmp_path: Path) -> None:
    experiment = tight("refuse", 0.01, 100, 100)
    with pytest.raises(
        ValueError, match=rf"tier '{experiment.tiers[0].name}': device.memory_mb=0.01: must be at least"
    ):
        results_of(experiment, tmp_path)
    assert not list(tmp_path.iterdir())


def test_participants_with_too_small_a_device_are_left_out(tmp_path: Path) -> None:
    excluded = results_of(tight("exclude", 0.01, 100, 100), tmp_path / "exclude")
    out = {*excluded.clients.client[excluded.clients.outcome == "excluded"]}
    assert out == {*excluded.clients.client[excluded.clients.tier == small().tiers[0].name]}
    rounds = excluded.rounds.set_index("round")
    assert rounds.excluded.tolist() == [2] * 4 and rounds.participants.tolist() == [6] * 4
    rows = excluded.clients[excluded.clients.client.isin(out)]
    assert rows.accuracy.isna().all() and (rows.bytes_down == 0).all() and rows.flops.isna().all()
    ignored, plain = (results_of(tight(kind, *mib), tmp_path / kind) for kind, mib in TIGHT.items())
    assert hashes(ignored) == hashes(plain) != hashes(excluded)


TIGHT = {"ignore": (0.01, 100, 100), "refuse": (100, 100, 100)}


def test_excluding_everyone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"conditions.memory='exclude': must be another than 'exclude' for fedavg"):
        results_of(tight("exclude", 0.01, 0.01, 0.01), tmp_path)


# what is typed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (["tiers.0.device=phnoe"], r"device='phnoe': must be one of phone, board, .*did you mean 'phone'"),
        (["tiers.0.device.flops=0"], "tiers.0.device.memory_mb must be given"),
        (["conditions.availability=0"], "conditions.availability=0: must be greater than 0"),
        (["conditions.availability=1.1"], "conditions.availability=1.1: must be at most 1"),
        (["conditions.dropout=1"], "conditions.dropout=1: must be less than 1"),
        (["conditions.deadline=-1"], "conditions.deadline=-1: must be greater than 0"),
        (["conditions.memory=forget"], "conditions.memory='forget': must be one of 'refuse', 'exclude', 'ignore'"),
        (["conditions.deadline=5"], r"tiers.device=None: must be given for every tier"),
        (["conditions=5"], "conditions=5: set its fields instead"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(small(), settings)


def test_profiles_by_name_and_by_fields() -> None:
    named = with_settings(small(), ["tiers.0.device=phone", "tiers.1.device=laptop", "tiers.2.device=board"])
    assert named.tiers[0].simulated == PROFILES["phone"] and named.run_id != small().run_id
    written = [f"tiers.0.device.{f.name}={getattr(SLOW, f.name)}" for f in dataclasses.fields(SLOW)]
    assert with_settings(small(), written).tiers[0].simulated == SLOW
    assert with_settings(named, ["tiers.0.device=none"]).tiers[0].simulated is None
