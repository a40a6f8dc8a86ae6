"""The study of when growing together helps: its tasks, the gates a task has to pass, the methods (`LOG.md`).

For texts, fetch public models first: `fedsim models fetch minilm-l3` and `minilm-l6`; the small ones lie in `public`.
Data are looked up in FEDSIM_DATA_DIR.

A task comes in two regimes. *Strangers*: two public models of different size, which know nothing of each other; small
participants own the one, the others the other. *Ancestor*: one public model, and larger forms are grown from it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from baselines.analytic import Analytic
from baselines.fedavg import FedAvg, fedavg_small
from benchmarks.federations import on_minilm
from benchmarks.methods import RATE, methods
from fedgrow_algo.core import FedGrowCore
from fedgrow_algo.grown import Grown
from fedsim.algorithm import Algorithm
from fedsim.data.partition import Partition
from fedsim.data.source import fashion_mnist, pydoc
from fedsim.experiment import Experiment, Tier, from_pretrained
from fedsim.learning.task import TaskConfig
from fedsim.models import Form, Like
from fedsim.models.checkpoint import Checkpoint


PUBLIC_IMAGES, PUBLIC_PIECES = 3000, 4000  # that the ladders were trained on
_LARGE, _TARGET = Form(32, 2, heads=4, mlp=64), Form(64, 4, heads=8, mlp=128)


def on_newsgroups() -> Experiment:
    """600 texts of 20 Newsgroups, 32 tokens of each, among two owners of each MiniLM, of 3 and of 6 blocks."""
    base = on_minilm(1.0)
    data = replace(base.task.data, name="newsgroups", num_classes=20, max_length=32, limit=600, test_limit=1000)
    return replace(
        base,
        task=replace(base.task, data=data),
        target=Like(depth=6),
        partition=Partition("dirichlet", alpha=0.5, min_size=10),
        participants=4,
        rounds=5,
        eval_every=5,
        chunk=4,
    )


def on_fashion(ancestor: bool = False) -> Experiment:
    """6,000 images of Fashion-MNIST among six owners of public ViTs that were trained on 3,000 others."""
    task = TaskConfig(fashion_mnist(skip=PUBLIC_IMAGES, limit=6000, test_limit=3000), "vit", patch_size=7)
    base = _on_ladder(task, Partition("dirichlet", alpha=0.5, min_size=100), ancestor)
    return replace(base, rounds=6, eval_every=3)


def on_topics(ancestor: bool = False) -> Experiment:
    """6,000 pieces of CPython's reference text among six owners of whole topics: next byte, by public GPT-2s."""
    task = TaskConfig(pydoc(max_length=32, skip=PUBLIC_PIECES, limit=6000), "gpt2")
    return _on_ladder(task, Partition("natural"), ancestor)


def _on_ladder(task: TaskConfig, partition: Partition, ancestor: bool) -> Experiment:
    family = task.family
    ladder = tuple(Checkpoint(f"benchmarks:public/{family}-{size}") for size in ("24x1", "32x2"))
    small, large = (from_pretrained(name, family, each) for name, each in zip(("phone", "laptop"), ladder, strict=True))
    return Experiment(
        algorithm=FedAvg(),
        task=task,
        tiers=(small, Tier("laptop", _LARGE) if ancestor else large),
        intermediate=_LARGE,
        target=_TARGET,
        partition=partition,
        participants=6,
        rounds=10,
        eval_every=2,
        chunk=6,
        start=Grown(ladder[:1] if ancestor else ladder),
    )


PRIVATE = (  # no model of a participant leaves it
    "fedgrow_lowrank preserving",
    "fedgrow_no_federation_lowrank preserving",
    "fedgrow preserving",
    "fedgrow_matched preserving",
    "fedgrow_core preserving",
    "local_only",
    "fedit",
    "fedsb",
)
ANY_TARGET = ("fedgrow_residual preserving", "fedgrow_fused preserving", "fedkd")
TRAINED_FIRST = (  # small models, before they grow
    "fedgrow_lowrank preserving apart",
    "fedgrow_no_federation_lowrank preserving apart",
    "fedgrow preserving apart",
    "fedgrow_residual preserving apart",
)
OPEN = ("fedavg", "fedavg_mid", "fedavg_small", "heterofl")
# Where a run is costly: the project's forms that can be afforded there, and who was ahead of its kind on digits.
FEW = (
    "fedgrow_lowrank preserving",
    "fedgrow_no_federation_lowrank preserving",
    "fedgrow_analytic preserving",
    "fedgrow_analytic preserving aligned",
    "fedgrow_core preserving",
    "local_only",
    "fedproto",
    "fedit",
    "analytic",
    "fedavg",
    "fedavg_small",
)
MORE = ("fedgrow_residual preserving", "fedavg_mid")


APART, ALIGNED = " apart", " aligned"
AS_BROUGHT = {"small_epochs": 0, "local_epochs": 0}  # small models stay as they are brought


@dataclass(frozen=True)
class Part:
    """One task in one regime: what is compared there, and at which rates.

    - `tried`: rates of `study_grid`; `wider`: one more for each of some methods.
    - `rates`: of those that go on, chosen by validation with classes weighted evenly. - `batch_size`: of every method.
    - `public`: what of the data's settings gives examples to forms that are `ALIGNED`.
    - `grid_rounds`: of the grid; 0: it has none, as its rates are those of strangers on the same task.
    """

    base: Callable[[], Experiment]
    names: tuple[str, ...]
    tried: tuple[float, ...]
    wider: Mapping[str, float]
    rates: Mapping[str, float]
    batch_size: int = 32
    public: Mapping[str, Any] = field(default_factory=dict)
    grid_rounds: int = 3

    def compared(self, rates: Iterable[tuple[str, float]], **changes: Any) -> list[Experiment]:
        """One epoch a round; a core grows from the larger of the public models."""
        base = replace(self.base(), **changes)
        found = [self._set(name, base, *methods({plain(name): rate})) for name, rate in rates]
        return [replace(base, algorithm=method) for method in found]

    def _set(self, name: str, base: Experiment, method: Algorithm) -> Algorithm:
        """Small models as they are brought; or, `APART`, trained for five epochs, and Local for one."""
        apart = name.endswith(APART)
        stages = {"small_epochs": 5, "local_epochs": 1, "small_lr": 3e-3, "local_lr": 1e-3} if apart else AS_BROUGHT
        aligned = {"align": replace(base.task.data, **self.public)} if ALIGNED in name else {}
        method = changed(method, {**stages, **aligned, "epochs": 1, "batch_size": self.batch_size})
        return replace(method, of="intermediate") if isinstance(method, FedGrowCore) else method

    def grid(self) -> list[Experiment]:
        """A few rounds, scored after the last."""
        if not self.grid_rounds:
            return []
        tried = [(name, rate) for name in self.names for rate in self.tried_for(name)]
        return self.compared(tried, rounds=self.grid_rounds, eval_every=self.grid_rounds)

    def tried_for(self, name: str) -> tuple[float, ...]:
        more = (self.wider[name],) if name in self.wider else ()
        return ((0.01, 0.1, 1.0) if name in RATE else self.tried) + more


FASHION_RATES = {
    "fedgrow_core preserving": 1e-3,
    "fedgrow_lowrank preserving": 1e-3,
    "fedgrow_residual preserving": 1e-3,
    "fedgrow_no_federation_lowrank preserving": 3e-4,
    "fedgrow_analytic preserving": 1e-3,
    "local_only": 3e-4,
    "fedproto": 1e-3,
    "fedit": 1e-3,
    "analytic": 1e-2,
    "fedavg": 3e-4,
    "fedavg_mid": 3e-3,
    "fedavg_small": 3e-4,
}
FAR_BEHIND = ("fedgrow_analytic preserving", "fedproto")  # among strangers, and no control
GRID = (3e-4, 1e-3, 3e-3, 1e-2)
PARTS = {
    "fashion_strangers": Part(
        on_fashion,
        FEW + MORE,
        (1e-3, 3e-3),
        wider={name: 3e-4 for name in FEW + MORE}
        | {"fedavg_mid": 1e-2, "fedgrow_analytic preserving aligned": 1e-2, "analytic": 1e-3},
        rates=FASHION_RATES | {"fedgrow_analytic preserving aligned": 3e-3},
        public={"skip": 0, "first": PUBLIC_IMAGES, "limit": 500, "test_limit": None},
        grid_rounds=2,
    ),
    "fashion_ancestor": Part(
        lambda: on_fashion(ancestor=True),
        FEW + MORE,
        (3e-4, 1e-3, 3e-3),
        wider={},
        rates={name: rate for name, rate in FASHION_RATES.items() if name not in FAR_BEHIND},
        grid_rounds=0,
    ),
    "topics_strangers": Part(
        on_topics,
        PRIVATE + TRAINED_FIRST + ANY_TARGET + OPEN,
        GRID,
        wider={
            "fedgrow_residual preserving apart": 1e-4,
            "fedgrow_lowrank preserving apart": 1e-4,
            "fedgrow preserving apart": 1e-4,
            "fedgrow_core preserving": 3e-2,
            "fedsb": 3e-2,
            "heterofl": 3e-2,
        },
        rates={
            "fedgrow_residual preserving apart": 3e-4,
            "fedgrow preserving apart": 1e-4,
            "fedgrow_lowrank preserving apart": 1e-4,
            "fedgrow_no_federation_lowrank preserving apart": 1e-3,
            "fedgrow_core preserving": 1e-2,
            "local_only": 3e-3,
            "fedkd": 3e-3,
            "fedit": 3e-3,
            "fedsb": 1e-2,
            "fedavg": 1e-3,
            "fedavg_mid": 1e-3,
            "fedavg_small": 3e-3,
            "heterofl": 1e-2,
        },
    ),
    "topics_ancestor": Part(
        lambda: on_topics(ancestor=True),
        PRIVATE + ANY_TARGET + OPEN,
        GRID,
        wider={},
        rates={
            "fedgrow_residual preserving": 3e-4,
            "fedgrow preserving": 1e-3,
            "fedgrow_lowrank preserving": 3e-4,
            "fedgrow_no_federation_lowrank preserving": 3e-3,
            "fedgrow_core preserving": 1e-2,
            "local_only": 3e-3,
            "fedit": 3e-3,
            "fedsb": 1e-2,
            "fedavg": 1e-3,
            "fedavg_mid": 1e-3,
            "fedavg_small": 3e-3,
        },
        grid_rounds=0,
    ),
    "newsgroups": Part(
        on_newsgroups,
        tuple(name for name in FEW if name != "fedproto"),
        (1e-4, 3e-4, 1e-3),
        wider={},
        rates={},
        batch_size=16,
        grid_rounds=2,
        public={"name": "r8", "num_classes": 8, "limit": 300},
    ),
}
# The form of Fed-Grow that was best by validation on the tuning seed, by what names the part in the tables.
FORMS = {
    "from gpt2-24x1, gpt2-32x2": "fedgrow_residual (preserving)",
    "from gpt2-24x1, grown": "fedgrow_core (preserving)",
    "from vit-24x1, vit-32x2": "fedgrow_core (preserving)",
    "from vit-24x1, grown": "fedgrow_residual (preserving)",
}
NAMED = {
    "from gpt2-24x1, gpt2-32x2": "T: next byte of reference text, owners of whole topics; two strangers' models",
    "from gpt2-24x1, grown": "T; one public ancestor",
    "from vit-24x1, vit-32x2": "F: Fashion-MNIST, skewed labels; two strangers' models",
    "from vit-24x1, grown": "F; one public ancestor",
}


def study() -> list[Experiment]:
    """Every part of the study whose rates are chosen, at these rates."""
    return [each for part in PARTS.values() if part.rates for each in part.compared(part.rates.items())]


def study_grid() -> list[Experiment]:
    """The rates tried for `study`; run it on other seeds."""
    return [each for part in PARTS.values() for each in part.grid()]


def plain(name: str) -> str:
    """A method's name without what the study adds to it."""
    return name.removesuffix(APART).removesuffix(ALIGNED)


def changed(algorithm: Algorithm, changes: Mapping[str, Any]) -> Algorithm:
    """The algorithm with those of the changes that it has fields for."""
    concrete: Any = algorithm
    names = {each.name for each in fields(concrete)}
    return replace(concrete, **{name: value for name, value in changes.items() if name in names})


def gates() -> list[Experiment]:
    """What a task has to pass: one owner of all the data trains the target, the smallest form, and a ridge regression.

    The target has to be better than the smallest form by more than a point, and than one ridge regression on features
    of the grown public model by more than two; else the task decides nothing.
    """
    found = []
    for part, base in (
        (PARTS[name], PARTS[name].base()) for name in ("newsgroups", "fashion_strangers", "topics_strangers")
    ):
        alone = replace(base, participants=1, tiers=base.tiers[:1], partition=Partition("iid"), eval_every=base.rounds)
        trained = [
            replace(method, lr=lr, epochs=1, batch_size=part.batch_size)
            for lr in part.tried[:3]
            for method in (FedAvg(), fedavg_small())
        ]
        found += [replace(alone, algorithm=method) for method in trained]
        if "analytic" in part.names:
            found += [replace(alone, algorithm=Analytic(of="target", gamma=gamma)) for gamma in (0.1, 1.0, 10.0)]
    return found
