"""Fed-Grow's core: growth that all have alike, and inner factors, heads and norms that are averaged on top of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from baselines.fedavg import fedavg_small
from baselines.fedsb import FedSB
from fedgrow_algo.core import SMALL as M
from fedgrow_algo.core import FedGrowCore, heads_and_norms
from fedgrow_algo.dual_ligo import grown, operator_between
from fedgrow_algo.grown import Grown
from fedsim.algorithm import ClientUpdate
from fedsim.core.seeding import generator
from fedsim.core.tree import Tree, flat, mapped, nbytes
from fedsim.learning.adapters import HEAD, MODEL, A, B, R, adapted, products, with_inner
from fedsim.learning.exits import tail
from fedsim.models.checkpoint import Checkpoint
from fedsim.testing import MIDDLE, SMALL, TARGET, Federation
from tests.support.small_federation import LOCAL, UNLIKE, assert_close, assert_same_bits, distance, mean, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

RANK = 4


def core(**changes: Any) -> FedGrowCore:
    fields: dict[str, Any] = LOCAL | {"rank": RANK} | changes
    return FedGrowCore(**fields)


# on paper -------------------------------------------------------------------------------------------------------------


def test_two_clients_on_paper() -> None:
    """U = (1, 0)^T, V = (0, 1); R_1 = 2 and R_2 = 4 of 1 and 3 examples: R = 3.5, and U R V has it at the top right."""
    federation = Federation(core())
    federation.server = {R: {"w": torch.zeros(1, 1)}, HEAD: {"n": torch.zeros(1)}}
    sent = [{R: {"w": torch.tensor([[r]])}, HEAD: {"n": torch.tensor([-r])}} for r in (2.0, 4.0)]
    state = federation.aggregate(1, [ClientUpdate(0, sent[0], 1), ClientUpdate(1, sent[1], 3)])
    assert state[R]["w"].tolist() == [[3.5]] and state[HEAD]["n"].tolist() == [-3.5]
    U, V = {"w": torch.tensor([[1.0], [0.0]])}, {"w": torch.tensor([[0.0, 1.0]])}
    assert products({A: V, B: with_inner(U, state[R])}, {"w": 0})["w"].tolist() == [[0.0, 3.5], [0.0, 0.0]]


def test_of_the_intermediate_form() -> None:
    """What all hold is then larger, and what is grown of it another model."""
    small, middle = (Federation(core(of=of), forms=UNLIKE) for of in ("smallest", "intermediate"))
    task = middle.task
    operator = operator_between("preserving", task, MIDDLE, TARGET)
    start = middle.at_client(0, 0).initial(MIDDLE, "small")
    expected = grown(operator, operator.init(generator(0, "operator")), operator.stack(start))
    assert_same_bits(middle.state(0)[MODEL], expected)
    assert any(not torch.equal(small.state(0)[MODEL][name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="intermediate=None"):
        core(of="intermediate").check(task, UNLIKE, None, TARGET)


def test_a_round_is_the_mean_of_models() -> None:
    """Of what participants trained, W'_k = G(M) + U R_k V, in float64: to what sending in float32 rounds."""
    federation = Federation(core(lr=0.05, epochs=3))
    updates, held = federation.run(1), mapped(Tensor.double, federation.state(0))

    def whole(sent: Any) -> Tree:
        factors = {A: held[A], B: with_inner(held[B], mapped(Tensor.double, sent[R]))}
        change = products(factors, adapted(federation.task, TARGET))
        return {**held[MODEL], **sent[HEAD], **{name: held[MODEL][name] + change[name] for name in change}}

    assert_close(whole(federation.server), mean([whole(u.tree) for u in updates], [6, 12, 18]), 1e-6)
    assert_close(weights_of(federation.deployed(1, 0)), whole(federation.server), 1e-6)
    plain = mean([u.tree for u in updates], [1, 1, 1])
    assert distance(plain, federation.server) > 1e-4, "examples count"


# growth ---------------------------------------------------------------------------------------------------------------


def test_everyone_begins_with_the_same_growth_of_the_smallest_form() -> None:
    federation = Federation(core(), forms=UNLIKE)
    small = federation.at_server(0).initial(SMALL, "small")
    operator = operator_between("preserving", federation.task, SMALL, TARGET)
    base = grown(operator, operator.init(generator(0, "operator")), operator.stack(small))
    for client in range(3):
        assert_same_bits(federation.state(client)[MODEL], base)
        assert_same_bits(weights_of(federation.deployed(0, client)), base)
    assert_same_bits(weights_of(federation.served(0)), base)
    model = federation.task.module(SMALL, small)
    with torch.no_grad():
        logits = model(federation.pixels).logits, federation.served(0)(federation.pixels).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)  # this preset's growth is exact here
    other = Federation(core(preset="ligo"), forms=UNLIKE)
    assert_same_bits(weights_of(other.deployed(0, 0)), weights_of(other.deployed(0, 2)))
    assert distance(weights_of(other.deployed(0, 0)), base) > 1e-3


def test_head_norms_and_adapted_matrices_move_and_nothing_else() -> None:
    federation = Federation(core(lr=0.05, epochs=3))
    before = weights_of(federation.deployed(0, 0))
    updates = federation.run(1)
    after = weights_of(federation.deployed(1, 0))
    trained = heads_and_norms(federation.task, TARGET)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {*trained, *adapted(federation.task, TARGET)}
    assert len([name for name in trained if "layernorm_before" in name]) == 2 * TARGET.depth
    assert {*tail(federation.task, TARGET)} < {*trained}
    assert {*updates[0].tree} == {R, HEAD} and {*updates[0].tree[HEAD]} == {*trained}
    assert all(r.shape == (RANK, RANK) for r in updates[0].tree[R].values())
    private = {t.numpy().tobytes() for t in flat(federation.state(0)).values() if t.any()}
    assert private.isdisjoint(t.numpy().tobytes() for t in flat(updates[0].tree).values())


def test_from_a_checkpoint_it_is_fed_sb_with_norms(tmp_path: Path) -> None:
    federation = Federation(core())
    federation.task.module(SMALL, federation.task.fresh(SMALL, 5)).save_pretrained(tmp_path)  # type: ignore[operator]
    start = Grown((Checkpoint(str(tmp_path)),))
    ours, theirs = (Federation(each, start=start) for each in (core(), FedSB(**LOCAL, rank=RANK)))
    assert_same_bits(ours.state(0), theirs.state(0))
    assert_same_bits(weights_of(ours.served(0)), weights_of(theirs.served(0)))
    sent, known = ours.run(1)[0].tree, theirs.run(1)[0].tree
    assert {*flat(sent)} > {*flat(known)}
    assert all("layernorm" in path for path in {*flat(sent)} - {*flat(known)})


# rounds of the small model --------------------------------------------------------------------------------------------


def test_warm_rounds_are_fed_avg_of_the_small_model_which_then_grows() -> None:
    warm, plain = Federation(core(warm_rounds=2)), Federation(fedavg_small(**LOCAL))
    plain.server = dict(warm.server)
    for round in (1, 2):
        updates = warm.run(round)
        assert {*updates[0].tree} == {*plain.server}
    small = dict(warm.server)
    assert_same_bits(weights_of(warm.deployed(2, 0)), small)
    updates = warm.run(3, [0, 1])
    assert {*updates[0].tree} == {R, HEAD}, "M goes down alone"
    assert_same_bits(warm.server[M], small)
    operator = operator_between("preserving", warm.task, SMALL, TARGET)
    base = grown(operator, operator.init(generator(0, "operator")), operator.stack(small))
    after = weights_of(warm.deployed(3, 2))  # of one who took no part in the round
    still = [name for name in base if name not in (*updates[0].tree[HEAD], *updates[0].tree[R])]
    assert still and all(torch.equal(after[name], base[name]) for name in still)
    assert_same_bits(after, weights_of(warm.served(3)))
    warm.run(4)
    assert_same_bits(warm.server[M], small)


def test_what_leaves_and_what_it_is_called() -> None:
    assert (core().name, core().leaves) == ("fedgrow_core", "adapter")
    assert (core(warm_rounds=1).name, core(warm_rounds=1).leaves) == ("fedgrow_core_warm", "model")
    cold, warm = Federation(core()), Federation(core(warm_rounds=1))
    warm.run(1)
    sent = [nbytes(each.payload(2, 0)) for each in (cold, warm)]
    assert sent[1] - sent[0] == nbytes(warm.task.fresh(SMALL, 0))
    assert nbytes(cold.update(1, 0).tree) == nbytes(warm.update(2, 0).tree) == sent[0]


# what is deployed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_rounds", [0, 1])
def test_what_is_deployed_reloads_with_plain_transformers(warm_rounds: int, tmp_path: Path) -> None:
    federation = Federation(core(warm_rounds=warm_rounds))
    federation.run(1)
    federation.run(2)
    model: Any = federation.deployed(2, 0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: t.shape for name, t in federation.task.fresh(TARGET, 0).items()
    }
    with torch.no_grad():
        assert torch.equal(loaded(federation.pixels).logits, model(federation.pixels).logits)


# what it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 0}, r"algorithm\.rank=0: must be at least 1"),
        ({"warm_rounds": -1}, r"algorithm\.warm_rounds=-1: must be at least 0"),
        ({"preset": "none"}, r"none"),
    ],
)
def test_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        core(**changes)


def test_forms_are_refused() -> None:
    task = Federation(core()).task
    with pytest.raises(ValueError, match=r"algorithm\.rank=17: must be at most 16"):
        core(rank=17).check(task, [SMALL], MIDDLE, TARGET)
    with pytest.raises(ValueError, match=r"shrink|depth"):
        core().check(task, [TARGET], MIDDLE, SMALL)
    core().check(task, [], None, TARGET)
