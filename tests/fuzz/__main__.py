"""`python -m tests.fuzz --requests 20000 --seed 1 [--processes 50]`: every answer that is wrong, and how many.

`--processes`: so many more requests, each of a process of its own, as a shell starts it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis

from benchmarks.suites import tiny
from fedsim.experiment import with_settings
from tests.fuzz.answers import answer, answer_of_process, before_anything_starts, fault
from tests.fuzz.requests import Request, encodable, requests, workspace
from tests.support.disturbed import TINY_SETTINGS


def drawn(number: int, seed: int) -> list[Request]:
    """Different requests."""
    found: dict[Request, None] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    @hypothesis.given(requests())
    def note(request: Request) -> None:
        found[request] = None

    note()
    return [*found]


def main() -> int:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--requests", type=int, default=2000)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--processes", type=int, default=0)
    options = command.parse_args()
    found, slow, began, statuses = Counter[str](), list[tuple[float, Request]](), time.monotonic(), Counter[str]()
    os.environ["FEDSIM_NUMERICS"] = "native"
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "here")
        folder.mkdir()
        workspace(folder, with_settings(tiny(), TINY_SETTINGS))
        os.chdir(folder)
        os.environ["HOME"] = str(folder / "home")
        asked = [(each, answer) for each in drawn(options.requests, options.seed)]
        others = filter(encodable, drawn(2 * options.processes + 1, options.seed + 1))
        asked += [(each, answer_of_process) for each in [*others][: options.processes]]
        for request, ask in asked:
            with before_anything_starts():
                given = ask(request)
            statuses["started" if given.started else str(given.status)] += 1
            slow.append((given.seconds, request))
            if wrong := fault(request, given):
                found[wrong] += 1
                print(f"{wrong}: {[word[:60] for word in request.words]} {request.names}\n    {given.said[-700:]}\n")
    slow.sort(key=lambda each: -each[0])
    for seconds, request in slow[:5]:
        print(f"{seconds:.1f} s: {[word[:60] for word in request.words]}")
    print(f"{len(asked)} requests in {time.monotonic() - began:.0f} s; {dict(statuses)}; wrong: {dict(found) or 0}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
