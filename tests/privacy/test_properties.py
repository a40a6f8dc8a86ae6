"""Labels and authors of updates, by hand."""

import pytest
import torch

from fedsim.privacy.attacks.properties import distance, histogram, mix, nearest


def test_a_histogram_follows_from_the_change_of_the_bias() -> None:
    """p - h at even p = 1/3, whatever the step: of (1, 0, 0), and of (3/4, 1/4, 0), where one class is missing."""
    for truth in ([1.0, 0.0, 0.0], [0.75, 0.25, 0.0]):
        moved = 0.01 * (1 / 3 - torch.tensor(truth))
        assert torch.allclose(histogram(moved), torch.tensor(truth, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(histogram(moved + 5.0), histogram(moved), atol=1e-4)  # a constant moves no prediction
    assert torch.allclose(histogram(torch.zeros(4)), torch.full((4,), 0.25).double())


def test_without_a_missing_class_differences_are_overstated() -> None:
    truth = torch.tensor([0.5, 0.3, 0.2])
    found = histogram(1 / 3 - truth)
    assert float(found.min()) == pytest.approx(0.0, abs=1e-7) and float(found.max()) > 0.5 + 0.05


def test_a_mix_of_gradients_is_taken_apart_and_what_is_none_is_even() -> None:
    gradients = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    gradients[3] = 0  # a class that no public example is of
    shares = torch.tensor([0.25, 0.0, 0.75, 0.0])
    assert torch.allclose(mix(gradients, 0.01 * shares @ gradients), shares.double(), atol=1e-6)
    assert torch.equal(mix(gradients, torch.zeros(20)), torch.full((4,), 0.25).double())
    assert torch.equal(mix(gradients[:1], -gradients[0]), torch.ones(1).double())


def test_distance_is_half_of_l1() -> None:
    assert distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert distance(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])) == 0.25


def test_the_nearest_is_by_direction_not_by_length() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    assert nearest(torch.tensor([[5.0, 1.0], [0.1, 0.2], [-1.0, 0.9]]), before).tolist() == [0, 1, 1]
