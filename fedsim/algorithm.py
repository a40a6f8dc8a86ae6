"""The contract between the platform and a federated algorithm.

What runs at the aggregator is named `server_*`, what runs at a participant `client_*`: the signatures say what crosses
the network. An algorithm is a frozen dataclass whose fields are hyperparameters; all state goes in and comes out as
trees. A client asks for its local training instead of doing it, `trained = yield Training(...)`, so that the simulator
may train one client after another or many as one. FedAvg's client, whole:

    def client_update(self, payload, state, ctx):
        trained = yield Training(TaskLoss(ctx.task, ctx.target), payload, purpose="target", **self.settings())
        return ClientUpdate(ctx.info.id, trained.parameters, ctx.info.num_examples), state

The smallest algorithm there is, federated averaging of a single number, trains nothing and returns at once:

    >>> import dataclasses, torch
    >>> from fedsim.algorithm import Algorithm, ClientUpdate, weighted_mean
    >>> @dataclasses.dataclass(frozen=True)
    ... class AverageOfMeans(Algorithm):
    ...     name = "average_of_means"
    ...     def server_init(self, ctx): return {"mean": torch.zeros(())}
    ...     def server_broadcast(self, state, cohort, ctx): return {client.id: state for client in cohort}
    ...     def server_aggregate(self, state, updates, ctx): return weighted_mean(updates, state)
    ...     def client_update(self, payload, state, ctx):
    ...         mean = ctx.train.labels.float().mean()
    ...         return ClientUpdate(ctx.info.id, {"mean": mean}, weight=ctx.info.num_examples), state
    ...     def client_model(self, payload, state, ctx): raise NotImplementedError("a number is no model")
    >>> updates = [ClientUpdate(0, {"mean": torch.tensor(1.0)}, 1), ClientUpdate(1, {"mean": torch.tensor(4.0)}, 2)]
    >>> AverageOfMeans().server_aggregate({"mean": torch.zeros(())}, iter(updates), None)
    {'mean': tensor(3.)}
"""

import abc
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.contexts import ClientContext, ClientInfo, Payload, ServerContext
from fedsim.core.fields import check_range, check_types
from fedsim.core.tree import State, Tree
from fedsim.core.updates import (
    PRIVATE,
    ClientUpdate,
    Leaves,
    Partial,
    Trainings,
    weighted_mean,
    weighted_sum,
    whole_sum,
)
from fedsim.learning.objectives import Frozen, Objective, TaskLoss
from fedsim.learning.server_opt import AVERAGE, ServerOptimizer, model_of
from fedsim.learning.steps import Steps
from fedsim.learning.task import Batch
from fedsim.learning.training import OptimizerName, ScheduleName, Trained, Training, check_settings


if TYPE_CHECKING:
    from torch import nn

    from fedsim.data.source import Split
    from fedsim.learning.task import Task
    from fedsim.models import Form

__all__ = [
    "AVERAGE",
    "LATER",
    "PRIVATE",
    "Algorithm",
    "Averaging",
    "Batch",
    "ClientContext",
    "ClientInfo",
    "ClientUpdate",
    "Frozen",
    "Leaves",
    "LocalTraining",
    "Objective",
    "OptimizerName",
    "Partial",
    "Payload",
    "ServerContext",
    "ServerOptimizer",
    "State",
    "Steps",
    "TaskLoss",
    "Trained",
    "Training",
    "Trainings",
    "Tree",
    "model_of",
    "weighted_mean",
    "weighted_sum",
    "whole_sum",
]


class Algorithm(abc.ABC):
    """A federated algorithm. Concrete classes are frozen dataclasses and are never subclassed."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What `--only` and the `algorithm` column call it."""

    @property
    def preset_name(self) -> str:
        """The growth preset, for the `preset` column; empty where nothing is grown."""
        return ""

    @property
    def leaves(self) -> Leaves:
        """What leaves a participant; tables keep methods apart by it. A method that says nothing lets a model leave."""
        return "model"

    def check(self, task: "Task", forms: Sequence["Form"], intermediate: "Form | None", target: "Form") -> None:
        """Refuse, with a `ValueError`, forms this algorithm cannot work with. Called before anything starts.

        `intermediate` is None where the experiment has none: a method that works with it refuses that.
        """
        return None

    def check_cohort(self, participants: int, updates: Sequence[ClientUpdate] = ()) -> None:
        """Refuse, with a `ValueError`, so many participants a round. Called before anything starts, and once more with
        what a client of each tier sends, without data, when that is counted."""
        return None

    def check_experiment(self, experiment: Any) -> None:
        """Refuse, with a `ValueError`, an `Experiment` this algorithm cannot work in. Called before anything starts."""
        return None

    def spent(self, experiment: Any, round: int, trained: Collection[Trainings] = ()) -> Mapping[str, float]:
        """What of privacy an `Experiment` has spent after a round: `epsilon`, `delta` and `noise_multiplier`; nothing
        where nothing is promised. `trained`: of each participant whose updates were asked for."""
        return {}

    @property
    def updates_vary(self) -> bool:
        """Whether the names, shapes and dtypes of an update depend on data, as where clients send a prototype of every
        class they hold. Where not, an update that looks unlike what a client of its tier sends without data is refused.
        """
        return False

    @property
    def sends_statistics(self) -> bool:
        """Whether more of the data is in what is sent, or in how it is trained, than steps on examples put there: class
        means or counts, sums over features, which labels a shard has. Private steps do not protect it."""
        return self.leaves == "statistics"

    def stage(self, round: int) -> str:
        """What the `stage` column calls a round after round 0: "federated", or "finetune" or "local" where nothing is
        shared. Costs are those of the last "federated" one."""
        return "federated"

    # at the aggregator ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def server_init(self, ctx: ServerContext) -> State:
        """The server's state before round 1."""

    def server_begin(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> State:
        """The state that a round goes on from, where its cohort has to be asked something first."""
        return state

    @abc.abstractmethod
    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        """What each of these clients downloads. Give several clients the same object and it is put only once.

        Called for the cohort before it trains, and again, with the next state, for those who are then scored (in round
        0 as well): its result depends on its arguments alone.
        """

    @abc.abstractmethod
    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        """The next state. `updates` is an iterator in cohort order: consume it, do not collect it."""

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        """A sum over a fixed chunk of consecutive clients; None: pass the updates through.

        It runs on the host that holds these clients. The server then gets a `Partial`, which names no client.
        """
        return None

    def server_model(self, state: State, ctx: ServerContext) -> "nn.Module | None":
        """The server's own model; None where there is no global model."""
        return None

    def server_covered(self, state: State) -> Tree | None:
        """Which coordinates of the target were trained so far, of bools; None where all are, in every round."""
        return None

    # at a participant -----------------------------------------------------------------------------------------------

    def client_init(self, ctx: ClientContext) -> Steps[State] | State:
        """The client's private state, made when it first takes part. It never leaves the participant."""
        return {}

    @abc.abstractmethod
    def client_update(
        self, payload: Payload, state: State, ctx: ClientContext
    ) -> Steps[tuple[ClientUpdate, State]] | tuple[ClientUpdate, State]:
        """Local work of one round: the update to upload and the next private state. Must not write into arguments."""

    @abc.abstractmethod
    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> "nn.Module":
        """What this client would deploy: the model that is scored. `payload`: what the server then sends."""

    def client_scores(self, model: "nn.Module", test: "Split", ctx: ClientContext) -> Mapping[str, float]:
        """More numbers about that model, for the column `metrics`. `test`: the global test set."""
        return {}

    def client_answer(self, question: Payload, state: State, ctx: ClientContext) -> State:
        """What a client answers to `ServerContext.ask`. Depends on its arguments alone; `state` stays as it is."""
        raise NotImplementedError(f"{self.name} asks its clients nothing")


# Marks a field that came after runs had been recorded: their identity leaves it out while it has its default.
LATER: Any = {"later": True}


@dataclasses.dataclass(frozen=True)
class LocalTraining(Algorithm):
    """What methods whose clients train have in common: these fields, as `Training` takes them.

    - `lr`: learning rate. - `epochs`: local epochs a round. - `batch_size`: examples a step.
    - `weight_decay`: decoupled with AdamW, in the gradient with SGD. - `clip`: largest global norm of the gradient.
    - `optimizer`: "adamw" or "sgd", made anew in every round. - `momentum`, `nesterov`: of SGD.
    - `schedule`: of the learning rate over a round's steps: "constant", or to 0 along a "cosine" or "linear".
    - `lr_warmup`: the share of a round's steps, at least two, over which the learning rate first rises.
    - `accumulate`: batches a step. - `drop_last`: leave out the examples that fill no batch at the end of an epoch; a
      shard smaller than a batch stays one.
    """

    lr: float = 5e-4
    epochs: int = 1
    batch_size: int = 64
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer: OptimizerName = dataclasses.field(default="adamw", metadata=LATER, kw_only=True)
    momentum: float = dataclasses.field(default=0.0, metadata=LATER, kw_only=True)
    nesterov: bool = dataclasses.field(default=False, metadata=LATER, kw_only=True)
    schedule: ScheduleName = dataclasses.field(default="constant", metadata=LATER, kw_only=True)
    lr_warmup: float = dataclasses.field(default=0.0, metadata=LATER, kw_only=True)
    accumulate: int = dataclasses.field(default=1, metadata=LATER, kw_only=True)
    drop_last: bool = dataclasses.field(default=False, metadata=LATER, kw_only=True)

    def __post_init__(self) -> None:
        check_types(self, "algorithm")
        check_settings(self, "algorithm")
        check_range(self, "algorithm", "epochs", least=1)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """These fields by name, as `Training` takes them, some of them changed."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LocalTraining)} | changes


@dataclasses.dataclass(frozen=True)
class Averaging(LocalTraining):
    """What methods have in common whose server holds a model, the target, and steps to the mean of what clients send.

    - `server`: what the server makes of the mean (`fedsim.learning.server_opt`).
    """

    server: ServerOptimizer = dataclasses.field(default=AVERAGE, kw_only=True)

    def server_init(self, ctx: ServerContext) -> State:
        return self.server.start(ctx.initial(ctx.target))

    def server_broadcast(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        model = model_of(state)
        return {client.id: model for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: State, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> State:
        return self.server.after(state, updates)

    def server_model(self, state: State, ctx: ServerContext) -> "nn.Module | None":
        return ctx.task.module(ctx.target, model_of(state))

    def client_model(self, payload: Payload, state: State, ctx: ClientContext) -> "nn.Module":
        return ctx.task.module(ctx.target, payload)
