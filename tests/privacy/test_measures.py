"""Readings of attacks, by hand; and that scores which say nothing are read as saying nothing."""

import math

import numpy as np
import pytest
import torch

from fedsim.privacy.measures import POINTS, auc, mean, nearest, psnr, roc, share, ssim, tpr


def test_a_curve_by_hand() -> None:
    """Above .6, one member and nobody else; above .1, both members and one of the others; above nothing, all."""
    assert roc(np.array([0.9, 0.4]), np.array([0.6, 0.1])) == [(0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]
    assert roc(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == [(0.0, 0.0), (1.0, 1.0)], "ties tell nothing"


def test_a_curve_is_thinned_and_agrees_with_the_rates() -> None:
    stream = np.random.default_rng(0)
    members, others = stream.normal(1, 1, 3000), stream.normal(0, 1, 2000)
    found = roc(members, others)
    assert len(found) <= POINTS and found[0][0] == 0 and found[-1] == (1.0, 1.0) and found == sorted(found)
    for false, true in found[:-1]:
        assert true == tpr(members, others, false + 1e-9).value


def test_auc_by_hand() -> None:
    """Of the pairs of {3, 1} and {2, 0}, three of four are in order. DeLong: shares 1, 1/2 and 1/2, 1 of the others
    have a variance of 1/8 each, of two values: sqrt(1/16 + 1/16)."""
    value, low, high = auc(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    assert low is not None
    assert value == 0.75 and high == 1.0
    assert low == pytest.approx(0.75 - 1.959964 * math.sqrt(1 / 8), abs=1e-6)


def test_ties_count_half_and_order_alone_counts() -> None:
    assert auc(np.ones(5), np.ones(7)).value == 0.5
    members, others = np.array([0.3, 2.0, 5.0]), np.array([0.1, 2.0, 3.0, 4.0])
    assert auc(members, others) == auc(np.exp(members), np.exp(others))
    assert auc(others, members).value == pytest.approx(1 - auc(members, others).value)


def test_intervals_of_auc_hold_the_truth_as_often_as_they_say() -> None:
    """400 draws of 60 scores a side: fewer than 340 hits of 0.95 each has a probability below 1e-12 (binomial)."""
    stream = np.random.default_rng(0)
    found = [auc(stream.normal(1.0, 1.0, 60), stream.normal(0.0, 1.0, 60)) for _ in range(400)]
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # P(N(1, 2) > 0)
    hits = sum(each.low <= truth <= each.high for each in found if each.low is not None and each.high is not None)
    assert 340 <= hits < 400


def test_tpr_by_hand() -> None:
    """Of 100 others 0..99 one may exceed the threshold: it is 98, which two of four members exceed; at 0.1 % none may,
    and one does. Clopper and Pearson of 0 of 4: 1 - 0.025^(1/4)."""
    others, members = np.arange(100.0), np.array([10.0, 98.0, 98.5, 120.0])
    assert tpr(members, others, 0.01).value == 0.5
    assert tpr(members, others, 0.001).value == 0.25
    none = tpr(np.zeros(4), others, 0.01)
    assert none[:2] == (0.0, 0.0) and none.high == pytest.approx(1 - 0.025**0.25)


def test_shares_and_means() -> None:
    assert share(3, 3).low == pytest.approx(0.025 ** (1 / 3)) and share(3, 3).high == 1.0
    assert mean([0.7]) == (0.7, None, None)
    value, low, _ = mean([0.0, 1.0])
    assert value == 0.5 and low == pytest.approx(0.5 - 12.7062 * 0.5, abs=1e-3)  # t of one degree of freedom
    assert mean([0.0, 1.0], 0.0, 1.0) == (0.5, 0.0, 1.0)


def test_psnr_and_ssim_by_hand() -> None:
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert psnr(image + 0.1, image, 1.0) == pytest.approx(20.0, abs=1e-4)
    assert psnr(image + 0.1, image, 2.0) == pytest.approx(20.0 + 20 * math.log10(2), abs=1e-4)
    assert psnr(image, image, 1.0) == 100.0
    assert ssim(image, image, 1.0) == pytest.approx(1.0)
    grey, white = torch.full((1, 8, 8), 0.5), torch.ones(1, 8, 8)  # without structure the luminance alone is compared
    assert ssim(grey, white, 1.0) == pytest.approx((2 * 0.5 + 1e-4) / (1.25 + 1e-4))
    assert ssim(1 - image, image, 1.0) < 0


def test_an_image_is_compared_with_the_nearest_one() -> None:
    truth = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = nearest(truth[[3, 1]] + torch.tensor([0.1, 0.01])[:, None, None, None], truth, 1.0)
    assert found["psnr"].value == pytest.approx((20 + 40) / 2, abs=1e-3) and 0.9 < found["ssim"].value < 1
    assert nearest(truth[:1], truth, 1.0) == {"psnr": (100.0, None, None), "ssim": (pytest.approx(1.0), None, None)}
    assert nearest(truth.mean(0, keepdim=True), truth, 1.0)["psnr"].value < 15
