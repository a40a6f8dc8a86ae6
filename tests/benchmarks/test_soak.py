"""The soak test's own logic, without a Ray: whom it kills when, and what it makes of what it saw."""

import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.soak import HOST, SERVER, Tally, experiments, is_worn_out, kill_times, main, memory, size_mb, summary


GOOD = Tally(minutes=1.0, runs=3, equal=3, rounds=33)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--minutes", "0"], "--minutes=0.0: must be at least 0.01"),
        (["--every", "-1"], "--every=-1.0: must be at least 0.01"),
        (["--every", "nan"], "--every=nan: must be at least 0.01"),
        (["--hosts", "0"], "--hosts=0: must be at least 1"),
    ],
)
def test_wrong_requests_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_kills_are_a_function_of_the_seed() -> None:
    first, again, other = (list(itertools.islice(kill_times(seed, 5.0), 4000)) for seed in (1, 1, 2))
    assert first == again != other
    assert statistics.mean(wait for wait, _, _ in first) == pytest.approx(5.0, rel=0.1)
    names = [name for _, name, _ in first]
    assert {*names} == {HOST, SERVER} and names.count(HOST) > 4 * names.count(SERVER)
    assert all(0 <= which < 1 for _, _, which in first)


@pytest.mark.parametrize(
    "tally, passed",
    [
        (GOOD, True),
        (replace(GOOD, worn_out=2, retries=9), True),
        (replace(GOOD, equal=2), False),
        (replace(GOOD, failed=["OSError: no space"]), False),
        (replace(GOOD, left=["17 ray::Host"]), False),
        (Tally(minutes=1.0), False),
    ],
)
def test_verdict(tally: Tally, passed: bool) -> None:
    assert tally.passed() == passed
    assert summary(tally, [])["verdict"] == ("passed" if passed else "FAILED")


def test_only_what_died_too_often_is_worn_out() -> None:
    assert is_worn_out("RuntimeError: a host died 3 times while its participants 0, 1 were at 'train' of round 2: ...")
    assert is_worn_out("RuntimeError: the aggregator died 3 times at 'run_round': ...")
    assert not is_worn_out("participant 1: ZeroDivisionError: a disturbance")
    assert not is_worn_out("RuntimeError: host 0 died and cannot be started again")


def test_memory_is_that_of_thirds_after_a_warm_up() -> None:
    samples = [{"seconds": 6.0 * number, "driver_mb": 900.0 if number < 2 else 100.0 + number} for number in range(12)]
    grown = memory(samples)
    assert grown == {"first_mb": 103.0, "last_mb": 110.0, "mb_a_minute": pytest.approx(10.0)}
    assert memory(samples[:2])["mb_a_minute"] is None


def test_experiments_are_two_and_have_private_state() -> None:
    federated, alone = experiments()
    assert federated.run_id != alone.run_id and federated.participants == alone.participants
    assert federated.algorithm.name == "fedgrow" and alone.algorithm.name == "fedgrow_no_federation"


def test_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(2_000_000))
    assert size_mb(tmp_path) == pytest.approx(2.0, abs=0.1)
