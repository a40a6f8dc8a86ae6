"""Federations that suites share: the data and how they are dealt, small forms, intermediate form and target.

The algorithm in them is Fed-Grow with preset `paper`, for suites to replace.
"""

from dataclasses import replace

from benchmarks.methods import DIGITS, methods
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.grown import Grown
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, digits, pydoc, sst2
from fedsim.experiment import Experiment, Tier, from_pretrained
from fedsim.learning.task import TaskConfig
from fedsim.models import Form, Like
from fedsim.models.checkpoint import Checkpoint


PUBLIC = 400  # digits that the public model was trained on


def on_digits() -> Experiment:
    """Six participants of three sizes, labels dealt unevenly, a target twice as wide as the smallest model."""
    (grow,) = methods({"fedgrow paper": DIGITS["fedgrow paper"]})
    return Experiment(
        algorithm=grow,
        task=TaskConfig(digits(), patch_size=4),
        tiers=(
            Tier("phone", Form(24, 1), num_cpus=0.5),
            Tier("tablet", Form(32, 2), num_cpus=0.5),
            Tier("laptop", Form(32, 3), num_cpus=0.5),
        ),
        intermediate=Form(40, 3),
        target=Form(48, 4),
        partition=Partition("dirichlet", alpha=0.5, min_size=40),
        participants=6,
        rounds=10,
        chunk=3,
    )


def from_public(base: Experiment) -> Experiment:
    """The same of digits, where everyone may begin with a public model, the smallest tier's form (`public/`).

    The digits that it was trained on are nobody's.
    """
    public = Grown((Checkpoint("benchmarks:public/digits-24x1"),))
    return replace(base, task=replace(base.task, data=digits(skip=PUBLIC)), start=public)


def on_cifar() -> Experiment:
    """What the runs of `cifar_subset` share."""
    data = DataConfig("cifar10", image_size=32, channels=3, num_classes=10, limit=3000)
    return replace(
        on_digits(),
        task=TaskConfig(data, patch_size=8),
        tiers=(Tier("phone", Form(32, 2)), Tier("tablet", Form(48, 2)), Tier("laptop", Form(48, 3))),
        intermediate=Form(64, 4),
        target=Form(96, 6, mlp=192),
        partition=Partition("dirichlet", alpha=0.5, min_size=100),
        participants=6,
        rounds=10,
        eval_every=2,
        chunk=6,
    )


def on_sst2() -> Experiment:
    """2,000 sentences, 32 tokens of each; the tokenizer is trained on the validation split, which nobody holds."""
    return replace(
        on_digits(),
        task=TaskConfig(sst2(tokenizer="bpe:validation:2000", max_length=32, limit=2000), "bert"),
        partition=Partition("dirichlet", alpha=0.5, min_size=100),
        eval_every=5,
        chunk=6,
    )


def on_minilm(scale: float) -> Experiment:
    """Reuters R8 among owners of two real checkpoints of 3 and 6 blocks (`fedsim models fetch`), for a target of 12.

    Everyone's start, for methods that begin with one model, is what of the two is nearest to its form.

    - `scale`: of the examples and rounds; below 0.1, texts of 16 tokens and a target of 7 blocks.
    """
    small = scale < 0.1
    ladder = (Checkpoint("cache:minilm-l3"), Checkpoint("cache:minilm-l6"))
    data = DataConfig(
        "r8",
        text=("text",),
        label="label",
        num_classes=8,
        max_length=16 if small else 128,
        tokenizer="cache:minilm-l6",
        limit=None if scale == 1 else max(60, round(5485 * scale)),
    )
    return Experiment(
        algorithm=FedGrow(preset="preserving"),
        task=TaskConfig(data, "bert"),
        tiers=(from_pretrained("phone", "bert", ladder[0]), from_pretrained("laptop", "bert", ladder[1])),
        intermediate=Like(depth=6),
        target=Like(depth=7 if small else 12),
        partition=Partition("dirichlet", alpha=0.5, min_size=10),
        participants=2 if small else 6,
        rounds=max(1, round(20 * scale)),
        eval_every=5,
        chunk=6,
        start=Grown(ladder),
    )


def on_ag_news() -> Experiment:
    """2,000 news items, 128 bytes of each."""
    data = DataConfig("ag_news", text=("text",), label="label", num_classes=4, max_length=128, limit=2000)
    return replace(on_sst2(), task=TaskConfig(data, "bert"))


def on_pydoc() -> Experiment:
    """600 pieces of 32 bytes; every participant holds topics of its own."""
    return replace(on_sst2(), task=TaskConfig(pydoc(max_length=32, limit=600), "gpt2"), partition=Partition("natural"))


def ladder(width: int, intermediate: Form, target: Form) -> Experiment:
    """CIFAR-100 at 224x224 in patches of 16, FFN ratio 1, hyperparameters of the released code."""
    return Experiment(
        algorithm=FedGrow(
            preset="paper",
            lr=5e-4,
            epochs=4,
            local_lr=5e-4,
            local_epochs=50,
            small_lr=5e-4,
            small_epochs=50,
            batch_size=64,
            weight_decay=0.05,
            clip=None,
        ),
        task=TaskConfig(DataConfig("cifar100", image_size=224, channels=3, num_classes=100), patch_size=16),
        tiers=tuple(Tier(f"{depth} layers", Form(width, depth, 8), num_gpus=0.25) for depth in (2, 3, 4)),
        intermediate=intermediate,
        target=target,
        partition=Partition("dirichlet", alpha=0.5),
        participants=12,
        rounds=200,
    )


def scaled(experiment: Experiment, scale: float) -> Experiment:
    """Rounds at a share of their number; widths halved once or twice, so that every axis stays divisible; no GPU."""
    part = 1 if scale == 1 else 2 if scale >= 0.5 else 4
    narrow = lambda form: replace(form, width=form.width // part)  # noqa: E731
    gpus = 1.0 if scale == 1 else 0.0
    rounds = max(3, round(experiment.rounds * scale))
    return replace(
        experiment,
        tiers=tuple(replace(tier, form=narrow(tier.form), num_gpus=gpus * tier.num_gpus) for tier in experiment.tiers),
        intermediate=narrow(experiment.intermediate),
        target=narrow(experiment.target),
        rounds=rounds,
        eval_every=max(1, rounds // 20),
    )


def examples(scale: float) -> int | None:
    """How many training examples of a set of usual size are kept; None: all there are."""
    return None if scale == 1 else max(500, round(50_000 * scale))


def dealt(base: Experiment, alpha: float) -> Experiment:
    return replace(base, partition=Partition("dirichlet", alpha=alpha))
