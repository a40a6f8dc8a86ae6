"""What the participants of one process share within a call."""

import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from fedsim.algorithm import Payload
from fedsim.core import tree as trees
from fedsim.core.tree import State
from fedsim.learning.task import Score


DISTINCT = 8  # payloads of a call of which copies are held


class Inbox:
    """What the participants that share it have received: a copy of each payload, which is lent to all who were sent it;
    and the scores of the models that they deploy.

    Nobody ever writes into what was sent, nor sees what another one wrote.
    """

    def __init__(self) -> None:
        self.call: tuple[str, int] | None = None
        self.copies: dict[tuple[int, torch.device], tuple[Payload, State]] = {}
        self.scores: dict[str, Score] = {}

    def copy_of(self, payload: Payload, device: torch.device, call: tuple[str, int]) -> State:
        """A payload on a device. Copies are held as long as the same `call` (method and round) lasts."""
        if call != self.call:
            self.copies.clear()
            self.scores.clear()
            self.call = call
        sent, copy = self.copies.get((id(payload), device), ({}, {}))
        if sent is payload:
            return trees.lent(copy)
        copy = trees.to(trees.clone(payload), device)
        if len(self.copies) < DISTINCT:
            self.copies[id(payload), device] = (payload, copy)
        return trees.lent(copy)

    def once(self, model: torch.nn.Module, score: Callable[[], Score]) -> Score:
        """The score of a model; the same again if it is the same to the bit, as all are that deploy the server's.

        What a model is, is what it is pickled to: a pass over the test set takes a thousand times as long as that.
        """
        pickled = io.BytesIO()
        try:
            _ByContent(pickled).dump(model)
        except Exception:  # of any kind: models need not be made to be pickled, nor of tensors whose bits say it all
            return score()
        key = hashlib.sha256(pickled.getbuffer()).hexdigest()
        if key not in self.scores:
            self.scores[key] = score()
        return self.scores[key]


class _ByContent(pickle.Pickler):
    """Writes the hash of a tensor in its place: what torch writes names the memory that it lies in."""

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, torch.Tensor):
            return None
        plain = type(obj) in (torch.Tensor, torch.nn.Parameter) and obj.layout is torch.strided
        if not plain or obj.is_quantized or vars(obj):
            raise TypeError(f"a {type(obj).__name__} may be more than its bits")
        return trees.sha256({"": obj})
