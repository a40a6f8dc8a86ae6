"""How well an attack did, each value with a 95 % interval.

auc       P(score of a member > score of another), ties count half; DeLong et al. 1988, by the ranks of Sun & Xu 2014
tpr       share of members above the score that a share `fpr` of the others exceeds; Clopper & Pearson 1934
mean      of values that are alike and independent; Student's t
psnr      10 log10(range^2 / mean squared error), in dB
roc       tpr against fpr, over all thresholds
ssim      structural similarity, Wang et al. 2004, equation 13: Gaussian window of 11 pixels, sigma 1.5, K = .01, .03
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F


LEVEL = 0.95
POINTS = 60  # of a curve
LARGEST_PSNR = 100.0  # dB: what equals the truth to rounding would have one without end


class Value(NamedTuple):
    """A value and the ends of its interval; None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


class Told(dict[str, Value]):
    """Values by metric, and what they were measured of.

    - `scores`: of members `(m,)` and of others `(n,)`. - `images`: true and found, `(C, H, W)`, from 0 to 1.
    """

    def __init__(
        self,
        values: Mapping[str, Value],
        *,
        scores: tuple[np.ndarray, np.ndarray] | None = None,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        dict.__init__(self, values)
        self.scores, self.images = scores, images


def auc(members: np.ndarray, others: np.ndarray) -> Value:
    """How well scores `(m,)` of members stand out from those `(n,)` of others; m and n at least 2.

    Where all are told apart the estimated variance is 0, and so is the interval's width.
    """
    m, n = len(members), len(others)
    joint = stats.rankdata(np.concatenate([members, others]))
    of_members = (joint[:m] - stats.rankdata(members)) / n  # share of the others below each member
    of_others = 1 - (joint[m:] - stats.rankdata(others)) / m  # share of the members above each of the others
    value = float(of_members.mean())
    width = _normal() * math.sqrt(of_members.var(ddof=1) / m + of_others.var(ddof=1) / n)
    return Value(value, max(0.0, value - width), min(1.0, value + width))


def tpr(members: np.ndarray, others: np.ndarray, fpr: float) -> Value:
    """Share of members whose score exceeds a threshold that at most a share `fpr` of the others exceeds.

    With fewer than 1 / `fpr` others, none exceeds it. The interval takes the threshold as given.
    """
    threshold = np.sort(others)[len(others) - 1 - math.floor(fpr * len(others))]
    return share(int((members > threshold).sum()), len(members))


def roc(members: np.ndarray, others: np.ndarray) -> list[tuple[float, float]]:
    """False-positive rates and, at each, the largest share of members above a threshold that no more others exceed.

    At most `POINTS`: no false positive, and then as many as are evenly spread in the logarithm, up to all.
    """
    n, ranked = len(others), np.append(np.sort(others)[::-1], -np.inf)
    allowed = {0, n, *np.geomspace(1, n, POINTS - 2).astype(int).tolist()}
    thresholds = [ranked[count] for count in sorted(allowed)]
    return [*dict.fromkeys((float((others > t).mean()), float((members > t).mean())) for t in thresholds)]


def share(hits: int, of: int) -> Value:
    """A share of independent trials."""
    interval = stats.binomtest(hits, of).proportion_ci(LEVEL, method="exact")
    return Value(hits / of, float(interval.low), float(interval.high))


def mean(values: list[float], least: float = -math.inf, most: float = math.inf) -> Value:
    """The mean of values between `least` and `most`; without an interval where it is of one value."""
    found = float(np.mean(values))
    if len(values) < 2:
        return Value(found)
    width = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return Value(found, max(least, found - width), min(most, found + width))


def psnr(found: Tensor, truth: Tensor, range: float) -> float:
    """Of images of equal shape whose values span `range`."""
    error = float((found.double() - truth.double()).square().mean())
    return LARGEST_PSNR if error <= range**2 * 10 ** (-LARGEST_PSNR / 10) else 10 * math.log10(range**2 / error)


def ssim(found: Tensor, truth: Tensor, range: float) -> float:
    """Of two images `(C, H, W)`; the window is as large as the image allows."""
    channels, *sides = found.shape
    size = min(11, *(side - (side + 1) % 2 for side in sides))
    at = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, size, size)

    def blurred(image: Tensor) -> Tensor:
        return F.conv2d(image[None], window, groups=channels)

    x, y = found.double(), truth.double()
    mx, my = blurred(x), blurred(y)
    c1, c2 = (0.01 * range) ** 2, (0.03 * range) ** 2
    vx, vy, xy = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    similar = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(similar.mean())


def nearest(found: Tensor, truth: Tensor, range: float) -> dict[str, Value]:
    """Mean PSNR and SSIM of images `(n, C, H, W)`, each with the nearest of `(N, C, H, W)` by squared distance."""
    places = torch.cdist(found.flatten(1).double(), truth.flatten(1).double()).argmin(1)
    pairs = [*zip(found, truth[places], strict=True)]
    by_name = (("psnr", psnr), ("ssim", ssim))
    return {name: Value(float(np.mean([of(*pair, range) for pair in pairs]))) for name, of in by_name}


def _normal() -> float:
    return float(stats.norm.ppf((1 + LEVEL) / 2))
