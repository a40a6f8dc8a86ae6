"""What a method's functions may read: who the clients are, which round it is, random streams, models to begin with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedsim.core.seeding import derive, generator
from fedsim.core.tree import State, Tree
from fedsim.data.source import load
from fedsim.learning.starts import initial


if TYPE_CHECKING:
    from fedsim.data.source import DataConfig, Split
    from fedsim.learning.meter import Meter
    from fedsim.learning.starts import Start
    from fedsim.learning.task import Task
    from fedsim.models import Form
    from fedsim.models.checkpoint import Checkpoint


Payload = Mapping[str, Any]  # a state, as it is sent
Ask = Callable[[Mapping[int, Payload]], Mapping[int, State]]  # questions by client -> answers of those who gave one


@dataclasses.dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client. `form` is the client's own small model's; `tier` its class of device.

    `checkpoint`: the pretrained model the client starts from; None: it trains one on its own shard.
    """

    id: int
    tier: str
    form: "Form"
    num_examples: int
    checkpoint: "Checkpoint | None" = None


@dataclasses.dataclass(frozen=True)
class ServerContext:
    """What a `server_*` method may read. `clients` is the whole population, in order of id.

    `start`: a public model that everyone may begin with. `ask`: a further exchange with clients within a round, in
    `server_begin` and, once all updates are read, in `server_aggregate`: they answer by `client_answer`. None: there is
    nobody to ask, as a run is only being counted.
    """

    seed: int
    round: int
    task: "Task"
    intermediate: "Form"
    target: "Form"
    clients: Sequence[ClientInfo]
    start: "Start | None" = None
    ask: Ask | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """The server's random stream for one purpose in this round."""
        return generator(self.seed, purpose, self.round)

    def derive(self, purpose: str) -> int:
        """The seed of that stream, for code that draws from torch's global stream."""
        return derive(self.seed, purpose, self.round)

    @property
    def small_forms(self) -> Sequence["Form"]:
        """The clients' small forms."""
        return [client.form for client in self.clients]

    def initial(self, form: "Form", purpose: str = "target") -> Tree:
        """A model of this form that everyone begins with: public, if the experiment says so, or drawn from the seed."""
        return initial(self, form, purpose)


@dataclasses.dataclass(frozen=True)
class ClientContext:
    """What a `client_*` method may read.

    - `round`: 0 in `client_init`, whenever that happens to be called.
    - `train`: the training part of the client's own shard; empty when the run is only being counted.
    - `meter`: where training notes what it did; algorithms never look.
    - `precision`: "fp32", or "bf16": forward passes in training run under autocast; weights stay fp32.
    - `forms`: the clients' small forms, one a tier; empty stands for the client's own.
    - `start`: a public model that everyone may begin with.
    - `data_dir`: where data that a method itself names are looked up, by `examples`.
    """

    seed: int
    round: int
    task: "Task"
    intermediate: "Form"
    target: "Form"
    info: ClientInfo
    train: "Split"
    device: torch.device
    meter: "Meter"
    precision: str = "fp32"
    forms: tuple["Form", ...] = ()
    start: "Start | None" = None
    data_dir: str | None = None

    def examples(self, data: "DataConfig") -> "Split":
        """The training examples of public data, which a method names in a field of its own."""
        return load(data, self.data_dir).train

    def generator(self, purpose: str) -> torch.Generator:
        """This client's random stream for one purpose in this round."""
        return generator(self.seed, purpose, self.round, self.info.id)

    def derive(self, purpose: str) -> int:
        """The seed of that stream, for code that draws from torch's global stream."""
        return derive(self.seed, purpose, self.round, self.info.id)

    @property
    def small_forms(self) -> Sequence["Form"]:
        """The clients' small forms, as the server knows them."""
        return self.forms or [self.info.form]

    def initial(self, form: "Form", purpose: str = "target") -> Tree:
        """The model of this form that everyone begins with, as the server has it; what is public is downloaded once."""
        if self.start is not None:
            self.meter.downloads.update(self.start.downloads(self.task, form))
        return initial(self, form, purpose)
