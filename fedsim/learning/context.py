"""What local training reads of a client's context."""

from typing import Any, Protocol

import torch

from fedsim.data.dataset import Split
from fedsim.learning.task import Task
from fedsim.models import Form


class LocalContext(Protocol):
    """What local training reads of a client's context (`fedsim.algorithm.ClientContext`)."""

    @property
    def task(self) -> Task: ...
    @property
    def intermediate(self) -> Form: ...
    @property
    def target(self) -> Form: ...
    @property
    def train(self) -> Split: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def meter(self) -> Any: ...  # a `Meter`, which notes what is done
    @property
    def precision(self) -> str: ...
    def generator(self, purpose: str) -> torch.Generator: ...
