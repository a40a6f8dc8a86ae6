"""What were the examples? Images and tokens out of a change that was sent.

    invert      x <- argmin 1 - mean_t cos(change_t(x), change_t sent) + tv TV(x), over the tensors t that were sent:
                Geiping et al. 2020, equation 4; change(x) is replayed through all local steps
    inputs      Delta W = sum_p delta_p x_p^T and, where every p has a bias of its own, delta_p is that bias' change:
                x_p follows by least squares. Of a ViT's patches: Lu et al. 2022 (APRIL)
    tokens      an embedding's rows change where their token was there; of a layer's change, the rows span its inputs:
                token v at place p was there where |x_vp - P x_vp| is 0: Petrov et al. 2024 (DAGER), section 4.1
    labels      the classifier's bias changes by p_c - y_c: of one example, y is the only one below 0: Zhao et al. 2020

Differs from Geiping et al.: the cosine is each tensor's, as the largest would drown the layer that sees the pixels; and
L-BFGS in float64 takes the place of Adam on signs, which ends in local minima of transformers.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.algorithm import Training
from fedsim.core.tree import Tree, flat, mapped
from fedsim.learning.task import Batch
from fedsim.privacy.attacks.replay import loss


ROUNDING = 1e-6  # tensors whose change is smaller, relative to the largest, hold nothing but that


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How images are searched for: from so many random starts, until one is found whose change is the one sent.

    - `iterations`: of L-BFGS, from each start. - `tv`: weight of the mean total variation.
    - `enough`: distance at which the search ends.
    """

    starts: int = 6
    iterations: int = 100
    tv: float = 1e-6
    enough: float = 1e-5


def invert(
    asked: Training,
    change: Tree,
    steps: int,
    labels: Tensor,
    shape: tuple[int, ...],
    bounds: tuple[Tensor, Tensor],
    stream: torch.Generator,
    search: Inversion = Inversion(),
) -> Tensor:
    """Images `(n, C, H, W)` of known labels `(n,)` whose training would have changed tensors as they did.

    - `change`: start - sent. - `steps`: how many were taken, each on all the images.
    - `bounds`: of pixels, `(C, 1, 1)`.
    """
    asked = dataclasses.replace(asked, start=mapped(doubled, asked.start), frozen=mapped(doubled, asked.frozen))
    sent = {name: tensor.double() for name, tensor in change.items()}
    largest = max(float(tensor.norm()) for tensor in sent.values())
    names = [name for name, tensor in sorted(sent.items()) if float(tensor.norm()) > ROUNDING * largest]
    low, high = (bound.double() for bound in bounds)
    middle, half = (low + high) / 2, (high - low) / 2
    best, nearest = middle.expand(len(labels), *shape).float(), float("inf")

    def distance(images: Tensor) -> Tensor:
        made = replayed(asked, names, steps, {"pixel_values": images, "labels": labels})
        alike = [F.cosine_similarity(made[name].flatten(), sent[name].flatten(), dim=0) for name in names]
        return 1 - torch.stack(alike).mean()

    for _ in range(search.starts if names else 0):
        drawn = torch.randn((len(labels), *shape), generator=stream, dtype=torch.float64)
        images = descended(middle + half / 5 * drawn, lambda x: distance(x) + search.tv * total_variation(x), search)
        if (found := float(distance(images).detach())) < nearest:
            best, nearest = torch.minimum(torch.maximum(images.detach(), low), high).float(), found
        if nearest < search.enough:
            break
    return best


def descended(start: Tensor, value: Callable[[Tensor], Tensor], search: Inversion) -> Tensor:
    """Where L-BFGS arrives from a start."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=search.iterations, history_size=50, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = value(x)
        found.backward()
        return found

    optimizer.step(closure)
    return x


def doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def replayed(asked: Training, names: list[str], steps: int, batch: Batch) -> Tree:
    """`start - end` of so many steps on one batch; can be differentiated.

    AdamW's first step is the sign of a gradient, which has no derivative: m / (sqrt(v) + mean |m|) takes its place.
    """
    start = {name: tensor.detach() for name, tensor in flat(asked.start).items()}
    parameters = {name: tensor.requires_grad_() for name, tensor in start.items()}
    first = {name: torch.zeros_like(start[name]) for name in names}
    second = dict(first)
    for step in range(1, steps + 1):
        found = torch.autograd.grad(loss(asked, parameters, batch), [parameters[n] for n in names], create_graph=True)
        scale = asked.scheduled(step - 1, steps)
        if asked.clip is not None:
            norm = torch.stack([part.square().sum() for part in found]).sum().sqrt()
            found = [part * (asked.clip / (norm + 1e-6)).clamp(max=1.0) for part in found]
        for name, part in zip(names, found, strict=True):
            if asked.optimizer == "sgd":
                first[name] = asked.momentum * first[name] + part
                move = part + asked.momentum * first[name] if asked.nesterov else first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * part
                second[name] = 0.999 * second[name] + 0.001 * part.square()
                m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                move = m / ((v + 1e-16).sqrt() + m.detach().abs().mean() + 1e-12)
            parameters[name] = parameters[name] - asked.rate(name) * scale * move
    return {name: start[name] - parameters[name] for name in names}


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, of `(n, C, H, W)`."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def inputs(weight: Tensor, biases: Tensor) -> Tensor:
    """What a linear layer saw, `(P, in)`, from the changes of its weight `(out, in)` and of the bias that each of P
    places has of its own, `(P, out)`; exact for P up to the rank of these."""
    return torch.linalg.lstsq(biases.double().T, weight.double(), driver="gelsd").solution.to(weight.dtype)


def patches(change: Tree) -> tuple[Tensor, Tensor] | None:
    """Of a transformer that sees patches, the changes of their projection `(out, in)` and of the positions of P patches
    `(P, out)`; None where there are no such tensors."""
    kernels = [tensor for tensor in change.values() if tensor.dim() == 4]
    if len(kernels) != 1:
        return None
    places = [
        t for t in change.values() if t.dim() == 3 and len(t) == 1 and t.shape[2] == len(kernels[0]) and t.shape[1] > 1
    ]
    if len(places) != 1:
        return None
    count = math.isqrt(places[0].shape[1]) ** 2  # before them, a class token may have a place
    return kernels[0].flatten(1), places[0][0, -count:]


def patches_to_images(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`(P, C k k)` in rows of places -> `(1, C, H, W)`."""
    side = round((patches.shape[1] / shape[0]) ** 0.5)
    return F.fold(patches.T[None], tuple(shape[1:]), side, stride=side)


def label_of(bias: Tensor) -> int:
    """The label of the only example, from the change of the classifier's bias `(classes,)`."""
    return int(bias.argmin())


def tokens_there(embedding: Tensor) -> Tensor:
    """Ids of the tokens whose rows of an embedding `(vocabulary, width)` have changed."""
    return embedding.abs().sum(1).nonzero().flatten()


def tokens_in_span(change: Tensor, candidates: Callable[[int], Tensor], places: int, rounding: float) -> list[Tensor]:
    """Of each place, the ids of tokens whose input to a layer lies in the rows of its change `(out, in)`.

    An error of norm e turns the rows of singular values above s by an angle whose sine is at most e / s (Wedin 1972):
    that is the tolerance on |x - P x| / |x|, and directions below 2 e are left out. Where the rows span everything, as
    of more tokens than `in`, every token lies in them.

    - `candidates`: the layer's inputs `(vocabulary, in)` at a place. - `rounding`: e, at least 1e-6 of the change.
    """
    _, sizes, rows = torch.linalg.svd(change.double(), full_matrices=False)
    error = max(rounding, 1e-6 * float(sizes[0]))
    rank = int((sizes > 2 * error).sum())
    tolerance = error / float(sizes[rank - 1]) if rank else 0.0

    def there(x: Tensor) -> Tensor:
        inside = (x @ rows[:rank].T).square().sum(1) / x.square().sum(1)
        return (1 - inside < tolerance**2).nonzero().flatten()

    return [there(candidates(place).double()) for place in range(places)]


def rounding_of(weights: Tensor) -> float:
    """Norm, about, of what rounding weights `(out, in)` to float32 adds to them: of independent errors of a standard
    deviation of half a unit in the 24th place, it is that times sqrt(out) + sqrt(in)."""
    rows, columns = weights.shape
    return float(weights.double().square().mean().sqrt()) * 2**-25 * (rows**0.5 + columns**0.5)
