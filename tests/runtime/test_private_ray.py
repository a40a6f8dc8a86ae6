"""A private Ray that comes up beside the imports: who gets it, who ends it, and what is not waited for."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from fedsim.runtime import Choice, private_ray


ROOT = Path(__file__).resolve().parents[2]


class Pretended:
    """Takes the place of Ray: starts may be held up, or fail; every start and end is noted."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.may_start, self.failing = threading.Event(), False
        self.may_start.set()

    def start(self, cpus: float, gpus: int | None) -> None:
        self.may_start.wait(timeout=60)
        self.events.append((cpus, gpus))
        if self.failing:
            self.failing = False
            raise RuntimeError("no Ray today")

    def end(self) -> None:
        self.events.append("end")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    result, before = Pretended(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(private_ray, "connect_private", result.start)
    monkeypatch.setattr(ray, "shutdown", result.end)
    yield result
    signal.signal(signal.SIGTERM, before)


def test_who_needs_a_ray_takes_the_one_that_was_begun(pretended: Pretended) -> None:
    pretended.may_start.clear()
    begun = private_ray.Prestart(4, None)
    assert private_ray.is_for_us(begun) and pretended.events == [], "nobody waits"
    pretended.may_start.set()
    private_ray.start_private(3, None, begun)
    assert pretended.events == [(4, None)]
    begun.cancel()
    assert pretended.events == [(4, None)], "it is theirs who took it"


@pytest.mark.parametrize("asked", [(5, None), (4, 1)])
def test_one_that_does_not_do_is_ended_and_another_started(pretended: Pretended, asked: tuple) -> None:
    private_ray.start_private(*asked, begun=private_ray.Prestart(4, None))
    assert pretended.events == [(4, None), "end", asked]


def test_what_failed_is_tried_again_by_whoever_needs_it(pretended: Pretended) -> None:
    pretended.failing = True
    private_ray.start_private(2, None, private_ray.Prestart(4, None))
    assert pretended.events == [(4, None), (2, None)]


def test_what_nobody_took_is_ended(pretended: Pretended) -> None:
    with pytest.raises(ValueError), Choice("ray", hosts=5, gpus=0).ahead():
        raise ValueError("a wrong request")
    begun, end = pretended.events
    assert begun in [(cpus, 0) for cpus in range(5, 1000)] and end == "end", "room for five hosts"


def test_a_request_to_end_ends_ray_as_well(pretended: Pretended) -> None:
    with pytest.raises(SystemExit), Choice("ray").ahead():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert pretended.events[-1] == "end"


def test_only_a_private_ray_is_begun(pretended: Pretended) -> None:
    for choice in (Choice("inline"), Choice("ray", address="somewhere:1")):
        with choice.ahead() as ahead:
            assert ahead.begun is None
    assert pretended.events == []


def test_words_that_are_not_understood_need_no_torch() -> None:
    program = (
        "import sys; from fedsim.cli import parser; parser().format_help(); "
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
