"""Methods that cut or grow a model in depth: DepthFL, ProgFed, and growth once."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import fedsim.learning.exits
from baselines.depthfl import COVERED, DepthFL
from baselines.fedavg import FedAvg, fedavg_small
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.progfed import ProgFed
from fedsim.algorithm import ClientUpdate
from fedsim.core.tree import PATH, State, Tree, flat, mapped, nbytes, sha256
from fedsim.learning.exits import shallower, tail, up_to
from fedsim.learning.rates import parameter_count
from fedsim.models import Form
from tests.support.clients import asked_of
from tests.support.small_federation import (
    ALIKE,
    LOCAL,
    MIDDLE,
    SMALL,
    TARGET,
    UNLIKE,
    Federation,
    assert_close,
    assert_same_bits,
    distance,
    mean,
    weights_of,
)


# DepthFL --------------------------------------------------------------------------------------------------------------


def depthfl(**changes: Any) -> DepthFL:
    fields: dict[str, Any] = LOCAL | {"ramp": 1} | changes
    return DepthFL(**fields)


def model_in(state: State) -> Tree:
    """Body and exits, by their names in a flat state."""
    return flat({name: part for name, part in state.items() if name != COVERED}, ".")


def said(monkeypatch: pytest.MonkeyPatch, *probabilities: list[float]) -> list[Tensor]:
    """Let the exits of a model say these, whatever it is asked."""
    logits = [torch.tensor([each]).log().requires_grad_() for each in probabilities]
    monkeypatch.setattr(fedsim.learning.exits, "exit_logits", lambda *arguments: logits)
    return logits


LABEL = {"labels": torch.tensor([0])}


def loss_of(federation: Federation, round: int) -> Tensor:
    """The loss of the client with all exits, on an example of class 0, whatever its parameters."""
    asked = asked_of(federation.algorithm, federation.payload(round, 2), {}, federation.at_client(round, 2))
    (objective,) = asked.objectives
    return objective({"exit": {str(depth): {} for depth in objective.depths}}, asked.frozen, LABEL)  # type: ignore[attr-defined]


def test_the_loss_of_two_exits_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CE -ln 3/4 - ln 1/2; each exit is held against the other: KL(q || p) = ln(4/3) / 2 where p = (3/4, 1/4)."""
    cross_entropy = -math.log(3 / 4) - math.log(1 / 2)
    divergence = math.log(4 / 3) / 2 + (3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2))
    for strength in (0.0, 1.0, 0.5):
        federation = Federation(depthfl(exits=2, distillation=strength), UNLIKE)
        said(monkeypatch, [3 / 4, 1 / 4], [1 / 2, 1 / 2])
        loss = loss_of(federation, 1)
        assert float(loss.detach()) == pytest.approx(cross_entropy + strength * divergence, rel=1e-6)


def test_three_exits_are_held_against_the_mean_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(depthfl(exits=3), UNLIKE)
    p, q, r = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]
    said(monkeypatch, p, q, r)

    def divergence(teacher: list[float], student: list[float]) -> float:
        return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))

    pairs = [(p, q), (p, r), (q, p), (q, r), (r, p), (r, q)]
    expected = -math.log(0.5 * 0.25 * 0.125) + sum(divergence(*pair) for pair in pairs) / 2
    loss = loss_of(federation, 1)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_exits_that_teach_are_held_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """d/dz_i of CE is p_i - 1_y; of KL(p_j || p_i), with p_j fixed, p_i - p_j."""
    federation = Federation(depthfl(exits=2, distillation=0.5), UNLIKE)
    p, q = torch.tensor([[3 / 4, 1 / 4]]), torch.tensor([[1 / 2, 1 / 2]])
    logits = said(monkeypatch, p[0].tolist(), q[0].tolist())
    loss_of(federation, 1).backward()
    first = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(logits[0].grad, p - first + 0.5 * (p - q))
    torch.testing.assert_close(logits[1].grad, q - first + 0.5 * (q - p))


def test_distillation_comes_in_over_the_first_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-5 (1 - t)^2): e^-5 before the first of 4 rounds, e^-(5/4) after 2, 1 from the fourth on."""
    federation = Federation(depthfl(exits=2, ramp=4), UNLIKE)
    losses = {}
    for round in (0, 2, 4, 9):
        said(monkeypatch, [3 / 4, 1 / 4], [1 / 2, 1 / 2])
        losses[round] = float(loss_of(federation, round).detach()) + math.log(3 / 4) + math.log(1 / 2)
    assert losses[9] == losses[4]
    assert losses[2] / losses[4] == pytest.approx(math.exp(-5 / 4), rel=1e-4)
    assert losses[0] / losses[4] == pytest.approx(math.exp(-5), rel=1e-3)


def test_everyone_has_the_exits_its_device_can_hold() -> None:
    """One block of the target's width is larger than the smallest device's own model: it trains one all the same."""
    federation = Federation(depthfl(), UNLIKE)
    task = federation.task
    assert parameter_count(task, SMALL) < parameter_count(task, shallower(TARGET, 1))
    held = [federation.algorithm._depths(task, form, TARGET) for form in UNLIKE]  # type: ignore[attr-defined]
    assert held == [(1,), (1, 2), (1, 2, 3, 4)]
    for client, depths in enumerate(held):
        end = {f"exit.{depth}.{name}" for depth in depths for name in tail(task, TARGET)}
        expected = up_to(task, TARGET, depths[-1]) | end
        for state in (federation.payload(1, client), federation.update(1, client).tree):
            assert {*flat(state, ".")} == expected
    sizes = [nbytes(federation.payload(1, client)) for client in range(3)]
    assert sizes == sorted({*sizes})


def test_a_mean_over_owners_on_paper() -> None:
    """The small one sends 2s and counts 6, the large one sends 6s and counts 18: (12 + 108) / 24 = 5, else 6."""
    federation = Federation(depthfl(), UNLIKE)
    small, large = (
        mapped(functools.partial(torch.full_like, fill_value=x), federation.payload(1, k))
        for k, x in ((0, 2.0), (2, 6.0))
    )
    after = model_in(federation.aggregate(1, [ClientUpdate(0, small, 6), ClientUpdate(2, large, 18)]))
    for name, tensor in after.items():
        assert torch.equal(tensor, torch.full_like(tensor, 5.0 if name in model_in(small) else 6.0)), name
    before = model_in(federation.server)
    after, sent = model_in(federation.aggregate(1, [ClientUpdate(0, small, 6)])), model_in(small)
    assert_same_bits({n: after[n] for n in sent}, sent)
    others = [n for n in before if n not in sent]
    assert others and all(torch.equal(after[n], before[n]) for n in others), "what nobody has stays"


def test_which_parts_were_ever_trained() -> None:
    federation = Federation(depthfl(), UNLIKE)
    algorithm, first = federation.algorithm, {*model_in(federation.payload(1, 0))}
    for cohort, expected in (([], set()), ([0], first), ([0], first), ([2], {*model_in(federation.server)})):
        federation.run(1, cohort)
        covered = algorithm.server_covered(federation.server)
        assert covered is not None
        masks = {name.replace(PATH, "."): mask for name, mask in covered.items()}
        assert {name: mask.shape for name, mask in masks.items()} == {
            name: tensor.shape for name, tensor in model_in(federation.server).items()
        }
        assert {name for name, mask in masks.items() if mask.all()} == expected
        assert {name for name, mask in masks.items() if mask.any()} == expected


def test_a_round_is_the_mean_over_owners_of_what_was_sent() -> None:
    federation = Federation(depthfl(), UNLIKE)
    before = model_in(federation.server)
    updates = federation.run(1)
    for name, tensor in model_in(federation.server).items():
        owners = [update for update in updates if name in model_in(update.tree)]
        expected = mean([{name: model_in(u.tree)[name]} for u in owners], [u.weight for u in owners])
        assert_close({name: tensor}, expected, atol=1e-7)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model_in(federation.server).items())


def test_one_exit_and_nobody_to_learn_from_is_fedavg() -> None:
    """Unclipped: a norm over tensors in another order is another number."""
    depth, plain = Federation(depthfl(exits=1, clip=None)), Federation(FedAvg(**LOCAL, clip=None))
    for round in (1, 2):
        depth.run(round)
        plain.run(round)
    found = {n: part for n, part in depth.server.items() if n not in ("exit", COVERED)} | depth.server["exit"]["4"]
    assert_same_bits(found, plain.server)
    assert_same_bits(weights_of(depth.served(2)), weights_of(plain.served(2)))


def test_what_is_deployed_is_the_deepest_exit_alone() -> None:
    federation = Federation(depthfl(), UNLIKE)
    federation.run(1)
    for client, depth in enumerate((1, 2, 4)):
        model = federation.deployed(1, client)
        body = {n: federation.server[n] for n in up_to(federation.task, TARGET, depth)}
        assert_same_bits(weights_of(model), body | federation.server["exit"][str(depth)])
    assert_same_bits(weights_of(federation.served(1)), weights_of(federation.deployed(1, 2)))


def test_exits_that_learn_from_each_other_learn_something_else() -> None:
    trees = []
    for strength in (0.0, 1.0):
        federation = Federation(depthfl(distillation=strength), UNLIKE)
        trees.append([federation.update(1, client).tree for client in (0, 2)])
    assert_same_bits(trees[0][0], trees[1][0])  # one exit has nobody to learn from
    assert sha256(trees[0][1]) != sha256(trees[1][1])


# ProgFed --------------------------------------------------------------------------------------------------------------


def progfed(**changes: Any) -> ProgFed:
    fields: dict[str, Any] = LOCAL | {"stages": 4, "stage_rounds": 2} | changes
    return ProgFed(**fields)


def depth_of(federation: Federation, tree: Mapping[str, Tensor]) -> int:
    return len({federation.task.specs(TARGET)[name].layer for name in tree} - {None})


def test_a_stage_lasts_its_rounds_and_the_last_one_for_ever() -> None:
    federation = Federation(progfed())
    depths = [depth_of(federation, federation.server)]
    for round in range(1, 11):
        sent = federation.payload(round, 0)
        federation.run(round, cohort=[0])
        served = weights_of(federation.served(round))
        assert_same_bits(served, federation.server)
        assert {*sent} == {*federation.server} == {*weights_of(federation.deployed(round, 1))}
        depths.append(depth_of(federation, sent))
    assert depths == [1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("warmup", [0, 2])
def test_one_stage_is_fedavg_bit_by_bit(warmup: int) -> None:
    one, plain = Federation(progfed(stages=1, warmup=warmup)), Federation(FedAvg(**LOCAL))
    assert_same_bits(one.server, plain.server)
    for round in (1, 2, 3):
        one.run(round)
        plain.run(round)
    assert_same_bits(one.server, plain.server)


def test_when_a_stage_begins_old_blocks_stay_and_the_head_is_a_fresh_one() -> None:
    federation = Federation(progfed(stages=2, stage_rounds=1))
    end, start = {*tail(federation.task, TARGET)}, federation.server
    federation.run(1)
    before, sent = federation.server, federation.payload(2, 0)
    old = {name for name in before if name not in end}
    assert old and {*sent} - old - end == {n for n in sent if federation.task.specs(TARGET)[n].layer in (2, 3)}
    assert_same_bits({n: sent[n] for n in old}, {n: before[n] for n in old})
    assert distance({n: sent[n] for n in old}, {n: start[n] for n in old}) > 1e-3, "they had been trained"
    drawn = [name for name in end if name == "classifier.weight"]  # the others start as ones and zeros
    assert drawn
    for name in drawn:
        assert not torch.equal(sent[name], before[name]) and not torch.equal(sent[name], start[name])
    as_initialised = Federation(FedAvg(**LOCAL)).server  # the target from the same seed
    assert_same_bits(
        {n: sent[n] for n in sent if n not in old | end}, {n: as_initialised[n] for n in sent if n not in old | end}
    )
    assert not torch.equal(sent["vit.layernorm.bias"], before["vit.layernorm.bias"])
    assert torch.equal(sent["vit.layernorm.bias"], torch.zeros(16))


def test_a_stage_begins_once() -> None:
    """Scores are taken of what the round left, in the first round of a stage as well."""
    federation = Federation(progfed(stages=2, stage_rounds=1))
    federation.run(1)
    federation.run(2)
    assert_same_bits(federation.payload(2, 0), federation.server)
    assert_same_bits(federation.payload(3, 0), federation.server)
    assert_same_bits(weights_of(federation.deployed(2, 1)), federation.server)


def test_a_stage_begins_even_if_nobody_arrives() -> None:
    federation = Federation(progfed(stages=2, stage_rounds=1))
    federation.run(1)
    expected = federation.payload(2, 0)
    federation.run(2, cohort=[])
    assert_same_bits(federation.server, expected)


def test_a_warm_up_trains_what_is_new_and_nothing_else() -> None:
    federation = Federation(progfed(stages=2, stage_rounds=2, warmup=1))
    task = federation.task
    for round in (1, 2):
        assert {*federation.run(round)[0].tree} == {*federation.server}, "the first stage has no warm-up"
    before = federation.payload(3, 0)
    new = {*tail(task, TARGET)} | {name for name, spec in task.specs(TARGET).items() if spec.layer in (2, 3)}
    updates = federation.run(3)
    assert all({*update.tree} == new for update in updates)
    moved = {name for name in before if not torch.equal(federation.server[name], before[name])}
    assert moved == new
    assert_close({n: federation.server[n] for n in new}, mean([u.tree for u in updates], [6, 12, 18]), atol=1e-7)
    assert {*federation.run(4)[0].tree} == {*task.specs(TARGET)}, "then everything"


def test_stages_without_warm_up_train_everything_at_once() -> None:
    federation = Federation(progfed(stages=2, stage_rounds=1))
    federation.run(1)
    assert {*federation.run(2)[0].tree} == {*federation.task.specs(TARGET)}


@pytest.mark.parametrize(
    "fields, named", [({"warmup": 3, "stage_rounds": 2}, "algorithm.warmup=3"), ({"stages": 0}, "algorithm.stages=0")]
)
def test_progfed_refuses_what_cannot_be(fields: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        progfed(**fields)


# growing once ---------------------------------------------------------------------------------------------------------


def growing(**changes: Any) -> GrowThenFedAvg:
    fields: dict[str, Any] = LOCAL | {"small_rounds": 2} | changes
    return GrowThenFedAvg(**fields)


def test_before_the_growth_it_is_fedavg_of_the_smallest_form() -> None:
    federation, small = Federation(growing(), UNLIKE), Federation(fedavg_small(**LOCAL), UNLIKE)
    for round in (1, 2):
        assert_same_bits(federation.payload(round, 0), small.payload(round, 0))
        federation.run(round)
        small.run(round)
        assert_same_bits(federation.server, small.server)
        assert_same_bits(weights_of(federation.deployed(round, 2)), weights_of(small.served(round)))


def test_after_it_it_is_fedavg_of_the_target() -> None:
    federation, plain = Federation(growing(), UNLIKE), Federation(FedAvg(**LOCAL), UNLIKE)
    for round in (1, 2):
        federation.run(round)
    plain.server = federation.payload(3, 0)
    assert {n: t.shape for n, t in plain.server.items()} == {
        n: t.shape for n, t in federation.task.fresh(TARGET, 0).items()
    }
    for round in (3, 4):
        assert_same_bits(federation.payload(round, 2), plain.payload(round, 2))
        federation.run(round)
        plain.run(round)
    assert_same_bits(federation.server, plain.server)
    assert_same_bits(weights_of(federation.served(4)), plain.server)


@pytest.mark.parametrize("preset, exact", [("preserving", True), ("net2net", False), ("paper", False)])
def test_an_exact_preset_gives_what_the_small_model_computed(preset: str, exact: bool) -> None:
    federation = Federation(growing(preset=preset))
    for round in (1, 2):
        federation.run(round)
    batch = {"pixel_values": federation.pixels}
    small = federation.task.forward(SMALL, federation.server, batch)
    large = federation.task.forward(TARGET, federation.payload(3, 0), batch)
    assert (float((large - small).abs().max()) < 1e-4) == exact
    assert small.std() > 0.05


def test_it_grows_once() -> None:
    federation = Federation(growing(small_rounds=1))
    federation.run(1)
    grown = federation.payload(2, 0)
    assert_same_bits(federation.payload(2, 2), grown)
    federation.run(2, cohort=[1])
    after = federation.server
    assert distance(after, grown) > 1e-3
    for round in (2, 3):
        assert_same_bits(federation.payload(round, 0), after)
        assert_same_bits(weights_of(federation.deployed(round, 0)), after)
    nobody = Federation(growing(small_rounds=1))
    nobody.run(1)
    nobody.run(2, cohort=[])
    assert_same_bits(nobody.server, grown)


def test_a_target_that_is_the_smallest_form_stays_as_it_is() -> None:
    federation = Federation(growing(small_rounds=1), ALIKE, target=SMALL)
    federation.run(1)
    assert_same_bits(federation.payload(2, 0), federation.server)


@pytest.mark.parametrize(
    "fields, target, named",
    [
        ({"preset": "hypercloning"}, Form(20, 4, heads=5), "growing 8x1 into 20x4"),
        ({"preset": "bigger"}, TARGET, "algorithm.preset='bigger'"),
        ({"small_rounds": 0}, TARGET, "algorithm.small_rounds=0"),
    ],
)
def test_growth_that_cannot_be_is_refused(fields: dict[str, Any], target: Form, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Federation(growing(**fields), (SMALL, SMALL, MIDDLE), target)
