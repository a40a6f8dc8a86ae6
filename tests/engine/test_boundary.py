"""What participants must not send, keep or raise: refused by name, and by the policy, inline and on Ray alike."""

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from fedsim.core.errors import text_of
from fedsim.experiment import Experiment
from fedsim.results.tables import Results
from fedsim.runtime.base import Interrupt, Runtime
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import RunFailed
from fedsim.sweeps.runner import run_all
from tests.support.inline_runs import inline
from tests.support.wrong_updates import KEPT, ONES, ROUND, WRITES, WRONG, Wrong, experiment


def results_of(experiment: Experiment, out: Path, make_runtime: Callable[[], Runtime] = InlineRuntime) -> Results:
    assert run_all([experiment], out=out, make_runtime=make_runtime) == []
    return fedsim.load(out)


def hashes(results: Results) -> list[str]:
    return list(results.rounds.sort_values("round").state_sha256)


def errors(results: Results) -> dict[int, str]:
    clients = results.clients
    failed = clients[(clients["round"] == ROUND) & (clients.outcome == "failed")]
    return dict(zip(failed.client, failed.error, strict=True))


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Hashes of a run whose participant 1 raises at once, and is dropped."""
    return hashes(results_of(experiment("", "nan", away=True, on_error="drop"), tmp_path_factory.mktemp("away")))


# each by itself, inline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRONG)
def test_who_is_wrong_is_dropped_as_if_it_had_been_away(kind: str, away: list[str], tmp_path: Path) -> None:
    results = results_of(experiment("", kind, on_error="drop"), tmp_path)
    assert hashes(results) == away
    assert results.rounds.sort_values("round").failed.tolist() == [0, 0, 1, 0]
    (client,), (error,) = errors(results).keys(), errors(results).values()
    assert client == 1 and re.search(WRONG[kind][1], error), error
    assert len(error) < 10_000 and error.isprintable()


@pytest.mark.parametrize("kind", ["nan", "wider", "missing", "weight 0", "state nan", "metrics nan", "none at all"])
@pytest.mark.parametrize("on_error", ["stop", "retry"])
def test_who_is_wrong_ends_the_run_and_is_named(kind: str, on_error: str, away: list[str], tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with pytest.raises(RunFailed, match=rf"participant 1, round 2: .*{WRONG[kind][1]}") as failure:
        inline(experiment("", kind, on_error=on_error, seen=str(seen)), tmp_path)
    assert failure.value.reason.startswith("participant 1: ValueError: ")
    assert seen.read_text().split() == ["1"] * (2 if on_error == "retry" else 1)
    assert hashes(fedsim.load(tmp_path)) == away[:ROUND], "what was finished is what it was"


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_whoever_it_is_others_are_not_blamed(first: int, tmp_path: Path) -> None:
    kinds = ["", "", "", ""]
    kinds[first] = "one row"
    results = results_of(experiment(*kinds, on_error="drop", chunk=1), tmp_path)
    assert list(errors(results)) == [first]


def test_a_round_of_which_everybody_is_dropped_changes_nothing(tmp_path: Path) -> None:
    results = results_of(experiment("nan", "wider", "weight 0", "extra", on_error="drop", rounds=2), tmp_path)
    rounds = results.rounds.sort_values("round")
    assert rounds.failed.tolist() == [0, 0, 4]
    assert rounds.state_sha256.nunique() == 2, "the server's state and everybody's are those of round 1"


def test_batched_participants_are_told_apart(away: list[str], tmp_path: Path) -> None:
    for kind in ("nan", "exits", "keyboard", "asks"):
        results = results_of(experiment("", kind, on_error="drop", batched=True), tmp_path / kind)
        assert hashes(results) == away
        assert list(errors(results)) == [1]


# all at once, on Ray --------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_on_hosts_everybody_is_refused_as_inline(two_hosts: Callable[[], Runtime], tmp_path: Path) -> None:
    """Every third participant is wrong, each in its own way."""
    kinds = [kind for each in WRONG for kind in (each, "", "")]
    asked = experiment(*kinds, clients=len(kinds), on_error="drop", chunk=4)
    there = results_of(asked, tmp_path / "there", two_hosts)
    here = results_of(asked, tmp_path / "here")
    away = results_of(dataclasses.replace(asked, algorithm=Wrong(tuple(kinds), away=True)), tmp_path / "away")
    assert hashes(there) == hashes(here) == hashes(away)
    said = errors(there)
    assert sorted(said) == list(range(0, len(kinds), 3))
    for client, error in said.items():
        assert re.search(WRONG[kinds[client]][1], error), error
    assert said == errors(here)


@pytest.mark.ray
@pytest.mark.parametrize("on_error", ["stop", "retry"])
def test_on_hosts_the_run_ends_with_the_same_words(
    two_hosts: Callable[[], Runtime], on_error: str, tmp_path: Path
) -> None:
    asked = experiment("", "", "nan", on_error=on_error)
    (there,) = run_all([asked], out=tmp_path / "there", make_runtime=two_hosts)
    (here,) = run_all([asked], out=tmp_path / "here", make_runtime=InlineRuntime)
    assert there.reason == here.reason
    assert re.search("participant 2, round 2: " + WRONG["nan"][1], there.reason)


# writes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def right(tmp_path: Path) -> list[str]:
    """Hashes of a run in which nobody writes into anything."""
    KEPT.clear()
    return hashes(results_of(experiment(), tmp_path / "right"))


@pytest.mark.parametrize("kind", WRITES)
def test_what_one_writes_nobody_sees(kind: str, right: list[str], tmp_path: Path) -> None:
    assert hashes(results_of(experiment(*[kind] * 4), tmp_path / "wrote")) == right


@pytest.mark.ray
def test_on_hosts_neither(two_hosts: Callable[[], Runtime], right: list[str], tmp_path: Path) -> None:
    for kind in WRITES:
        assert hashes(results_of(experiment(*[kind] * 4), tmp_path / kind, two_hosts)) == right, kind


# the server, and the user ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Diverges(Wrong):
    """A server that makes something else of the mean in round 2."""

    made: str = "nan"

    def server_aggregate(self, state: Any, updates: Any, ctx: Any) -> Any:
        mean = super().server_aggregate(state, updates, ctx)
        if ctx.round != ROUND:
            return mean
        return {"nan": mean | {"more": ONES * float("nan")}, "none": None, "list": {"model": [ONES]}}[self.made]


@pytest.mark.parametrize(
    "made, said", [("nan", r"\['more'\]=NaN in 6 of 6"), ("none", "=None: must be"), ("list", r"\['model'\]=a list")]
)
def test_the_servers_own_state_is_looked_at(made: str, said: str, tmp_path: Path) -> None:
    asked = dataclasses.replace(experiment(), algorithm=Diverges(made=made))
    with pytest.raises(RunFailed, match=f"the state that server_aggregate in round 2 returned{said}"):
        inline(asked, tmp_path)
    assert len(fedsim.load(tmp_path).rounds) == ROUND


@dataclasses.dataclass(frozen=True)
class Interrupted(Wrong):
    """The user sends Ctrl-C while a participant works."""

    def client_update(self, payload: Any, state: Any, ctx: Any) -> Any:
        if ctx.round == ROUND:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10**6):
                pass
        return super().client_update(payload, state, ctx)


def test_the_users_own_interrupt_ends_the_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupt):
        inline(dataclasses.replace(experiment(on_error="drop"), algorithm=Interrupted()), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(fedsim.load(tmp_path).rounds) == ROUND


@dataclasses.dataclass(frozen=True)
class Prototypes(Wrong):
    """Clients send something else with data than without."""

    vary: bool = True

    @property
    def updates_vary(self) -> bool:
        return self.vary

    def combine(self, updates: Any) -> None:
        return None

    def server_aggregate(self, state: Any, updates: Any, ctx: Any) -> Any:
        return {**state, **{f"from {update.client}": next(iter(update.tree.values())) for update in updates}}

    def client_update(self, payload: Any, state: Any, ctx: Any) -> Any:
        sent = {str(int(label)): ONES for label in ctx.train.labels[:2]} or {"none": ONES}
        return dataclasses.replace(super().client_update(payload, state, ctx)[0], tree=sent), state


def test_a_method_may_say_that_its_updates_vary(tmp_path: Path) -> None:
    inline(dataclasses.replace(experiment(), algorithm=Prototypes()), tmp_path / "vary")
    with pytest.raises(RunFailed, match=r"participant 0, round 1: .*unless the algorithm says `updates_vary`"):
        inline(dataclasses.replace(experiment(), algorithm=Prototypes(vary=False)), tmp_path / "same")


@dataclasses.dataclass(frozen=True)
class Buggy(Wrong):
    """A bug that is met whenever a method is called."""

    at: str = "client_update"

    def client_update(self, payload: Any, state: Any, ctx: Any) -> Any:
        if self.at == "client_update":
            return {}["nowhere"]
        return None

    def client_init(self, ctx: Any) -> Any:
        return 1 / 0 if self.at == "client_init" else super().client_init(ctx)


@pytest.mark.parametrize(
    "at, said",
    [
        ("client_update", r"client_update of tier 'device', called without data .* raised KeyError: 'nowhere'"),
        ("client_init", r"client_init of tier 'device', called without data .* raised ZeroDivisionError"),
    ],
)
def test_a_bug_that_counting_meets_is_said_to_be_the_methods(at: str, said: str, tmp_path: Path) -> None:
    (failure,) = run_all(
        [dataclasses.replace(experiment(), algorithm=Buggy(at=at))], out=tmp_path, make_runtime=InlineRuntime
    )
    assert re.search(said, failure.reason) and re.search(rf"test_boundary\.py:\d+, in {at}\)$", failure.reason)


# texts ----------------------------------------------------------------------------------------------------------------


def deep(depth: int) -> None:
    if not depth:
        raise ValueError("at the bottom\nwith a second line")
    shallow(depth)


def shallow(depth: int) -> None:
    deep(depth - 1)


def test_a_text_keeps_its_begin_and_its_end() -> None:
    with pytest.raises(ValueError) as raised:
        deep(300)
    text = text_of(raised.value)
    assert len(text) < 40_000 and "more frames]" in text
    assert text.startswith("Traceback") and text.endswith("ValueError: at the bottom\nwith a second line\n")


@pytest.mark.parametrize("size", [10, 4_000, 5_000, 10**7])
def test_a_message_is_cut_in_the_middle(size: int) -> None:
    text = text_of(ValueError("a" + "-" * size + "z"))
    assert text.startswith("ValueError: a-") and text.strip().endswith("-z")
    assert len(text) < 4_100 and ("more characters" in text) == (size >= 4_000)


def test_tensors_that_are_lent_copy_when_they_are_written_to() -> None:
    """What the platform relies on of torch."""
    from fedsim.core.tree import lent, untouched

    held = {"a": {"b": torch.arange(4.0)}, "c": torch.zeros(0)}
    first, second = lent(held), lent(held)
    first["a"]["b"][1:].mul_(5)
    assert not untouched(first, held) and untouched(second, held)
    assert second["a"]["b"].numpy().tolist() == held["a"]["b"].tolist() == [0, 1, 2, 3]
    assert untouched(second, held), "reading through numpy"
