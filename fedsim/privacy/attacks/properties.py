"""What a participant's data are like, and who it is.

histogram   the classifier's bias changes by p_c - y_c, summed over examples, and p_c is about even where many
            classes are learned: h_c = 1 / C - s d_c, with the largest s that leaves no class below 0
nearest     the change of a round belongs to whoever sent the most alike one before: cosines of changes from which
            the round's mean is taken, for that is what all share
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def histogram(bias: Tensor) -> Tensor:
    """Shares of the classes in a shard `(C,)`, from the change (start - sent) of the classifier's bias `(C,)`.

    It takes some class to be missing: where none is, differences between classes are overstated.
    """
    centred = bias.double() - bias.double().mean()
    even = torch.full_like(centred, 1 / len(centred))
    largest = float(centred.max())
    return even if largest <= 0 else even - centred / (largest * len(centred))


def distance(found: Tensor, truth: Tensor) -> float:
    """Total variation of two histograms, half their L1 distance: from 0 to 1."""
    return float((found.double() - truth.double()).abs().sum() / 2)


def nearest(changes: Tensor, before: Tensor) -> Tensor:
    """Place of the most alike of earlier changes `(m, size)`, of each of `(n, size)`; each from its round's mean."""
    return (F.normalize(changes.double(), dim=1) @ F.normalize(before.double(), dim=1).T).argmax(1)
