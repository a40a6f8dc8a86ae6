"""Fed-Grow beside one's own small model: the logits of both, a gate that stays, and an operator that is averaged."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.fused import FedGrowFused
from fedsim.core.tree import flat, nbytes, sha256
from fedsim.learning.ensemble import Gated
from fedsim.testing import MIDDLE, SMALL, TARGET, Federation
from tests.support.clients import asked_of
from tests.support.procedures import ROUND
from tests.support.small_federation import assert_close, assert_same_bits, distance, mean


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")


def fused(**changes: Any) -> FedGrowFused:
    fields: dict[str, Any] = ROUND | {"local_epochs": 1, "preset": "preserving", "rank": 2} | changes
    return FedGrowFused(**fields)


def plain(algorithm: FedGrowFused) -> FedGrow:
    """Fed-Grow with the same fields."""
    return FedGrow(**{field.name: getattr(algorithm, field.name) for field in dataclasses.fields(FedGrow)})


# on paper -------------------------------------------------------------------------------------------------------------


class Says(torch.nn.Module):
    """A model that always says the same."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor([logits])

    def forward(self) -> "Says":
        return self


def test_two_models_on_paper() -> None:
    """(1, 2) and half of (4, -2) are (3, 1)."""
    both = Gated(Says(1, 2), Says(4, -2), torch.tensor(0.5))
    assert both().logits.tolist() == [[3.0, 1.0]]


@pytest.mark.parametrize("rank", [None, 2])
def test_the_loss_is_of_the_shared_logits_and_of_the_fused_ones(rank: int | None) -> None:
    federation = Federation(fused(rank=rank))
    federation.private[0] = federation.state(0) | {"gate": {"gate": torch.tensor(0.3)}}
    both: Any = federation.deployed(0, 0)
    batch = federation.task.batch(federation.shards[0], torch.arange(6))
    pixels = batch["pixel_values"]
    with torch.no_grad():
        shared, own = both.shared(pixels).logits, both.own(pixels).logits
        assert_close({"z": both(pixel_values=pixels).logits}, {"z": shared + 0.3 * own}, 1e-5)
    wanted = sum(torch.nn.functional.cross_entropy(z, batch["labels"]) for z in (shared, shared + 0.3 * own))
    asked = asked_of(federation.algorithm, federation.payload(1, 0), federation.state(0), federation.at_client(1, 0))
    loss: Any = asked.objective
    torch.testing.assert_close(loss(asked.start, asked.frozen, batch), wanted, rtol=0, atol=1e-5)


# rounds ---------------------------------------------------------------------------------------------------------------


def test_a_round_is_the_mean_of_operators_and_gates_stay() -> None:
    federation = Federation(fused())
    before = [federation.state(client) for client in range(3)]
    updates = federation.run(1)
    assert_close(federation.server, mean([update.tree for update in updates], [6, 12, 18]), 1e-6)
    gates = [float(federation.state(client)["gate"]["gate"]) for client in range(3)]
    assert all(state["gate"]["gate"] == 1 for state in before)
    assert len({1.0, *gates}) == 4, "each is trained, and by itself"
    for client in range(3):
        kept = federation.state(client)
        assert {*kept} == {"middle", "small", "gate"}
        for part in ("middle", "small"):
            assert sha256(kept[part]) == sha256(before[client][part])
        private = {t.numpy().tobytes() for t in flat(kept).values() if t.any()}
        assert private.isdisjoint(t.numpy().tobytes() for t in flat(updates[client].tree).values())


def test_it_sends_what_fed_grow_sends() -> None:
    ours = Federation(fused())
    theirs = Federation(plain(fused()))
    assert_same_bits(ours.server, theirs.server)
    one, other = (each.run(1)[0].tree for each in (ours, theirs))
    shapes = [{name: tensor.shape for name, tensor in sent.items()} for sent in (one, other)]
    assert shapes[0] == shapes[1] and nbytes(one) == nbytes(other)
    assert nbytes(ours.payload(2, 0)) == nbytes(theirs.payload(2, 0))
    assert_same_bits(ours.state(0)["middle"], theirs.state(0)["middle"])
    assert distance(one, other) > 1e-4, "S_i's logits reach the training"


def test_small_models_of_several_forms() -> None:
    federation = Federation(fused(), forms=(SMALL, MIDDLE, SMALL))
    federation.run(1)
    own = [sum(p.numel() for p in federation.deployed(1, client).own.parameters()) for client in range(3)]  # type: ignore
    assert own[0] == own[2] < own[1]
    shapes = [federation.state(client)["gate"]["gate"].shape for client in range(3)]
    assert shapes == [torch.Size([])] * 3


# what is deployed -----------------------------------------------------------------------------------------------------


def test_what_is_deployed_is_two_models_that_a_folder_cannot_hold(tmp_path: Path) -> None:
    """Each of them is a plain one; both together `fedsim export` refuses, as of other methods with several models."""
    federation = Federation(fused())
    federation.run(1)
    both: Any = federation.deployed(1, 0)
    assert not hasattr(both, "config") and not hasattr(both, "save_pretrained")
    for part in ("shared", "own"):
        model = getattr(both, part)
        model.save_pretrained(tmp_path / part)
        loaded = type(model).from_pretrained(tmp_path / part)
        with torch.no_grad():
            assert torch.equal(loaded(federation.pixels).logits, model(federation.pixels).logits)


# what it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"federate": False}, r"algorithm\.federate=False: must be True"),
        ({"finetune_after": 2}, r"algorithm\.finetune_after=2: must be None"),
    ],
)
def test_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fused(**changes)


def test_forms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"growing .* into"):
        fused().check(Federation(fused()).task, [TARGET], MIDDLE, TARGET)
