"""What a participant's data are like, and who it is.

histogram   the classifier's bias changes by p_c - y_c, summed over examples, and p_c is about even where many
            classes are learned: h_c = 1 / C - s d_c, with the largest s that leaves no class below 0
mix         what is sent is about sum_c h_c g_c, of the objective's gradients g_c on public examples of each class:
            non-negative least squares; of whatever is sent, with or without a classifier
nearest     the change of a round belongs to whoever sent the most alike one before: cosines of changes from which
            the round's mean is taken, for that is what all share
"""

import torch
from scipy.optimize import nnls
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


def mix(gradients: Tensor, change: Tensor) -> Tensor:
    """Shares of the classes in a shard `(C,)`, from the change `(size,)` and the classes' gradients `(C, size)`.

    Even where no class goes the change's way. A class without examples has a gradient of zeros, and no share.
    """
    found = torch.from_numpy(nnls(gradients.double().T.numpy(), change.double().numpy())[0])
    return found / found.sum() if found.any() else torch.full_like(found, 1 / len(found))


def distance(found: Tensor, truth: Tensor) -> float:
    """Total variation of two histograms, half their L1 distance: from 0 to 1."""
    return float((found.double() - truth.double()).abs().sum() / 2)


def nearest(changes: Tensor, before: Tensor) -> Tensor:
    """Place of the most alike of earlier changes `(m, size)`, of each of `(n, size)`; each from its round's mean."""
    return (F.normalize(changes.double(), dim=1) @ F.normalize(before.double(), dim=1).T).argmax(1)
