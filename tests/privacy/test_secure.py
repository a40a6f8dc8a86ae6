"""Secure sums around methods: the bits of the plain fixed-point sum, wherever it runs and whoever leaves."""

import dataclasses
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from baselines.fedavg import FedAvg
from baselines.local_only import LocalOnly
from fedsim.algorithm import Algorithm, ClientUpdate, Payload, State, weighted_mean
from fedsim.core.canonical import canonical, revived
from fedsim.core.tree import flat, nbytes, sha256
from fedsim.devices import Conditions, Device
from fedsim.engine.participant import Participant
from fedsim.experiment import Experiment
from fedsim.privacy.fixed_point import FixedPoint
from fedsim.privacy.pair import Pair
from fedsim.privacy.pairs import Around
from fedsim.privacy.secure import FixedPointSum, SecureSum, packed, unpacked, words_of
from fedsim.privacy.secure_sum import Keys, Sealed
from fedsim.results.tables import load
from fedsim.runtime.base import Runtime
from fedsim.simulation import RunFailed
from fedsim.sweeps.runner import run_all
from tests.support.disturbed import Disturbed, marks, small
from tests.support.inline_runs import Cut, Interrupted, inline
from tests.support.small_federation import SMALL, Federation, assert_same_bits, drawn_like


FEDAVG = FedAvg(lr=1e-2, epochs=1, batch_size=8)
FALSE_ALARM = 1e-6
HALF = SecureSum(threshold=0.5)


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> None:
    """Models this small only lose time to a second thread."""


def federation(*pairs: Pair, method: Algorithm = FEDAVG, participants: int = 5) -> Federation:
    return Federation(Around(method, pairs), forms=(SMALL,) * participants, sizes=(6, 12, 18, 6, 6)[:participants])


def after(pair: Pair, who: set[int] | None = None, rounds: int = 1) -> State:
    """The server's state after some rounds in which only some of five were heard of again."""
    held = federation(pair)
    for round in range(1, rounds + 1):
        held.server = held.algorithm.server_begin(held.server, held.clients, held.at_server(round))
        updates = [held.update(round, client) for client in range(5)]
        held.server = held.aggregate(round, [update for update in updates if who is None or update.client in who])
    return held.server


# in one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [HALF, SecureSum(degree=2), SecureSum(deployable=True)])
def test_the_bits_are_those_of_the_fixed_point_sum(pair: SecureSum, uncounted: None) -> None:
    assert_same_bits(after(pair, rounds=2), after(FixedPointSum(), rounds=2))


@pytest.mark.parametrize("who", [{0, 1, 2, 3}, {0, 2, 4, 3}, {1, 2, 4, 3}])
def test_whoever_leaves(who: set[int], uncounted: None) -> None:
    assert_same_bits(after(HALF, who), after(FixedPointSum(), who))
    assert sha256(after(HALF, who)) != sha256(after(HALF))


def test_a_sum_of_fixed_point_is_near_the_mean_and_not_the_same(uncounted: None) -> None:
    """Each number is off by half a step at most, so their mean is, too; float32 rounds on top."""
    held = federation(FixedPointSum(FixedPoint(clip=8.0, fraction=10, bits=32)))
    like = held.server
    trees = [drawn_like(like, seed) for seed in range(3)]
    updates = [ClientUpdate(client, tree, client + 1) for client, tree in enumerate(trees)]
    held.server = held.algorithm.server_begin(held.server, held.clients[:3], held.at_server(1))
    (pair,) = held.algorithm.pairs  # type: ignore[attr-defined]
    sent = [pair.client(update, like, {"clients": torch.arange(3)}, held.at_client(1, 0)) for update in updates]
    assert [update.weight for update in sent] == [1, 1, 1], "the weight is in the sum"
    mean = flat(weighted_mean(updates, like))
    found = flat(held.aggregate(1, sent))
    off = max(float((found[name] - mean[name]).abs().max()) for name in mean)
    assert 0 < off <= 2**-11 + 1e-6
    assert [update.metrics for update in sent] == [{"cut": 0.0}] * 3


def test_what_is_cut_off_is_counted() -> None:
    pair = FixedPointSum(FixedPoint(clip=1.0, fraction=8, bits=32))
    update = ClientUpdate(0, {"a": torch.tensor([0.5, -3.0, 2.0, 1.0])}, 2, {"other": 1.0})
    sent = pair.client(update, {}, {"clients": torch.arange(3)}, None)  # type: ignore[arg-type]
    assert sent.tree["numbers"]["a"].tolist() == [256, -512, 512, 512] and sent.tree["weight"].tolist() == [2]
    assert sent.metrics == {"other": 1.0, "cut": 0.5}, "beside what ParticipantDP clips"


@pytest.mark.parametrize(
    "update, said",
    [
        (ClientUpdate(0, {"a": torch.ones(2)}, 0.5), "weight of client 0=0.5"),
        (ClientUpdate(0, {"a": torch.ones(2, dtype=torch.int64)}, 1), "of floats"),
        (ClientUpdate(0, {"a": torch.tensor([float("nan")])}, 1), "finite"),
        (ClientUpdate(0, {"a": torch.ones(2)}, 50), r"numbers.bits=16: must be at least 17 for a sum of weight 150"),
    ],
)
def test_updates_that_do_not_add_up_are_refused(update: ClientUpdate, said: str) -> None:
    pair = FixedPointSum(FixedPoint(clip=1.0, fraction=8, bits=16))
    with pytest.raises(ValueError, match=said):
        pair.client(update, {}, {"clients": torch.arange(3)}, None)  # type: ignore[arg-type]


def test_an_update_under_masks_is_uniform_and_without_them_it_is_not(uncounted: None) -> None:
    for pair, uniform in ((HALF, True), (SecureSum(degree=2), True), (FixedPointSum(), False)):
        for update in federation(pair).run(1):
            counts = np.bincount(words_of(update.tree).view(np.uint8), minlength=256)
            assert (float(scipy.stats.chisquare(counts).pvalue) > FALSE_ALARM) == uniform
            assert update.weight == 1


def test_an_update_is_masked_even_if_nobody_had_been_asked_for_keys(uncounted: None) -> None:
    """As where a run is only being counted; else a server that leaves them out would see everything."""
    held, plain = federation(HALF), federation(FixedPointSum())
    words, bare = (words_of(each.update(1, 0).tree) for each in (held, plain))
    assert (words != bare).mean() > 0.99
    context = dataclasses.replace(held.at_server(1), ask=None)
    update = plain.update(1, 1)
    assert sha256(held.algorithm.server_aggregate(held.server, iter([update]), context)) == sha256(held.server)
    with pytest.raises(AssertionError, match="had not begun"):
        held.algorithm.server_aggregate(held.server, iter([update]), held.at_server(1))


def test_too_many_who_leave_are_refused_and_nobody_is_asked(uncounted: None) -> None:
    """Of five, each with four neighbours of whom three are needed: one may leave."""
    held = federation(HALF)
    held.server = held.algorithm.server_begin(held.server, held.clients, held.at_server(1))
    updates = [held.update(1, client) for client in range(3)]
    asked = []
    context = dataclasses.replace(held.at_server(1), ask=lambda questions: asked.append(questions) or {})
    with pytest.raises(ValueError, match="that stayed=2: must be at least threshold=3"):
        held.algorithm.server_aggregate(held.server, iter(updates), context)
    assert not asked


def test_one_who_does_not_answer_is_borne_and_two_are_not(uncounted: None) -> None:
    for silent in ({4}, {3, 4}):
        held = federation(HALF)
        held.server = held.algorithm.server_begin(held.server, held.clients, held.at_server(1))
        updates = [held.update(1, client) for client in range(5)]

        def ask(
            questions: Mapping[int, Payload], held: Federation = held, silent: set[int] = silent
        ) -> Mapping[int, State]:
            return held.ask(1, {client: each for client, each in questions.items() if client not in silent})

        context = dataclasses.replace(held.at_server(1), ask=ask)
        if len(silent) == 1:
            assert_same_bits(
                held.algorithm.server_aggregate(held.server, iter(updates), context), after(FixedPointSum())
            )
        else:
            with pytest.raises(ValueError, match="that stayed=2: must be at least threshold=3"):
                held.algorithm.server_aggregate(held.server, iter(updates), context)


def test_keys_are_of_the_seed_or_of_the_operating_system(uncounted: None) -> None:
    def keys(pair: Pair, round: int = 1) -> str:
        held = federation(pair)
        return sha256(held.algorithm.server_begin({}, held.clients, held.at_server(round)))

    assert keys(HALF) == keys(HALF) != keys(HALF, round=2)
    system = dataclasses.replace(HALF, deployable=True)
    assert keys(system) != keys(system)


def test_a_deployable_client_keeps_a_secret_and_draws_other_masks_in_every_session(uncounted: None) -> None:
    held = federation(SecureSum(deployable=True))
    first = held.run(1)[0]
    secret, before = flat(held.private[0]), sha256(held.private[0])
    assert [tuple(tensor.shape) for tensor in secret.values()] == [(32,)]
    held.server = held.algorithm.server_begin(held.server, held.clients, held.at_server(1))
    again = held.update(1, 0)
    assert (words_of(again.tree) != words_of(first.tree)).mean() > 0.99, "of the same round"
    assert sha256(held.private[0]) == before
    assert federation(HALF).run(1) and not federation(HALF).private


def test_nothing_of_a_sum_is_left_in_the_servers_state(uncounted: None) -> None:
    held = federation(HALF)
    begun = held.algorithm.server_begin(held.server, held.clients, held.at_server(1))
    assert begun.keys() != held.server.keys()
    names = held.server.keys()
    held.run(1)
    assert held.server.keys() == names


def test_messages_survive_as_tensors() -> None:
    keys = [Keys(3, b"a" * 32, b"b" * 32), Keys(1, os.urandom(32), os.urandom(32))]
    assert unpacked(Keys, packed(Keys, keys)) == keys
    assert nbytes(packed(Keys, keys)) == 2 * (8 + 64)
    assert unpacked(Sealed, packed(Sealed, [])) == []


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"degree": 3}, "pair.degree=3: must be even"),
        ({"degree": 0}, "pair.degree=0: must be at least 2"),
        ({"threshold": 0.4}, r"pair.threshold=0.4: must be at least 0.5"),
        ({"threshold": 1.1}, r"pair.threshold=1.1: must be at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SecureSum(**settings)


@dataclasses.dataclass(frozen=True)
class Reads(Pair):
    """Does nothing; its server's side looks at each update, or not."""

    each: bool = False  # type: ignore[assignment]


@pytest.mark.parametrize("pair", [HALF, FixedPointSum()])
def test_a_pair_that_hides_is_the_last_and_no_other_looks_at_each_update(pair: Pair) -> None:
    assert Around(FEDAVG, (Reads(), pair)).pairs == (Reads(), pair)
    for wrong in ((pair, Reads()), (Reads(each=True), pair), (pair, pair)):
        with pytest.raises(ValueError, match=r"algorithm.pairs=.*as the last"):
            Around(FEDAVG, wrong)
    assert Around(FEDAVG, (Reads(each=True), Reads())).combine([]) is None


@pytest.mark.parametrize("pair", [HALF, FixedPointSum()])
def test_methods_that_do_not_average_and_too_many_participants_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="a method that averages"):
        pair.check(LocalOnly(), 5)
    pair.check(FEDAVG, 5)
    few = dataclasses.replace(pair, numbers=FixedPoint(clip=1.0, fraction=12, bits=16))  # type: ignore[call-arg]
    few.check(FEDAVG, 7)
    with pytest.raises(ValueError, match=r"numbers.bits=16: must be at least 17 for a sum of weight 8"):
        few.check(FEDAVG, 8)


def test_a_sum_of_one_is_refused() -> None:
    held = federation(HALF)
    with pytest.raises(ValueError, match="participants of a secure sum=1: must be at least 2"):
        held.algorithm.server_begin(held.server, held.clients[:1], held.at_server(1))
    assert held.algorithm.server_begin(held.server, [], held.at_server(1)) == held.server


def test_it_is_written_down_and_read_again_as_an_equal_object() -> None:
    algorithm = Around(FEDAVG, (SecureSum(FixedPoint(2.0, 9, 16), degree=4, deployable=True),))
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    assert revived(json.loads(json.dumps(canonical(algorithm)))) == algorithm


# runs -----------------------------------------------------------------------------------------------------------------


def experiment(pair: Pair | None, dropout: float = 0.0, **changes: Any) -> Experiment:
    """Fed-Grow with six participants for three rounds."""
    found = dataclasses.replace(small(), conditions=Conditions(dropout=dropout), **changes)
    return found if pair is None else dataclasses.replace(found, algorithm=Around(found.algorithm, (pair,)))


def hashes(out: Path) -> list[str]:
    return load(out).rounds.sort_values("round").state_sha256.tolist()


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the plain fixed-point sum."""
    out = tmp_path_factory.mktemp("fixed")
    inline(experiment(FixedPointSum()), out)
    return out


def test_a_run_has_the_bits_of_the_fixed_point_sum_and_counts_its_bytes(fixed: Path, tmp_path: Path) -> None:
    inline(experiment(HALF), tmp_path)
    assert hashes(tmp_path) == hashes(fixed)
    assert len({*hashes(fixed)}) == 4
    one, other = (load(out).rounds.set_index("round") for out in (fixed, tmp_path))
    assert one.accuracy_mean.tolist() == other.accuracy_mean.tolist()
    # Up: keys; a text for each of five (two shares of 33 bytes, a tag of 16, two names); five shares (three names).
    keys, shared, lifted = 8 + 64, 5 * (16 + 66 + 16), 5 * (24 + 33)
    more = other.bytes_up - one.bytes_up
    assert more.tolist() == [0] + [6 * (keys + shared + lifted)] * 3
    # Down: the session, four times; keys of five, twice, and of all, who have all shared, instead of their names;
    # five texts; five that stayed.
    down = 4 * 32 + 2 * 5 * keys + 6 * keys + shared + 5 * 8
    assert (other.bytes_down - one.bytes_down).tolist() == [0] + [6 * down] * 3
    for rounds in (one, other):
        assert (rounds.bytes_up == rounds.seam_bytes_up).all() and (rounds.bytes_down == rounds.seam_bytes_down).all()


def test_who_drops_out_is_left_out_of_both_sums_alike(tmp_path: Path) -> None:
    """By the seed two of six drop out in round 1, and one in round 3; three of five neighbours are needed."""
    found = []
    for name, pair in (("fixed", FixedPointSum()), ("secure", HALF)):
        inline(experiment(pair, dropout=0.15, seed=4), tmp_path / name)
        rounds = load(tmp_path / name).rounds.set_index("round")
        assert rounds.dropped_out.tolist() == [0, 2, 0, 1]
        found.append(hashes(tmp_path / name))
    assert found[0] == found[1]


def test_a_run_of_which_too_many_drop_out_ends_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, set[str]]] = []
    answer = Participant.answer

    def noted(self: Participant, round: int, question: Mapping[str, Any]) -> Any:
        asked.append((round, {path.split("::")[-1] for path in flat(question)}))
        return answer(self, round, question)

    monkeypatch.setattr(Participant, "answer", noted)
    with pytest.raises(RunFailed, match=r"that stayed=2: must be at least threshold=3"):
        inline(experiment(HALF, dropout=0.25, seed=3), tmp_path)
    last = [names for round, names in asked if round == 2]
    assert len(last) == 12 and not any("stayed" in names for names in last), "keys and shares, of six"
    assert any("stayed" in names for round, names in asked if round == 1)


def test_one_who_raises_when_it_is_asked_is_borne(fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its keys: it takes no part. For what lifts masks: its update is in the sum."""
    one, other = tmp_path / "no keys", tmp_path / "no update"
    for out, pair, at in ((one, HALF, "client_answer"), (other, FixedPointSum(), "client_update")):
        method = Disturbed(experiment(pair).algorithm, "raise", str(tmp_path), at=at)
        inline(experiment(None, algorithm=method, on_error="drop"), out)
    assert hashes(one) == hashes(other) != hashes(fixed)
    answer = Participant.answer

    def muted(self: Participant, round: int, question: Mapping[str, Any]) -> Any:
        if self.member.info.id == 1 and any("stayed" in path for path in flat(question)):
            raise ConnectionError("gone")
        return answer(self, round, question)

    monkeypatch.setattr(Participant, "answer", muted)
    inline(experiment(HALF, on_error="drop"), tmp_path / "muted")
    assert hashes(tmp_path / "muted") == hashes(fixed)
    clients = load(tmp_path / "muted").clients
    assert {*clients[clients.error.notna()].client} == {1}


def test_late_updates_are_left_out_of_both_sums_alike(tmp_path: Path) -> None:
    """Masks are lifted of a client whose own mask is never: its vector came, and was not added."""
    slow, fast = Device(1e6, 4096, 8, 4), Device(1e12, 4096, 800, 400)
    found = []
    for name, pair in (("fixed", FixedPointSum()), ("secure", HALF)):
        base = experiment(pair)
        tiers = tuple(dataclasses.replace(t, device=d) for t, d in zip(base.tiers, (fast, fast, slow), strict=True))
        timed = dataclasses.replace(base, tiers=tiers, conditions=Conditions(deadline=1.0))
        inline(timed, tmp_path / name)
        found.append(load(tmp_path / name).rounds.sort_values("round"))
    assert found[0].late.tolist() == found[1].late.tolist() and found[1].late.max() in (1, 2)
    assert found[0].state_sha256.tolist() == found[1].state_sha256.tolist()


def test_a_run_that_is_cut_goes_on_with_the_same_bits(fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        inline(experiment(HALF), tmp_path, progress=Cut(after=1))
    inline(experiment(HALF), tmp_path)
    assert hashes(tmp_path) == hashes(fixed)


@pytest.mark.ray
@pytest.mark.parametrize(
    "event, at", [("none", ""), ("die", "client_answer"), ("die", "client_update"), ("die_server", "")]
)
def test_the_same_bits_on_ray_whatever_is_killed(
    two_hosts: Callable[[], Runtime], fixed: Path, tmp_path: Path, event: str, at: str
) -> None:
    method = Disturbed(experiment(HALF).algorithm, event, str(tmp_path), at=at)
    run = experiment(None, algorithm=method)
    assert run_all([run], out=tmp_path / "out", make_runtime=two_hosts) == []
    assert marks(tmp_path)[0].exists() == (event != "none")
    assert hashes(tmp_path / "out") == hashes(fixed)


def test_cohorts_by_coins_are_refused_before_anything_starts(tiny_experiment: Experiment) -> None:
    """A round of one has no mask; that it failed would say so."""
    by_coins = dataclasses.replace(tiny_experiment, sampling="poisson", cohort=2)
    with pytest.raises(ValueError, match=r"sampling='poisson': must be 'fixed' with SecureSum"):
        dataclasses.replace(by_coins, algorithm=Around(FEDAVG, (SecureSum(),)))
    dataclasses.replace(by_coins, algorithm=Around(FEDAVG, (FixedPointSum(),)))
