"""The study of when growing together helps: its tasks, and the gates that a task has to pass before it (`LOG.md`).

Public models first: `fedsim models fetch minilm-l3` and `minilm-l6`; `python benchmarks/ladder.py --out CACHE/models`,
CACHE being FEDSIM_CACHE_DIR, makes the ViTs. Data are looked up in FEDSIM_DATA_DIR.
"""

from dataclasses import replace

from baselines.analytic import Analytic
from baselines.fedavg import FedAvg, fedavg_small
from benchmarks.federations import on_minilm
from fedgrow_algo.grown import Grown
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, fashion_mnist
from fedsim.experiment import Experiment, from_pretrained
from fedsim.learning.task import TaskConfig
from fedsim.models import Form, Like
from fedsim.models.checkpoint import Checkpoint


PUBLIC_IMAGES = 20_000  # that the ladder of ViTs was trained on
_NEWS = {"name": "newsgroups", "num_classes": 20}


def on_newsgroups() -> Experiment:
    """1,200 texts of 20 Newsgroups, 48 tokens of each, among owners of MiniLMs of 3 and 6 blocks; a target of 8."""
    base = on_minilm(1.0)
    data = replace(base.task.data, max_length=48, limit=1200, **_NEWS)
    return replace(base, task=replace(base.task, data=data), target=Like(depth=8), rounds=10)


def on_fashion() -> Experiment:
    """6,000 images of Fashion-MNIST among owners of three public ViTs; the target is wider and deeper than any.

    It does not pass its gate (`LOG.md`): the public models have seen too many images.
    """
    names = ("vit-32x2", "vit-48x3", "vit-64x4")
    ladder = tuple(Checkpoint(f"cache:{name}") for name in names)
    data: DataConfig = fashion_mnist(skip=PUBLIC_IMAGES, limit=6000)
    return Experiment(
        algorithm=FedAvg(),
        task=TaskConfig(data, "vit", patch_size=4),
        tiers=tuple(
            from_pretrained(tier, "vit", each) for tier, each in zip(("phone", "tablet", "laptop"), ladder, strict=True)
        ),
        intermediate=Form(64, 4, heads=4, mlp=128),
        target=Form(96, 6, heads=6, mlp=192),
        partition=Partition("dirichlet", alpha=0.5, min_size=100),
        participants=6,
        rounds=10,
        eval_every=5,
        chunk=6,
        start=Grown(ladder),
    )


def gates() -> list[Experiment]:
    """What a task has to pass: one owner of all the data trains the target, the smallest form, and a ridge regression.

    The target has to be better than the smallest form by more than a point, and than one ridge regression on features
    of the grown public model by more than two; else the task decides nothing.
    """
    found = []
    for base in (on_newsgroups(), on_fashion()):
        alone = replace(base, participants=1, tiers=base.tiers[:1], partition=Partition("iid"), eval_every=2)
        trained = [
            replace(method, lr=lr, epochs=1, batch_size=16)
            for lr in (1e-4, 3e-4, 1e-3)
            for method in (FedAvg(), fedavg_small())
        ]
        found += [replace(alone, algorithm=method) for method in trained]
        found += [replace(alone, algorithm=Analytic(of="target", gamma=gamma)) for gamma in (0.1, 1.0, 10.0)]
    return found
