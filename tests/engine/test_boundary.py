"""What participants must not send, keep or raise: refused by name, and by the policy, inline and on Ray alike."""

import dataclasses
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedsim
from baselines.fedavg import FedAvg
from fedsim.algorithm import ClientContext, ClientInfo, ServerContext
from fedsim.core.interrupts import Interrupt
from fedsim.core.text import text_of
from fedsim.core.tree import State, flat, lent, mapped, nested, ordered, sha256, untouched
from fedsim.core.updates import ClientUpdate, Partial, weighted_sum
from fedsim.engine.boundary import Sent, checked, layout_of
from fedsim.experiment import Experiment
from fedsim.results.tables import Results
from fedsim.runtime.base import Runtime
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import RunFailed
from fedsim.sweeps.runner import run_all
from tests.support.disturbed import small
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


@dataclasses.dataclass(frozen=True)
class Turned(FedAvg):
    """Everything is handed over as a transposed view, and must arrive as it would from another process, or a file."""

    name: ClassVar[str] = "turned"

    def server_init(self, ctx: ServerContext) -> State:
        return mapped(turned, super().server_init(ctx))

    def server_broadcast(self, state: State, clients: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, State]:
        assert contiguous(state)
        return {id_: mapped(turned, sent) for id_, sent in super().server_broadcast(state, clients, ctx).items()}

    def client_init(self, ctx: ClientContext) -> State:
        return {"kept": turned(torch.ones(3, 2))}

    def client_update(self, payload: State, state: State, ctx: ClientContext) -> Any:
        assert contiguous(payload) and contiguous(state)
        update, _ = yield from super().client_update(payload, state, ctx)
        return dataclasses.replace(update, tree=mapped(turned, update.tree)), mapped(turned, state)

    def server_aggregate(self, state: State, updates: Iterator[Any], ctx: ServerContext) -> State:
        arrived = list(updates)
        assert arrived and all(contiguous(each.tree) for each in arrived)
        return mapped(turned, super().server_aggregate(state, iter(arrived), ctx))

    def combine(self, updates: Sequence[ClientUpdate]) -> None:
        return None


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous().T if tensor.ndim == 2 else tensor


def contiguous(state: Mapping[str, Any]) -> bool:
    return all(tensor.is_contiguous() for tensor in flat(state).values())


def test_strides_which_a_message_forgets_are_forgotten_inline_too(tmp_path: Path) -> None:
    assert not contiguous(mapped(turned, {"": torch.ones(3, 2)}))
    found = [
        results_of(dataclasses.replace(small(), algorithm=algorithm, rounds=2), tmp_path / algorithm.name)
        for algorithm in (FedAvg(of="target"), Turned(of="target"))
    ]
    one, other = (each.rounds.accuracy_mean.tolist() for each in found)
    assert one == other


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


# any update -----------------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = st.text("abc.-: ", min_size=1, max_size=4).filter(lambda name: "::" not in name and name.strip(":") == name)
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype),
    st.sampled_from([*FLOATS, torch.int64, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
STATES = st.recursive(
    st.dictionaries(NAMES, TENSORS, max_size=3),
    lambda inner: st.dictionaries(NAMES, TENSORS | inner, min_size=1, max_size=3),
    max_leaves=6,
)


@given(tree=STATES, weight=st.integers(1, 2**53) | st.floats(1e-200, 1e15))
def test_a_right_update_passes_as_it_is(tree: State, weight: float) -> None:
    sent = Sent(layout_of(tree), as_received=False)
    update, state = checked((ClientUpdate(7, tree, weight, {"a": 1.5}), tree), 7, sent, {})
    assert sha256(update.tree) == sha256(tree) and state is tree
    assert list(flat(update.tree)) == list(flat(ordered(tree)))
    assert (update.client, update.weight, update.metrics) == (7, weight, {"a": 1.5})
    checked((ClientUpdate(7, tree, weight), {}), 7, Sent({"other": (torch.bool, torch.Size())}, True), tree)


@given(tree=STATES.filter(lambda tree: bool(flat(tree))), data=st.data())
def test_whatever_is_wrong_with_a_tensor_its_path_is_said(tree: State, data: st.DataObject) -> None:
    leaves = flat(tree)
    path = data.draw(st.sampled_from(sorted(leaves)))
    tensor = leaves[path]
    wrong: list[Any] = [tensor.to("meta"), tensor.to_sparse(), tensor.unsqueeze(0), tensor.tolist(), str(tensor), None]
    wrong += [tensor.to(torch.int16), torch.cat([tensor.reshape(-1)] * 2 + [torch.ones(1).to(tensor.dtype)])]
    if tensor.is_floating_point() and tensor.numel():
        for number in (float("nan"), float("inf"), -float("inf")):
            wrong.append(tensor.clone())
            wrong[-1].reshape(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = number
    one = data.draw(st.sampled_from(wrong))
    corrupt = nested({**leaves, path: one})
    said = re.escape(f"ClientUpdate.tree[{path!r}]=")
    with pytest.raises(ValueError, match=f"^{said}.*: must be "):
        checked((ClientUpdate(7, corrupt, 1), {}), 7, Sent(layout_of(tree), as_received=False), {})
    rest = nested({name: leaf for name, leaf in leaves.items() if name != path})
    with pytest.raises(ValueError, match=f"^{said}missing: must be "):
        checked((ClientUpdate(7, rest, 0), {}), 7, Sent(layout_of(tree), as_received=False), {})


# the server, and the user ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Diverges(Wrong):
    """A server that makes something else of the mean in round 2."""

    made: str = "nan"

    def server_broadcast(self, state: Any, cohort: Any, ctx: Any) -> Any:
        payloads = super().server_broadcast(state, cohort, ctx)
        if ctx.round != ROUND:
            return payloads
        sent = {"payload nan": state | {"more": ONES * float("nan")}, "payload list": [ONES]}.get(self.made, state)
        return {id_: sent for id_ in payloads if id_ != 3 or self.made != "left out"}

    def server_aggregate(self, state: Any, updates: Any, ctx: Any) -> Any:
        mean = super().server_aggregate(state, updates, ctx)
        if ctx.round != ROUND:
            return mean
        return {"nan": mean | {"more": ONES * float("nan")}, "none": None, "list": {"model": [ONES]}}[self.made]


RETURNED, SENT = "the state that server_aggregate in round 2 returned", "a payload of server_broadcast in round 2"


@pytest.mark.parametrize(
    "made, said",
    [
        ("nan", rf"{RETURNED}\['more'\]=NaN in 6 of 6"),
        ("none", f"{RETURNED}=None: must be"),
        ("list", rf"{RETURNED}\['model'\]=a list"),
        ("payload nan", rf"{SENT}\['more'\]=NaN in 6 of 6"),
        ("payload list", f"{SENT}=a list"),
        ("left out", r"server_broadcast in round 2 leaves out participants \[3\]"),
    ],
)
def test_what_the_server_makes_is_looked_at(made: str, said: str, tmp_path: Path) -> None:
    asked = dataclasses.replace(experiment(), algorithm=Diverges(made=made))
    with pytest.raises(RunFailed, match=said):
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


def test_the_users_own_interrupt_ends_the_run(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    mine = signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, mine))
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


def test_rounds_of_other_stages_may_send_something_else(tmp_path: Path) -> None:
    """Federated rounds are known before the run; afterwards everyone may, for example, go on alone."""

    @dataclasses.dataclass(frozen=True)
    class Alone(Wrong):
        def stage(self, round: int) -> str:
            return "finetune" if round == 3 else "federated"

        def client_update(self, payload: Any, state: Any, ctx: Any) -> Any:
            update, state = super().client_update(payload, state, ctx)
            return (update if ctx.round < 3 else dataclasses.replace(update, tree={"own": ONES})), state

        def server_aggregate(self, state: Any, updates: Any, ctx: Any) -> Any:
            return super().server_aggregate(state, updates, ctx) if ctx.round < 3 else state

    inline(dataclasses.replace(experiment(), algorithm=Alone()), tmp_path)
    assert len(fedsim.load(tmp_path).rounds) == 4


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
    with pytest.raises(ValueError, match=rf"{said}.*test_boundary\.py:\d+, in {at}\)$"):
        run_all([dataclasses.replace(experiment(), algorithm=Buggy(at=at))], out=tmp_path, make_runtime=InlineRuntime)


@dataclasses.dataclass(frozen=True)
class Combines(Wrong):
    """Sums that no mean can be taken of."""

    how: str = "negative"

    def combine(self, updates: Any) -> Any:
        whole = weighted_sum(updates)
        return {"negative": Partial(whole.tree, -1.0), "nan": Partial(whole.tree, math.nan), "dict": {}}[self.how]


@pytest.mark.parametrize("how", ["negative", "nan", "dict"])
def test_a_sum_that_no_mean_can_be_taken_of_ends_the_run(how: str, tmp_path: Path) -> None:
    (failure,) = run_all(
        [dataclasses.replace(experiment(), algorithm=Combines(how=how))], out=tmp_path, make_runtime=InlineRuntime
    )
    assert re.search(r"wrong\.combine returned .*: must be None, or a Partial of finite weight", failure.reason)


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
    held = {"a": {"b": torch.arange(4.0)}, "c": torch.zeros(0)}
    first, second = lent(held), lent(held)
    first["a"]["b"][1:].mul_(5)
    assert not untouched(first, held) and untouched(second, held)
    assert second["a"]["b"].numpy().tolist() == held["a"]["b"].tolist() == [0, 1, 2, 3]
    assert untouched(second, held), "reading through numpy"
