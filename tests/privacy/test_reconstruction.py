"""Reconstruction: the picture of one step comes back, and does not from noise or from another's update."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.fedavg import FedAvg
from fedsim.algorithm import Training
from fedsim.core.tree import Tree, mapped
from fedsim.models import Form
from fedsim.privacy.attacks import reconstruction
from fedsim.privacy.attacks.reconstruction import Inversion, replayed
from fedsim.privacy.attacks.replay import Exchange, Replay, change, without_data
from fedsim.privacy.measures import nearest, psnr
from fedsim.testing import Federation


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 1e-2, "clip": None}
BOUNDS = torch.full((1, 1, 1), -1.0), torch.full((1, 1, 1), 1.0)
SHAPE = (1, 8, 8)


def of_one_image(client: int = 0, **fields: Any) -> tuple[Training, Tree, Tensor, Tensor]:
    """What a participant with one image trained, how that changed, the image and its label."""
    target = Form(32, 2, heads=2)
    federation = Federation(FedAvg(**SGD | fields), target=target, intermediate=Form(16, 1, heads=2), sizes=(1, 1, 1))
    update = federation.update(1, client)
    exchange = Exchange(1, client, federation.payload(1, client), update.tree)
    asked = Replay(federation.algorithm, exchange, {}, without_data(federation.at_client(1, client))).asked()
    assert asked is not None
    moved = change(asked, update.tree)
    assert moved is not None
    batch = federation.task.batch(federation.shards[client], torch.arange(1))
    return asked, moved, batch["pixel_values"], batch["labels"]


@pytest.mark.parametrize(
    "fields", [{}, {"epochs": 3, "momentum": 0.9}, {"epochs": 3, "clip": 0.1, "schedule": "cosine"}], ids=str
)
def test_a_replay_of_the_true_image_is_what_was_trained(fields: dict[str, Any]) -> None:
    asked, moved, image, label = of_one_image(**fields)
    again = replayed(asked, sorted(moved), asked.epochs, {"pixel_values": image, "labels": label})
    largest = max(float(each.abs().max()) for each in moved.values())
    assert max(float((again[name] - moved[name]).detach().abs().max()) for name in moved) < 1e-3 * largest
    other = replayed(asked, sorted(moved), asked.epochs, {"pixel_values": -image, "labels": label})
    assert max(float((other[name] - moved[name]).detach().abs().max()) for name in moved) > 1e-2 * largest


def test_a_replay_of_adamw_goes_the_same_way() -> None:
    """Where a gradient is no rounding: its sign is that of the first step."""
    asked, moved, image, label = of_one_image(optimizer="adamw")
    again = {
        n: each.detach()
        for n, each in replayed(asked, sorted(moved), 1, {"pixel_values": image, "labels": label}).items()
    }
    name = max(moved, key=lambda each: moved[each].numel())
    clear = again[name].abs() > 0.1 * again[name].abs().max()
    assert clear.any() and torch.equal(again[name][clear].sign(), moved[name][clear].sign())


def from_patches(moved: Tree) -> Tensor:
    found = reconstruction.patches(moved)
    assert found is not None
    return reconstruction.patches_to_images(reconstruction.inputs(*found), SHAPE)


def test_the_image_of_one_step_comes_back_in_closed_form_and_not_through_noise() -> None:
    _, moved, image, label = of_one_image()
    assert psnr(from_patches(moved), image, 2.0) > 60
    assert reconstruction.label_of(moved["classifier.bias"]) == int(label)
    stream = torch.Generator().manual_seed(0)
    noisy = {
        name: each + each.square().mean().sqrt() * torch.randn(each.shape, generator=stream)
        for name, each in moved.items()
    }
    assert psnr(from_patches(noisy).clamp(-1, 1), image, 2.0) < 20
    _, _, other, _ = of_one_image(client=1)
    assert psnr(from_patches(moved), other, 2.0) < 20


def test_the_image_of_one_step_comes_back_by_inversion_and_not_from_anothers_update() -> None:
    asked, moved, image, label = of_one_image()
    search = Inversion(starts=6, iterations=100)
    found = reconstruction.invert(asked, moved, 1, label, SHAPE, BOUNDS, torch.Generator().manual_seed(0), search)
    assert psnr(found, image, 2.0) > 20
    _, _, other, _ = of_one_image(client=1)
    assert psnr(found, other, 2.0) < 20


def test_nothing_is_made_of_a_change_of_nothing() -> None:
    asked, moved, _, label = of_one_image()
    nothing = {name: torch.zeros_like(each) for name, each in moved.items()}
    found = reconstruction.invert(asked, nothing, 1, label, SHAPE, BOUNDS, torch.Generator())
    assert torch.equal(found, torch.zeros(1, *SHAPE))


def test_what_a_linear_layer_saw_follows_from_its_change() -> None:
    """Three places of a layer with five inputs: exact up to the rank of the biases, four; not beyond."""
    stream = torch.Generator().manual_seed(0)
    for places, exact in ((3, True), (4, True), (6, False)):
        x, delta = torch.randn(places, 5, generator=stream), torch.randn(places, 4, generator=stream)
        found = reconstruction.inputs(delta.T @ x, delta)
        assert torch.allclose(found, x, atol=1e-4) == exact


def test_total_variation_and_tokens_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])  # across 1 and 3, down 2 and 4
    assert float(reconstruction.total_variation(image)) == 2.0 + 3.0
    embedding = torch.zeros(5, 3)
    embedding[1, 2] = -1e-9
    embedding[4] = 1.0
    assert reconstruction.tokens_there(embedding).tolist() == [1, 4]


def test_tokens_in_the_span_of_a_layers_change() -> None:
    """Two of five tokens, at two places, in eight dimensions: of each place the one that was there, and no other."""
    stream = torch.Generator().manual_seed(0)
    tokens, places = torch.randn(5, 8, generator=stream), torch.randn(2, 8, generator=stream)
    seen = torch.stack([tokens[3] + places[0], tokens[1] + places[1]])
    moved = torch.randn(6, 2, generator=stream) @ seen
    found = reconstruction.tokens_in_span(moved, lambda place: tokens + places[place], 2, 0.0)
    assert [each.tolist() for each in found] == [[3], [1]]
    everything = torch.randn(8, 8, generator=stream)
    found = reconstruction.tokens_in_span(everything, lambda place: tokens + places[place], 2, 0.0)
    assert [each.tolist() for each in found] == [[0, 1, 2, 3, 4]] * 2
    found = reconstruction.tokens_in_span(moved, lambda place: tokens + places[place], 2, float(moved.norm()))
    assert [each.tolist() for each in found] == [[], []]  # all of it may be rounding


def test_rounding_is_about_as_large_as_it_is_said_to_be() -> None:
    weights = torch.randn(40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = float(torch.linalg.matrix_norm(weights.float().double() - weights, 2))
    assert 0.5 * error < reconstruction.rounding_of(weights) < 2 * error


def test_a_change_is_of_the_part_that_is_sent() -> None:
    start = {"shared": {"a": torch.ones(2)}, "own": {"a": torch.zeros(3)}}
    asked, *_ = of_one_image()
    nested = Training(asked.objective, start, purpose="x", lr=0.1, epochs=1, batch_size=1)
    found = change(nested, {"a": torch.tensor([0.5, 2.0])})
    assert found is not None and found.keys() == {"shared::a"}
    assert found["shared::a"].tolist() == [0.5, -1.0]
    assert change(nested, {"b": torch.zeros(2)}) is None


def test_the_image_of_several_steps_comes_back_as_if_of_one_and_not_from_anothers_update() -> None:
    """At a low rate, in float64: lr times the sum of gradients that hardly differ. A cosine sees neither factor."""
    asked, moved, image, label = of_one_image()
    slow, batch = dataclasses.replace(asked, lr=1e-4), {"pixel_values": image.double(), "labels": label}
    slow = dataclasses.replace(slow, start=mapped(reconstruction.doubled, slow.start))
    steps = {name: each.detach() for name, each in replayed(slow, sorted(moved), 3, batch).items()}
    search, stream = Inversion(starts=1, iterations=150), torch.Generator().manual_seed(0)
    found = reconstruction.invert(asked, steps, 1, label, SHAPE, BOUNDS, stream, search)
    assert nearest(found, image, 2.0)["psnr"].value > 20
    _, _, other, _ = of_one_image(client=1)
    assert nearest(found, other, 2.0)["psnr"].value < 20
