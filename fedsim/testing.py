"""A federation in three lines, for tests of methods and of families.

    >>> from baselines.fedavg import FedAvg
    >>> federation = Federation(FedAvg(lr=1e-2, epochs=1, batch_size=8))
    >>> federation.run(round=1)[0].weight
    6

Everything happens in this process, at once, on tensors that a test can hold against numbers of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate, Payload, ServerContext
from fedsim.core.tree import State, clone, ordered
from fedsim.data.config import digits
from fedsim.data.dataset import Split
from fedsim.learning.meter import Meter
from fedsim.learning.starts import Start
from fedsim.learning.steps import Asking, asking, run_alone, run_client
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import Form


SMALL, MIDDLE, TARGET = (Form(*size, heads=2) for size in ((8, 1), (12, 2), (16, 4)))
SIZES = (6, 12, 18)


class Federation:
    """Clients and a server in one place. As on the platform, what is received, sent and kept is copied.

    **Arguments:**

    - `algorithm`: the method.
    - `forms`: of the clients' small models. - `intermediate`, `target`: the two larger forms.
    - `sizes`: examples of each client, taken one after another from the training set of `task`; digits by default.
    - `shards`: the clients' data, instead.
    - `start`: a public model that everyone may begin with.

    `server`: the server's state; a test may put another there. `private`: the clients' states, as far as there are any.
    `work`: the accounts of each client's last call; `deployed` is one.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        forms: Sequence[Form] = (SMALL,) * len(SIZES),
        target: Form = TARGET,
        intermediate: Form = MIDDLE,
        sizes: Sequence[int] = SIZES,
        task: Task | None = None,
        shards: Sequence[Split] | None = None,
        seed: int = 0,
        start: Start | None = None,
    ) -> None:
        self.algorithm, self.target, self.intermediate, self.seed = algorithm, target, intermediate, seed
        self.start = start
        self.task = task or load_task(TaskConfig(digits(limit=sum(sizes)), patch_size=4), None)
        self.shards = shards or self._dealt(sizes)
        self.clients = [
            ClientInfo(id_, "phone", form, len(shard.labels))
            for id_, (form, shard) in enumerate(zip(forms, self.shards, strict=True))
        ]
        algorithm.check(self.task, forms, intermediate, target)
        algorithm.check_cohort(len(self.clients))
        self.server = ordered(algorithm.server_init(self.at_server(0)))
        self.private: dict[int, State] = {}
        self.work: dict[int, Meter] = {}

    def _dealt(self, sizes: Sequence[int]) -> list[Split]:
        assert self.task.dataset is not None
        index = torch.arange(sum(sizes)).split(list(sizes))
        return [self.task.dataset.train.select(part.numpy()) for part in index]

    # contexts -------------------------------------------------------------------------------------------------------

    def at_server(self, round: int) -> ServerContext:
        ask = functools.partial(self.ask, round)
        return ServerContext(self.seed, round, self.task, self.intermediate, self.target, self.clients, self.start, ask)

    def at_client(self, round: int, client: int, device: str = "cpu", empty: bool = False) -> ClientContext:
        """A client's context; `empty`: without data, as where a run is only being counted."""
        self.work[client] = Meter({})
        return ClientContext(
            seed=self.seed,
            round=round,
            task=self.task,
            intermediate=self.intermediate,
            target=self.target,
            info=self.clients[client],
            train=Split({}, torch.zeros(0, dtype=torch.long)) if empty else self.shards[client],
            device=torch.device(device),
            meter=self.work[client],
            forms=tuple({info.form: None for info in self.clients}),
            start=self.start,
        )

    # calls ----------------------------------------------------------------------------------------------------------

    def state(self, client: int) -> State:
        """A client's private state."""
        if client not in self.private:
            context = self.at_client(0, client)
            self.private[client] = clone(run_client(context, self.algorithm.client_init(context)))
        return self.private[client]

    def ask(self, round: int, questions: Mapping[int, Payload]) -> dict[int, State]:
        """What clients answer within a round."""
        return {
            client: clone(
                self.algorithm.client_answer(clone(question), self.state(client), self.at_client(round, client))
            )
            for client, question in questions.items()
        }

    def payload(self, round: int, client: int) -> State:
        """What a client downloads."""
        sent = self.algorithm.server_broadcast(self.server, [self.clients[client]], self.at_server(round))
        return clone(sent[client])

    def update(self, round: int, client: int) -> ClientUpdate:
        """What a client uploads; its private state moves on."""
        return run_alone(self.updating(round, client))

    def updating(self, round: int, client: int) -> Asking[ClientUpdate]:
        """`update`, whose trainings somebody else computes (`fedsim.learning.steps.run_batched`)."""
        if client not in self.private:
            context = self.at_client(0, client)
            self.private[client] = clone((yield from asking(context, self.algorithm.client_init(context))))
        state, context = self.private[client], self.at_client(round, client)
        payload = self.payload(round, client)
        found: Any = yield from asking(context, self.algorithm.client_update(payload, state, context))
        update, kept = found
        self.private[client] = clone(kept)
        return dataclasses.replace(update, tree=clone(update.tree))

    def aggregate(self, round: int, updates: Sequence[ClientUpdate], chunk: int = 2) -> State:
        """The server's next state; as on the platform, updates are first added up in chunks, where they can be."""
        arriving: list[Any] = []
        for start in range(0, len(updates), chunk):
            part = list(updates[start : start + chunk])
            combined = self.algorithm.combine(part)
            arriving += part if combined is None else [combined]
        return ordered(self.algorithm.server_aggregate(self.server, iter(arriving), self.at_server(round)))

    def run(self, round: int, cohort: Sequence[int] | None = None) -> list[ClientUpdate]:
        """One round, of all clients by default; what was sent to the server."""
        cohort = range(len(self.clients)) if cohort is None else cohort
        asked = [self.clients[client] for client in cohort]
        self.server = self.algorithm.server_begin(self.server, asked, self.at_server(round))
        updates = [self.update(round, client) for client in cohort]
        self.server = self.aggregate(round, updates)
        return updates

    # models ---------------------------------------------------------------------------------------------------------

    def deployed(self, round: int, client: int) -> nn.Module:
        """What a client would deploy after a round."""
        context = self.at_client(round, client)
        return self.algorithm.client_model(self.payload(round, client), self.state(client), context)

    def served(self, round: int) -> nn.Module:
        """The server's own model after a round."""
        model = self.algorithm.server_model(self.server, self.at_server(round))
        assert model is not None, f"{self.algorithm.name} has no global model"
        return model

    @functools.cached_property
    def pixels(self) -> Tensor:
        """Ten images nobody trains on."""
        assert self.task.dataset is not None
        return self.task.batch(self.task.dataset.test, torch.arange(10))["pixel_values"]
