"""Common coordinates for features of strangers' models: a rotation that each fits on public examples, by itself.

    A, B          features of an own model, and of a public one, of the same public examples, (n, d); a, b: their means
    Q = U V^T     U S V^T = (A - a)^T (B - b) + e I;  orthogonal Procrustes (Schönemann, Psychometrika 1966)
    z = (f - a) Q + b      an own feature in the coordinates of the public model

Q is the orthogonal matrix that brings A nearest to B in squares. e, a thousandth of ||A - a|| ||B - b|| / d, says what
it is where public examples say nothing, as they do in some directions when there are fewer than d of them: as it was.

A head that reads z reads f, turned: W z + c = (W Q^T) f + W (b - a Q) + c, so what is deployed is an ordinary model.
A head without a bias cannot hold the last two terms: there, a and b are zeros.
"""

import torch
from torch import Tensor

from fedsim.core.fields import refuse
from fedsim.core.tree import Tree, mapped
from fedsim.data.dataset import Split
from fedsim.data.source import DataConfig
from fedsim.learning.features import features
from fedsim.learning.ridge import in_double
from fedsim.learning.task import Task
from fedsim.models import Form


ROTATION, SHIFT = "rotation", "shift"  # Q, `(d, d)`, and b - a Q, `(d,)`
LITTLE = 1e-3  # what e is of |A - a| |B - b| / d


def procrustes(own_nd: Tensor, public_nd: Tensor, centred: bool = True) -> Tree:
    """`{ROTATION: Q, SHIFT: b - a Q}`, for `z = f Q + shift`; `centred`: False where a and b are to be zeros."""
    d = own_nd.shape[1]
    a, b = (each.mean(0) if centred else each.new_zeros(d) for each in (own_nd, public_nd))
    A, B = own_nd - a, public_nd - b
    little = LITTLE * A.norm() * B.norm() / d
    U, _, Vh = torch.linalg.svd(A.T @ B + little * torch.eye(d, dtype=A.dtype))
    Q = U @ Vh
    return {ROTATION: Q, SHIFT: b - a @ Q}


def unturned(d: int) -> Tree:
    """Features as they are."""
    return {ROTATION: torch.eye(d, dtype=torch.float64), SHIFT: torch.zeros(d, dtype=torch.float64)}


@torch.no_grad()
def features_of(task: Task, form: Form, model: Tree, examples: Split, batch_size: int, device: torch.device) -> Tensor:
    """What the head of a model reads of each example, `(n, d)`; in float64, on the CPU."""
    model = mapped(in_double, model)
    batches = torch.arange(len(examples)).split(batch_size)
    found = [features(task, form, model, mapped(in_double, task.batch(examples, index, device))) for index in batches]
    return torch.cat([each.cpu() for each in found])


def turned_head(head: Tree, turn: Tree) -> Tree:
    """The head, `(classes, d)` and perhaps `(classes,)`, that makes of f what this one makes of z."""
    W = next(tensor for tensor in head.values() if tensor.dim() == 2).double()
    Q, shift = (turn[name].to(W.device) for name in (ROTATION, SHIFT))
    turned = {name: W @ Q.T if old.dim() == 2 else old.double() + W @ shift for name, old in head.items()}
    return {name: turned[name].to(old.dtype).contiguous() for name, old in head.items()}


def check_public(public: DataConfig, task: Task) -> None:
    """**Raises:** `ValueError` unless a model of the task takes these examples, and none of them is a participant's."""
    data = task.config.data
    shape = (
        ("image_size", "channels", "image_mean", "image_std") if data.kind == "image" else ("max_length", "tokenizer")
    )
    for name in ("kind", *shape):
        if getattr(public, name) != getattr(data, name):
            refuse(f"algorithm.align.{name}", getattr(public, name), f"task.data.{name}={getattr(data, name)!r}")
    if public.name == data.name and (public.first or data.skip + 1) > data.skip:
        refuse("algorithm.align.first", public.first, f"at most task.data.skip={data.skip}: later ones are private")
