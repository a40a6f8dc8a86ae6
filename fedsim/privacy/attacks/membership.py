"""Was this example trained on? Scores that are higher for members.

    loss         - loss(x) under the model                                            Yeom et al. 2018, adversary 1
    likelihood   (phi(x) - mu) / sigma, phi = log(p_y / (1 - p_y)), mu and sigma of phi(x) under models that have not
                 seen x: LiRA offline, Carlini et al. 2022, section VI-B, whose Phi of this orders examples alike; the
                 models are what others have sent in the same round, so none is trained for the attack
    alignment    cosine of the gradient at x and the change that was sent             Li, Li & Ribeiro 2023
    residual     - |x - P x| / |x|, P onto the rows of a layer's change: of a few examples they span its inputs

Members and others must differ in nothing else: `matched` gives both the same classes in the same numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.algorithm import Training
from fedsim.core.tree import Tree
from fedsim.data.source import Split
from fedsim.data.text import IGNORED
from fedsim.learning.task import Task
from fedsim.privacy.attacks.replay import gradient, seen_by, vector
from fedsim.privacy.measures import Told, auc, tpr


AT_ONCE = 256  # examples
FEWEST = 8  # members and others: of fewer nothing can be said
ENERGY = 1e-3  # singular values below this share of the largest are rounding of float32
RATES = {"tpr_at_1_percent": 0.01, "tpr_at_0.1_percent": 0.001}


def matched(members: Tensor, others: Tensor, stream: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of as many members as others, of each class equally many, by labels `(m,)` and `(n,)`."""
    chosen: tuple[list[int], list[int]] = [], []
    for label in np.intersect1d(members, others):
        places = [np.flatnonzero(labels == label) for labels in (members.numpy(), others.numpy())]
        for into, held in zip(chosen, places, strict=True):
            into += stream.permutation(held)[: min(map(len, places))].tolist()
    return np.array(chosen[0], np.int64), np.array(chosen[1], np.int64)


def readings(members: np.ndarray, others: np.ndarray) -> Told:
    """AUC and true-positive rates of scores."""
    rates = {name: tpr(members, others, rate) for name, rate in RATES.items()}
    return Told({"auc": auc(members, others)} | rates, scores=(members, others))


@torch.no_grad()
def confidences(task: Task, model: nn.Module, split: Split) -> np.ndarray:
    """`(N, 2)`: minus the loss of each example, and log(p / (1 - p)) of p = exp(-loss); means over labelled tokens."""
    found = []
    for index in torch.arange(len(split)).split(AT_ONCE):
        batch = task.batch(split, index)
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        predicted, labels = task.aligned(logits.double(), batch)
        log_p = -F.cross_entropy(predicted, labels, ignore_index=IGNORED, reduction="none")
        # log(1 - p) over the others' probabilities: exact also where p rounds to 1
        rest = predicted.scatter(1, labels.clamp(min=0)[:, None], -torch.inf).logsumexp(1) - predicted.logsumexp(1)
        kept = (labels != IGNORED).view(len(index), -1)
        both = torch.stack([log_p, log_p - rest], -1).view(len(index), -1, 2) * kept[..., None]
        found.append(both.sum(1) / kept.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(found).numpy()


def likelihood_ratio(target: np.ndarray, out: np.ndarray) -> np.ndarray:
    """LiRA's offline score, of phi `(N,)` under the target and `(models, N)` under models that have not seen x.

    One sigma for all examples, as the paper has for few models.
    """
    centred = out - out.mean(0)
    sigma = np.sqrt((centred**2).sum() / max(1, centred.size - centred.shape[1])) or 1.0
    return (target - out.mean(0)) / sigma


def likelihood_ratio_online(target: np.ndarray, models: np.ndarray, held: np.ndarray) -> np.ndarray:
    """LiRA's online score, of phi `(N,)` under the target and `(models, N)` under others, some of which have seen x.

    One sigma for all examples on each side, as the paper has for few models.

    - `held`: `(models, N)`, which model has seen which example; NaN where fewer than two have, or have not.
    """

    def log_density(where: np.ndarray) -> np.ndarray:
        count = where.sum(0)
        mean = np.where(where, models, 0).sum(0) / np.maximum(1, count)
        free = np.maximum(0, count - 1).sum()
        variance = (np.where(where, models - mean, 0) ** 2).sum() / max(1, free) or 1.0
        return np.where(count > 1, -((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2, np.nan)

    return log_density(held) - log_density(~held)


def alignment(asked: Training, change: Tree, task: Task, split: Split) -> np.ndarray:
    """Cosine of each example's gradient at the start and the change that was sent."""
    names = sorted(change)
    sent = vector(change, names)
    return np.array(
        [float(F.cosine_similarity(gradient(asked, names, task.batch(split, i)), sent, dim=0)) for i in _each(split)]
    )


def rows_of(change: Tensor) -> Tensor:
    """An orthonormal basis `(rank, in)` of the rows of a change `(out, in)`, up to rounding."""
    _, sizes, rows = torch.linalg.svd(change.double(), full_matrices=False)
    return rows[sizes > ENERGY * sizes.max()]


def rank(change: Tensor) -> int:
    """How many directions the rows of a change have."""
    return len(rows_of(change))


def residual(change: Tensor, inputs: Sequence[Tensor]) -> np.ndarray:
    """Minus the share of each example's inputs `(tokens, in)` outside the rows of a layer's change `(out, in)`.

    It tells something as long as the rows do not span everything: where there are fewer tokens than inputs, or ranks.
    """
    basis = rows_of(change)
    outside = [x.double() - x.double() @ basis.T @ basis for x in inputs]
    return -np.array([float(o.norm() / x.double().norm()) for o, x in zip(outside, inputs, strict=True)])


def inputs_of(model: nn.Module, layer: str, task: Task, split: Split) -> list[Tensor]:
    """What a layer of the model sees of each example: `(tokens, in)`."""
    at = model.get_submodule(layer)
    batches = (task.batch(split, index) for index in _each(split))
    inputs = ({name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches)
    return [seen_by(at, model, each).flatten(0, -2) for each in inputs]


def _each(split: Split) -> Sequence[Tensor]:
    return torch.arange(len(split)).split(1)
