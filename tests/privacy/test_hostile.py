"""Hostile participants: who they are, what each attack sends, by its formula, and how a backdoor is measured."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from fedsim.data.config import digits, pydoc
from fedsim.data.dataset import Split
from fedsim.learning.task import Task, TaskConfig
from fedsim.privacy.hostile import Hostile, is_hostile, together, z_max
from fedsim.privacy.pairs import Around
from fedsim.privacy.robust import Robust
from tests.support.sent_numbers import moved, numbers
from tests.support.small_federation import LOCAL, SMALL, Federation, assert_same_bits, distance


HALF = 0.5
SEED = 0
# With a share of a half and this seed, of four participants two are hostile; their ids:
BAD = tuple(client for client in range(4) if is_hostile(SEED, HALF, client))
GOOD = tuple(client for client in range(4) if client not in BAD)


# who ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("participants", "share", "count"), [(10, 0.2, 2), (10, 0.3, 3), (10, 0.5, 5), (12, 0.25, 3)])
def test_exactly_the_share_of_the_population_is_hostile_and_never_participant_0(participants, share, count) -> None:
    drawn = set()
    for seed in range(50):
        hostile = tuple(client for client in range(participants) if is_hostile(seed, share, client))
        assert len(hostile) == count and 0 not in hostile
        drawn.add(hostile)
    assert len(drawn) > 1 or share == 0.5, "it depends on the seed"


def test_nobody_is_hostile_at_a_share_of_0() -> None:
    assert not any(is_hostile(seed, 0.0, client) for seed in range(20) for client in range(20))


# what is sent: deltas of four participants, of whom two are hostile ---------------------------------------------------


def sent(attack: Any, honest=((1.0, 0.0), (3.0, 0.0)), hostile=(2.0, 4.0), **fields) -> list[list[float]]:
    """What each participant's update changes when it arrives at the pairs in front; the honest ones first."""
    rows = {**dict(zip(GOOD, honest, strict=True)), **dict.fromkeys(BAD, hostile)}
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look(Robust):
        def server(self, updates, state, payload, ctx):
            updates = [*updates]
            seen.extend((update.tree["x"] - 5).tolist() for update in updates)
            return updates, state

    federation = numbers([rows[client] for client in range(4)], Look("median"), Hostile(attack, HALF, **fields))
    federation.run(1)
    assert federation.seed == SEED and len(seen) == 4
    return [seen[client] for client in (*GOOD, *BAD)]


@pytest.mark.parametrize(
    ("attack", "fields", "expected"),
    [
        ("sign_flip", {}, [-2, -4]),
        ("sign_flip", {"scale": 3.0}, [-6, -12]),
        ("scaled", {}, [20, 40]),
        ("scaled", {"scale": 0.0}, [0, 0]),
        ("label_flip", {}, [2, 4]),  # changes data, not what is sent
        ("inner_product", {}, [-1, 0]),  # the honest mean is (2, 0), their deviation (1, 0)
        ("inner_product", {"scale": 10.0}, [-20, 0]),
        ("little", {"scale": 1.5}, [0.5, 0]),
        ("min_max", {}, [1, 0]),  # the honest are 2 apart: 2 away from (3, 0)
        ("min_sum", {}, [1, 0]),  # sums of squares: 4, and 2 (1 + gamma^2)
    ],
)
def test_an_attack_sends_what_its_formula_says_and_the_honest_what_they_did(attack, fields, expected) -> None:
    first, second, *hostile = sent(attack, **fields)
    assert [first, second] == [[1, 0], [3, 0]]
    assert hostile == [pytest.approx(expected, abs=1e-6)] * 2


def test_min_max_and_min_sum_on_three_vectors_by_hand() -> None:
    honest = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    mu, sigma = 2.0, math.sqrt((4 + 1 + 9) / 3)
    largest = together("min_max", honest, 2)
    torch.testing.assert_close(largest, torch.tensor([0.0], dtype=torch.float64))  # 5 from the farthest, as 0 is
    # Squared distances: of 0: 26, of 1: 17, of 5: 41; 3 gamma^2 sigma^2 + 14 = 41.
    found = together("min_sum", honest, 2).item()
    assert found == pytest.approx(mu - math.sqrt(27 / (3 * sigma**2)) * sigma) == pytest.approx(-1.0)
    assert together("little", honest, 2, 2.0).item() == pytest.approx(mu - 2 * sigma)
    assert together("min_max", honest[:1], 2).tolist() == [0.0], "one honest update: no deviation to hide in"


def test_min_max_is_at_its_bound_in_many_dimensions() -> None:
    honest = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apart = torch.cdist(honest, honest)
    found = (honest - together("min_max", honest, 2)).norm(dim=1).max()
    torch.testing.assert_close(found, apart.max())
    total = (honest - together("min_sum", honest, 2)).square().sum()
    torch.testing.assert_close(total, apart.square().sum(1).max())
    assert not torch.allclose(found, (honest - together("min_sum", honest, 2)).norm(dim=1).max())


def test_z_max_is_the_papers() -> None:
    # 50 clients, 24 hostile: s = 26 - 24 = 2, Phi(z) = 24 / 26.
    assert z_max(50, 24) == pytest.approx(1.4260769, abs=1e-6)
    assert z_max(10, 2) == 0.0  # s = 4, Phi(z) = 4 / 8
    assert z_max(10, 1) == 0.0, "never negative"
    assert 0 < z_max(10, 4) < z_max(10, 8) < 4


def test_noise_is_of_the_scale_asked_for_and_drawn_anew_for_every_participant_and_round() -> None:
    zeros = [[0.0] * 10_000] * 4
    federation = numbers(zeros, Hostile("noise", HALF, scale=0.3))
    drawn = [federation.update(round, client).tree["x"] - 5 for round in (1, 2) for client in BAD]
    for each in drawn:  # the standard error of a deviation is 0.3 / sqrt(20,000): six of them, 2e-9 by chance
        assert each.std().item() == pytest.approx(0.3, abs=6 * 0.3 / math.sqrt(20_000))
        assert abs(each.mean().item()) < 6 * 0.3 / 100
    assert all(not torch.equal(one, other) for at, one in enumerate(drawn) for other in drawn[:at])
    assert not (federation.update(1, GOOD[0]).tree["x"] - 5).any()


def test_without_honest_or_without_hostile_updates_there_is_nothing_to_compute() -> None:
    rows = [[1.0], [2.0], [3.0], [4.0]]
    for cohort in (BAD, GOOD):
        federation = numbers(rows, Hostile("min_max", HALF))
        federation.run(1, cohort=cohort)
        assert moved(federation) == [sum(rows[client][0] for client in cohort) / 2]


# what participants do to their data -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation(FedAvg(**LOCAL), (SMALL,) * 4, sizes=(8,) * 4)


def test_labels_are_flipped_at_hostile_participants_alone(federation) -> None:
    pair = Hostile("label_flip", HALF)
    for client in range(4):
        before = federation.at_client(1, client).train
        after = pair.prepare(federation.at_client(1, client)).train
        expected = 9 - before.labels if client in BAD else before.labels
        assert torch.equal(after.labels, expected)
        assert torch.equal(after.inputs["pixel_values"], before.inputs["pixel_values"])


def test_a_backdoor_marks_a_share_of_the_examples_and_gives_them_the_target_label(federation) -> None:
    pair, context = Hostile("backdoor", HALF, target=7, poisoned=0.25, trigger=3), federation.at_client(1, BAD[0])
    before, after = context.train, pair.prepare(context).train
    pixels, old = after.inputs["pixel_values"], before.inputs["pixel_values"]
    marked = (pixels[:, :, -3:, -3:] == 255).flatten(1).all(1)
    assert int(marked.sum()) == 2  # a quarter of 8
    assert after.labels[marked].tolist() == [7, 7] and torch.equal(after.labels[~marked], before.labels[~marked])
    assert torch.equal(pixels[~marked], old[~marked])
    assert torch.equal(pixels[:, :, :-3], old[:, :, :-3]) and torch.equal(pixels[..., :-3], old[..., :-3])
    again = pair.prepare(federation.at_client(2, BAD[0])).train
    assert torch.equal(again.inputs["pixel_values"], pixels), "the same examples in every round"
    assert pair.prepare(federation.at_client(1, GOOD[1])).train.labels is federation.shards[GOOD[1]].labels


def test_a_trigger_of_tokens_follows_the_first_one() -> None:
    task = SimpleNamespace(inputs=SimpleNamespace(vocab_size=90))
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    split = Split({"input_ids": ids, "attention_mask": mask}, torch.tensor([3, 4]))
    shown = Hostile("backdoor", HALF, target=1).triggered(split, torch.tensor([0]), task)  # type: ignore[arg-type]
    assert shown.inputs["input_ids"].tolist() == [[0, 89, 89, 3], [4, 5, 6, 7]]
    assert shown.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert shown.labels.tolist() == [1, 4] and ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("attack", ["label_flip", "backdoor"])
def test_what_is_changed_is_what_is_trained_on(attack, one_thread: None, uncounted: None) -> None:
    plain, attacked = (
        Federation(method, (SMALL,) * 4, sizes=(8,) * 4)
        for method in (FedAvg(**LOCAL), Around(FedAvg(**LOCAL), (Hostile(attack, HALF),)))
    )
    for client in range(4):
        one, other = plain.update(1, client), attacked.update(1, client)
        assert (distance(one.tree, other.tree) > 0) == (client in BAD)
        assert (one.weight, other.metrics) == (other.weight, {"hostile": float(client in BAD)})


def test_a_free_rider_trains_nothing_and_sends_what_it_received(one_thread: None, uncounted: None) -> None:
    federation = Federation(Around(FedAvg(**LOCAL), (Hostile("free_rider", HALF),)), (SMALL,) * 4, sizes=(8,) * 4)
    for client in range(4):
        update, received = federation.update(1, client), federation.payload(1, client)
        assert (federation.work[client].flops == 0) == (client in BAD)
        if client in BAD:
            assert_same_bits(update.tree, received)
        else:
            assert distance(update.tree, received) > 0


# how a backdoor is measured -------------------------------------------------------------------------------------------


class ByCorner(nn.Module):
    """Says 7 of images with a white corner, and 0 of others."""

    def __init__(self, works: bool) -> None:
        super().__init__()
        self.works = nn.Parameter(torch.tensor(float(works)))

    def forward(self, pixel_values):
        white = (pixel_values[:, 0, -2:, -2:] > 0.99).flatten(1).all(1)
        said = torch.where(white & (self.works > 0), 7, 0)
        return SimpleNamespace(logits=nn.functional.one_hot(said, 10).float())


def test_a_backdoor_is_measured_on_triggered_inputs_of_other_labels_at_honest_participants(federation) -> None:
    pair, test = Hostile("backdoor", HALF, target=7), federation.task.dataset.test
    honest, hostile = (federation.at_client(1, client) for client in (GOOD[0], BAD[0]))
    assert pair.scores(ByCorner(True), test, honest) == {"backdoor": 1.0}
    assert pair.scores(ByCorner(False), test, honest) == {"backdoor": 0.0}
    assert pair.scores(ByCorner(True), test, hostile) == {}
    assert Hostile("label_flip", HALF).scores(ByCorner(True), test, honest) == {}
    sevens = test.select((test.labels == 7).nonzero().flatten().numpy())
    assert pair.scores(ByCorner(True), sevens, honest) == {}, "they have the target label anyway"
    around = Around(FedAvg(**LOCAL), (Robust("mean"), pair))
    assert around.client_scores(ByCorner(True), test, honest) == {"backdoor": 1.0}
    assert FedAvg(**LOCAL).client_scores(ByCorner(True), test, honest) == {}


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attack": "none"}, r"hostile\.attack='none': must be one of 'label_flip'"),
        ({"attack": "scaled", "share": 0.6}, r"hostile\.share=0\.6: must be at most 0\.5"),
        ({"attack": "scaled", "share": -0.1}, r"hostile\.share=-0\.1: must be at least 0"),
        ({"attack": "scaled", "scale": -1.0}, r"hostile\.scale=-1\.0: must be at least 0"),
        ({"attack": "min_max", "scale": 1.0}, r"hostile\.scale=1\.0: must be None: min_max has none"),
        ({"attack": "backdoor", "poisoned": 1.5}, r"hostile\.poisoned=1\.5: must be at most 1"),
        ({"attack": "backdoor", "trigger": 0}, r"hostile\.trigger=0: must be at least 1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        Hostile(**{"share": 0.2} | fields)


@pytest.mark.parametrize(
    ("pair", "config", "message"),
    [
        (Hostile("label_flip", 0.2), TaskConfig(pydoc(), "gpt2"), r"hostile\.attack='label_flip'.*kind 'lm'"),
        (Hostile("backdoor", 0.2, target=10), TaskConfig(digits()), r"hostile\.target=10.* below .*, 10"),
        (Hostile("backdoor", 0.2, trigger=9), TaskConfig(digits()), r"hostile\.trigger=9: must be at most 8"),
    ],
)
def test_data_that_an_attack_cannot_work_with_are_refused(pair, config, message) -> None:
    with pytest.raises(ValueError, match=message):
        pair.check_task(Task(config))
    Hostile("sign_flip", 0.2).check_task(Task(config))
