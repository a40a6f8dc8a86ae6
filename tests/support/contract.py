"""The contract's table: a row for each method, and the row brought to life."""

import dataclasses
import functools
from typing import Any

import torch

from baselines.analytic import Analytic
from baselines.depthfl import DepthFL
from baselines.ensemble_small import EnsembleSmall
from baselines.exclusive import Exclusive
from baselines.fedavg import FedAvg, fedavg_mid, fedavg_small, fedprox
from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedgh import FedGH
from baselines.fedkd import FedKD
from baselines.fedmrl import FedMRL
from baselines.fednova import FedNova
from baselines.fedproto import FedProto
from baselines.fedrolex import FedRolex
from baselines.fedsb import FedSB
from baselines.fedtgp import FedTGP
from baselines.fjord import FjORD
from baselines.flora import FLoRA
from baselines.grow_then_fedavg import GrowThenFedAvg
from baselines.heterofl import HeteroFL, heterofl_clean
from baselines.lg_fedavg import LGFedAvg
from baselines.local_only import LocalOnly
from baselines.lora import fedit, ffa_lora, hetlora
from baselines.progfed import ProgFed
from baselines.scaffold import Scaffold
from fedgrow_algo.analytic import FedGrowAnalytic
from fedgrow_algo.anchored import FedGrowAnchored
from fedgrow_algo.core import FedGrowCore
from fedgrow_algo.fedgrow import FedGrow, fedgrow_no_federation
from fedgrow_algo.fused import FedGrowFused
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.matched import FedGrowMatched
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate, ServerContext
from fedsim.core.tree import State, clone
from fedsim.data.config import digits, pydoc
from fedsim.data.dataset import Split
from fedsim.experiment import Experiment, Tier
from fedsim.learning.meter import Meter, StepCost
from fedsim.learning.rates import rate_of, sub_form
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import Form
from tests.support.clients import client_init, client_update


SEED, CLIENTS = 3, 2
SMALL, INTERMEDIATE, TARGET = Form(8, 1, heads=2), Form(12, 1, heads=2), Form(16, 2, heads=2)
ROTARY = Form(8, 1, heads=2), Form(12, 1, heads=3, head_dim=4), Form(16, 2, heads=4, head_dim=4)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is learned, by which family, and the forms: small, intermediate, target."""

    config: TaskConfig
    forms: tuple[Form, Form, Form] = (SMALL, INTERMEDIATE, TARGET)


TASKS = {
    "vit/digits": Setting(TaskConfig(digits(limit=64), patch_size=4)),
    "gpt2/pydoc": Setting(TaskConfig(pydoc(limit=64, max_length=12), family="gpt2")),
    "bert/pydoc": Setting(TaskConfig(pydoc(limit=64, max_length=12, objective="masked_token"), family="bert")),
    "llama/pydoc": Setting(TaskConfig(pydoc(limit=64, max_length=12), family="llama"), ROTARY),
}
ROUNDS: dict[str, Any] = {
    "lr": 1e-2,
    "epochs": 2,
    "small_lr": 1e-2,
    "small_epochs": 2,
    "local_lr": 1e-2,
    "batch_size": 8,
}
GROWTH: dict[str, Any] = ROUNDS | {"local_epochs": 2}
SLOW = 16  # rounds: an operator's gradients are small at first, and which way it goes depends on the last bits


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, what it uploads, and what else tells it from others.

    - `uploads`: "model" (the one that is deployed), "operator", "residual operator" (its maps of that axis alone),
        "operator and class means", "operator and sums", "everything", "nothing", "adapters", or "more": the deployed
        model and what comes on top, which the method's own tests look at.
    - `deploys`, `serves`: the forms of a participant's model, and of the server's; None: none.
    - `drawn`: whether the server's first state depends on the seed; prototypes that nobody has sent yet do not.
    - `first_mean`: before round 1 there is nothing to send; the first round averages what each client made alone.
    - `combines`: whether updates can be added up where they are. - `by_examples`: whether examples weight them.
    - `one_payload`: whether clients of one form receive the same. - `same_start`: whether private states begin alike.
    - `keeps_shapes`: whether the server's state has the same shapes after a round.
    - `fixed_point`: whether nothing changes where nothing is learned.
    - `reveals`: whether an update tells what its client keeps: SCAFFOLD's says how the control variate changed.
    - `trains`: whether clients take steps; if not, nothing is drawn but the model, and every round gives the same.
    - `rounds`: after how many the loss has fallen, whatever the rounding; more than it takes windows to come round
        again.
    """

    algorithm: Algorithm
    uploads: str
    deploys: str = "target"
    serves: str | None = None
    drawn: bool = True
    first_mean: bool = False
    combines: bool = True
    by_examples: bool = True
    one_payload: bool = True
    same_start: bool = False
    keeps_shapes: bool = True
    fixed_point: bool = True
    reveals: bool = False
    trains: bool = True
    rounds: int = 5


def partial(algorithm: Algorithm, uploads: str = "model", **more: Any) -> Row:
    """A method of partial training: sub-models of the target."""
    return Row(algorithm, uploads, deploys="sub", serves="target", combines=False, **more)


LOCAL: dict[str, Any] = {"lr": 1e-2, "epochs": 2, "batch_size": 8}
HALVES: dict[str, Any] = LOCAL | {"rates": (1.0, 0.5)}  # a quarter of these targets is too small to learn anything
ROLLING: dict[str, Any] = HALVES | {"epochs": 4}
ADAPTERS: dict[str, Any] = LOCAL | {"rank": 2, "alpha": 4.0}

PROTOTYPES: dict[str, Any] = {"uploads": "more", "deploys": "small", "combines": False, "fixed_point": False} | {
    "same_start": True,
    "rounds": SLOW,
}


METHODS = {
    "fedgrow-paper": Row(FedGrow(preset="paper", **GROWTH), "operator", rounds=SLOW),
    "fedgrow-preserving": Row(FedGrow(preset="preserving", **GROWTH), "operator", rounds=SLOW),
    "fedgrow_lowrank-preserving": Row(FedGrow(preset="preserving", rank=2, **GROWTH), "operator", rounds=SLOW),
    "fedgrow_residual-paper": Row(FedGrowResidual(preset="paper", **GROWTH), "residual operator", rounds=SLOW),
    "fedgrow_anchored-paper": Row(
        FedGrowAnchored(preset="paper", **ROUNDS), "operator and class means", fixed_point=False, rounds=SLOW
    ),
    "fedgrow_matched-paper": Row(FedGrowMatched(preset="paper", **GROWTH), "operator", rounds=SLOW),
    "fedgrow_joint-paper": Row(FedGrowJoint(preset="paper", **ROUNDS), "operator", rounds=SLOW),
    "fedgrow_no_federation-paper": Row(
        fedgrow_no_federation(preset="paper", **GROWTH), "nothing", combines=False, rounds=SLOW
    ),
    "fedgrow_no_federation-preserving": Row(
        fedgrow_no_federation(preset="preserving", **GROWTH), "nothing", combines=False, rounds=SLOW
    ),
    "fedgrow_released_code-paper": Row(
        FedGrowReleasedCode(preset="paper", **GROWTH), "everything", serves="target", first_mean=True, rounds=SLOW
    ),
    "fedgrow_analytic-preserving": Row(
        FedGrowAnalytic(preset="preserving", rank=2, **GROWTH), "operator and sums", rounds=SLOW
    ),
    "fedgrow_core-preserving": Row(
        FedGrowCore(preset="preserving", rank=2, **LOCAL), "adapters", serves="target", same_start=True, rounds=SLOW
    ),
    "fedgrow_core_warm-preserving": Row(
        FedGrowCore(preset="preserving", rank=2, warm_rounds=2, **LOCAL), "model", deploys="small", serves="small"
    ),
    "fedgrow_fused-preserving": Row(
        FedGrowFused(preset="preserving", rank=2, **GROWTH), "operator", deploys="gated", rounds=SLOW
    ),
    "fedavg": Row(FedAvg(**LOCAL), "model", serves="target"),
    "fedavg_small": Row(fedavg_small(**LOCAL), "model", deploys="small", serves="small"),
    "fedavg_mid": Row(fedavg_mid(**LOCAL), "model", deploys="intermediate", serves="intermediate"),
    "fedprox": Row(fedprox(**LOCAL), "model", serves="target"),
    "scaffold": Row(
        Scaffold(**dict(LOCAL, lr=0.5)), "more", serves="target", same_start=True, by_examples=False, reveals=True
    ),
    "fednova": Row(FedNova(**dict(LOCAL, lr=0.5)), "more", serves="target"),
    "heterofl": partial(HeteroFL(**HALVES), "more", by_examples=False),
    "heterofl_clean": partial(heterofl_clean(**HALVES)),
    "fedrolex": partial(FedRolex(**HALVES), by_examples=False),
    "fjord": partial(FjORD(**HALVES)),
    "federated_dropout": partial(FederatedDropout(**HALVES), one_payload=False, rounds=9),
    "fedbrb_like": partial(FedBRBLike(broadcast=0.0, **ROLLING), rounds=9),
    "depthfl": Row(DepthFL(exits=2, **LOCAL), "more", deploys="half as deep", serves="target", combines=False),
    "progfed": Row(ProgFed(stages=2, **LOCAL), "model", deploys="half as deep", serves="half as deep"),
    "grow_then_fedavg-preserving": Row(
        GrowThenFedAvg(preset="preserving", **LOCAL), "model", deploys="small", serves="small"
    ),
    "exclusive": Row(Exclusive(share=0.01, **LOCAL), "model", serves="target"),
    "ensemble_small": Row(EnsembleSmall(members=2, **LOCAL), "more", deploys="2 small", serves="2 small"),
    "local_only": Row(LocalOnly(**LOCAL), "nothing", deploys="small", combines=False),
    "lg_fedavg": Row(LGFedAvg(**LOCAL), "more", deploys="small", same_start=True),
    # The losses of the next two rise in round 2, when there are prototypes; FedGH's header is the server's.
    "fedproto": Row(FedProto(**LOCAL), drawn=False, **PROTOTYPES),
    "fedtgp": Row(FedTGP(**LOCAL), **PROTOTYPES),
    "fedgh": Row(FedGH(**LOCAL), **PROTOTYPES),
    "fedit": Row(fedit(**ADAPTERS), "adapters", serves="target", same_start=True),
    "ffa_lora": Row(ffa_lora(**ADAPTERS), "adapters", serves="target", same_start=True),
    "flora": Row(FLoRA(**ADAPTERS), "adapters", serves="target", same_start=True, combines=False, keeps_shapes=False),
    "hetlora": Row(
        hetlora(**ADAPTERS), "adapters", serves="target", same_start=True, by_examples=False, fixed_point=False
    ),
    "fedsb": Row(FedSB(rank=2, **LOCAL), "adapters", serves="target", same_start=True),
    "analytic": Row(
        Analytic(), "more", serves="target", combines=False, same_start=True, fixed_point=False, trains=False
    ),
    "fedkd": Row(FedKD(**LOCAL), "model", deploys="small", serves="small", same_start=True),
    "fedmrl": Row(FedMRL(**LOCAL), "more", deploys="spliced", same_start=True),
}
ALSO = {"fedgrow_joint-preserving": Row(FedGrowJoint(preset="preserving", **ROUNDS), "operator")}  # not in every family
BASELINES = tuple(name for name in METHODS if not name.startswith("fedgrow"))
CLASSES_ONLY = "fedgrow_analytic-preserving", "fedgrow_anchored-paper"
OTHER_FAMILIES = {
    "gpt2/pydoc": (
        *(name for name in METHODS if name not in {*BASELINES, *CLASSES_ONLY}),
        "fedavg",
        "heterofl",
        "fedbrb_like",
        "flora",
    ),
    "bert/pydoc": ("fedgrow-paper", "fedavg", "fedrolex", "fjord", "depthfl", "fedit", "ensemble_small", "fedsb"),
    "llama/pydoc": (
        *("fedgrow_joint-preserving", "fedavg", "federated_dropout", "progfed", "hetlora", "local_only", "fedkd"),
    ),
}
TABLE = [(method, task) for task in TASKS for method in OTHER_FAMILIES.get(task, METHODS)]
PROMISED_NAMES = {
    "fedgrow",
    "fedgrow_lowrank",
    "fedgrow_residual",
    "fedgrow_anchored",
    "fedgrow_matched",
    "fedgrow_joint",
    "fedgrow_no_federation",
    "fedgrow_released_code",
    "fedgrow_analytic",
    "fedgrow_core",
    "fedgrow_core_warm",
    "fedgrow_fused",
    "fedavg",
    "fedavg_small",
    "fedavg_mid",
    "fedprox",
    "scaffold",
    "fednova",
    "heterofl",
    "heterofl_clean",
    "fedrolex",
    "fjord",
    "federated_dropout",
    "fedbrb_like",
    "depthfl",
    "progfed",
    "grow_then_fedavg",
    "exclusive",
    "ensemble_small",
    "local_only",
    "lg_fedavg",
    "fedproto",
    "fedtgp",
    "fedgh",
    "fedit",
    "ffa_lora",
    "flora",
    "hetlora",
    "fedsb",
    "analytic",
    "fedkd",
    "fedmrl",
}


@dataclasses.dataclass
class Case:
    """One row brought to life: its contexts, and its states before round 1 (or after the first mean).

    `counted` and `predicted`: costs of training steps, as participants measure them and as `cost_of` does.
    """

    row: Row
    setting: Setting
    counted: dict[tuple, StepCost]
    predicted: dict[tuple, StepCost]

    @property
    def algorithm(self) -> Algorithm:
        return self.row.algorithm

    @property
    def target(self) -> Form:
        return self.setting.forms[2]

    @property
    def forms(self) -> dict[str, Form]:
        """What rows call forms by."""
        small, intermediate, target = self.setting.forms
        return {
            "small": small,
            "intermediate": intermediate,
            "target": target,
            "half as deep": dataclasses.replace(target, depth=target.depth // 2),
            "sub": sub_form(self.task, target, rate_of(self.task, target, small, HALVES["rates"])),
        }

    def shapes(self, of: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a model of one of `forms`, or of several of them."""
        if of == "2 small":
            return {f"members.{m}.{name}": shape for m in (0, 1) for name, shape in self.shapes("small").items()}
        if of == "gated":
            parts = {"shared": self.shapes("target"), "own": self.shapes("small")}
            return {f"{part}.{n}": shape for part, tree in parts.items() for n, shape in tree.items()} | {"gate": ()}
        if of == "spliced":  # two bodies, one head
            small = self.shapes("small")
            body = {name: shape for name, shape in small.items() if not name.startswith("classifier")}
            head = {f"head.{part}": small[f"classifier.{part}"] for part in ("weight", "bias")}
            bodies = {f"{part}.{name}": shape for part in ("common", "own") for name, shape in body.items()}
            width = self.forms["small"].width
            return bodies | head | {"projection.weight": (width, 2 * width), "projection.bias": (width,)}
        return {name: tuple(tensor.shape) for name, tensor in self.task.fresh(self.forms[of], 0).items()}

    @functools.cached_property
    def task(self) -> Task:
        return load_task(self.setting.config, None)

    @functools.cached_property
    def clients(self) -> list[ClientInfo]:
        small = self.setting.forms[0]
        return [ClientInfo(id_, "phone", small, len(self.shard(id_))) for id_ in range(CLIENTS)]

    def shard(self, client: int) -> Split:
        """Client 0 has the first third of the examples, client 1 the others."""
        assert self.task.dataset is not None
        everything = torch.arange(len(self.task.dataset.train)).numpy()
        third = len(everything) // 3
        return self.task.dataset.train.select(everything[:third] if client == 0 else everything[third:])

    def server(self, round: int = 1, seed: int = SEED) -> ServerContext:
        return ServerContext(seed, round, self.task, self.setting.forms[1], self.target, self.clients)

    def client(self, round: int = 1, client: int = 0, **changes: Any) -> ClientContext:
        info = self.clients[client]
        context = ClientContext(
            seed=SEED,
            round=round,
            task=self.task,
            intermediate=self.setting.forms[1],
            target=self.target,
            info=info,
            train=self.shard(client),
            device=torch.device("cpu"),
            meter=Meter(self.counted),
        )
        return dataclasses.replace(context, **changes)

    @functools.cached_property
    def server_state(self) -> State:
        state = self.algorithm.server_init(self.server(round=0))
        if not self.row.first_mean:
            return state
        assert state == {}
        firsts = [client_update(self.algorithm, {}, self.private[i], self.client(1, i))[0] for i in range(CLIENTS)]
        return self.algorithm.server_aggregate(state, iter(firsts), self.server(round=1))

    @functools.cached_property
    def private(self) -> dict[int, State]:
        return {i: client_init(self.algorithm, self.client(round=0, client=i)) for i in range(CLIENTS)}

    def payload(self, client: int = 0) -> State:
        return dict(self.algorithm.server_broadcast(self.server_state, self.clients, self.server())[client])

    @functools.cached_property
    def first(self) -> tuple[ClientUpdate, State]:
        """Client 0's update and next private state in round 1."""
        return client_update(self.algorithm, clone(self.payload()), clone(self.private[0]), self.client())

    def with_lr_zero(self) -> "Case":
        """The same row with nothing learned in a round; its private states are these."""
        rates = {f.name: 0.0 for f in dataclasses.fields(self.algorithm) if f.name in ("lr", "local_lr")}  # type: ignore[arg-type]
        algorithm = dataclasses.replace(self.algorithm, **rates)  # type: ignore[call-arg]
        case = dataclasses.replace(self, row=dataclasses.replace(self.row, algorithm=algorithm))
        case.private, case.server_state = self.private, self.server_state
        return case

    def experiment(self) -> Experiment:
        small, intermediate, target = self.setting.forms
        tiers = (Tier("phone", small),)
        return Experiment(
            self.algorithm, self.setting.config, tiers, intermediate, target, participants=CLIENTS, seed=SEED, rounds=1
        )
