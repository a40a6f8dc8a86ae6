"""Suites: functions that return the experiments of one comparison. Derive another by calling one and `replace`.

A function annotated `-> list[Experiment]` is a suite (`sweep.py --suite NAME`, hyphens or underscores); one that
returns a single Experiment is for `fedsim run` and `fedsim inspect`. A suite that takes a `scale` can be run smaller
(`--scale`). Methods that are compared share everything but the algorithm, so all of them meet the same federation.
"""

from dataclasses import replace
from typing import Any

from baselines.fedavg import FedAvg, fedavg_small
from baselines.fedbrb_like import FedBRBLike
from baselines.heterofl import heterofl_clean
from baselines.lora import fedit
from benchmarks.ablations import ablations, ablations_grid, each_of
from benchmarks.federations import (
    dealt,
    examples,
    from_public,
    ladder,
    on_ag_news,
    on_cifar,
    on_digits,
    on_minilm,
    on_pydoc,
    on_sst2,
    scaled,
)
from benchmarks.leakage import leakage, leakage_epsilon
from benchmarks.methods import CIFAR, DIGITS, GRID, PUBLIC_DIGITS, RATE, SENTENCES, TOKENS, methods
from benchmarks.robustness import robustness
from benchmarks.study import AS_BROUGHT, changed, gates, study, study_grid
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import Algorithm
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, digits, pydoc
from fedsim.experiment import Experiment, Tier
from fedsim.learning.augmentation import Augmentation
from fedsim.learning.task import TaskConfig
from fedsim.models import Form


__all__ = [
    "ablations",
    "ablations_grid",
    "gates",
    "leakage",
    "leakage_epsilon",
    "robustness",
    "study",
    "study_grid",
]


def quick() -> list[Experiment]:
    """The demo, on digits, in two regimes: everyone begins at random, or with one small public model.

    At random: Fed-Grow with two presets, growth without federation, FedAvg, HeteroFL and FedBRB-like. From the public
    model: Fed-Grow, growth without federation, FedAvg, HeteroFL, LoRA, and training alone. The participants and their
    data are the same. Learning rates were chosen on validation scores of other seeds (`benchmarks/LOG.md`).
    """
    grown = ("fedgrow paper", "fedgrow preserving", "fedgrow_no_federation preserving")
    names = (*grown, "fedavg", "heterofl", "fedbrb_like")
    public = from_public(on_digits())
    return [
        *each_of(replace(public, start=None), methods({name: DIGITS[name] for name in names})),
        *each_of(public, [changed(method, AS_BROUGHT) for method in methods(PUBLIC_DIGITS)]),
    ]


def quick_grid() -> list[Experiment]:
    """The learning rates tried for the second regime of `quick`, as `baselines_grid`."""
    base = replace(from_public(on_digits()), chunk=6)
    rates = (3e-5, *GRID[:-1])
    tried = [method for lr in rates for method in methods(dict.fromkeys(PUBLIC_DIGITS, lr))]
    return [replace(base, algorithm=changed(method, AS_BROUGHT)) for method in tried]


def baselines() -> list[Experiment]:
    """Every method on digits, with labels dealt unevenly (alpha 0.5) and evenly (alpha 100)."""
    base = replace(on_digits(), chunk=6)
    partitions = [Partition("dirichlet", alpha=alpha, min_size=40) for alpha in (0.5, 100.0)]
    return [
        replace(base, algorithm=algorithm, partition=partition)
        for partition in partitions
        for algorithm in methods(DIGITS)
    ]


def baselines_grid() -> list[Experiment]:
    """The learning rates tried for `baselines`: eight for every method that has one (`benchmarks/tune.py`).

    Run it on other seeds than `baselines`. Fed-Grow's private stages have the rates of `quick`.
    """
    base = replace(on_digits(), chunk=6)
    names = [name for name in DIGITS if name not in RATE]
    return [replace(base, algorithm=each) for lr in (3e-5, *GRID, 1e-1) for each in methods(dict.fromkeys(names, lr))]


# Of each class of methods, by what leaves a participant, one that is soon done.
ONE_OF_EACH = (
    "fedgrow_lowrank preserving",
    "fedavg_mid",
    "heterofl",
    "lg_fedavg",
    "analytic",
    "fedit",
    "fedmrl",
    "local_only",
)


def checkpoints(scale: float = 1.0) -> list[Experiment]:
    """Every method from the same two real checkpoints, 3 and 6 blocks of MiniLM, on Reuters R8, for a target of 12.

    Fetch them first (`fedsim models fetch minilm-l3`, `minilm-l6`); R8 is looked up in FEDSIM_DATA_DIR. Rates are not
    tuned: 1e-4 where models are trained, 1e-3 for operators and adapters.

    - `scale`: 0.01: one round on 60 texts, by two participants and a target of 7 blocks; below, a smoke test of a
      minute: the same by one method of each class (of what leaves a participant).
    """
    base = on_minilm(scale)
    chosen = DIGITS if scale >= 0.01 else ONE_OF_EACH
    light = ("operator", "adapter", "nothing")
    given = methods({name: DIGITS[name] for name in chosen})
    rates = {name: 1e-3 if method.leaves in light else 1e-4 for name, method in zip(chosen, given, strict=True)}
    pretrained = {"small_epochs": 0, "local_epochs": 1, "epochs": 1}
    return [replace(base, algorithm=changed(method, pretrained)) for method in methods(rates)]


def cifar_subset() -> list[Experiment]:
    """The methods that matter most, on 3,000 images of CIFAR-10 (from FEDSIM_DATA_DIR)."""
    return [replace(on_cifar(), algorithm=algorithm) for algorithm in methods(CIFAR)]


def cifar_subset_grid() -> list[Experiment]:
    """The learning rates tried for `cifar_subset`, as `baselines_grid`; scored after the last round alone."""
    base = replace(on_cifar(), eval_every=10)
    return [replace(base, algorithm=each) for lr in GRID for each in methods(dict.fromkeys(CIFAR, lr))]


def text() -> list[Experiment]:
    """SST-2 and AG News (from FEDSIM_DATA_DIR) with BERT, and pydoc by bytes with GPT-2: small enough for two cores."""
    return [
        replace(base, algorithm=algorithm)
        for base, rates in ((on_sst2(), SENTENCES), (on_ag_news(), SENTENCES), (on_pydoc(), TOKENS))
        for algorithm in methods(rates)
    ]


def text_grid() -> list[Experiment]:
    """The learning rates tried for `text`, on SST-2 and pydoc, scored after the last round."""
    bases = [replace(base, eval_every=10) for base in (on_sst2(), on_pydoc())]
    return [
        replace(base, algorithm=each) for base in bases for lr in GRID for each in methods(dict.fromkeys(SENTENCES, lr))
    ]


def scaling() -> list[Experiment]:
    """10 to 10,000 participants, up to 100 of them a round, on pieces of 16 bytes: what a population costs.

    Everyone is scored once, after the last round: of a large population, that is most of the work.
    """
    base = replace(
        on_pydoc(),
        task=TaskConfig(pydoc(max_length=16, test_share=0.01), "gpt2"),
        partition=Partition("iid"),
        rounds=5,
        eval_every=5,
        scored="cohort",
        validation_share=0.0,
    )
    rates = {name: TOKENS[name] for name in ("fedgrow preserving", "fedavg", "hetlora")}
    return [
        replace(base, algorithm=algorithm, participants=participants, cohort=cohort)
        for participants, cohort in ((10, 10), (100, 10), (1000, 10), (1000, 100), (10_000, 100))
        for algorithm in methods(rates)
    ]


PAPERS = Augmentation(crop=(0.08, 1.0), flip=0.5, randaugment=2, magnitude=9, erase=0.25)


def paper_cv(scale: float = 1.0) -> list[Experiment]:
    """The paper's vision runs: CIFAR-10, CIFAR-100 and Flowers-102, 10 and 20 participants, alpha 0.5 and 100.

    Forms, rounds, epochs, batches, rates and augmentation are those of the released code (`released_ladder`), and every
    method has them, as nothing is known of a search. Images are cut at random, mirrored, go through two operations of
    RandAugment and are erased in one case of four; strengths are the defaults of torchvision's transforms of those
    names, for others are not known.

    - `scale`: 1 is the paper's size; below, images keep their 32 pixels, and examples, rounds, epochs and widths are
      that share of the paper's, with floors that keep every part of the run in.
    """
    full = released_ladder()
    pixels, patch = (224, 16) if scale == 1 else (32, 4 if scale >= 0.1 else 8)
    experiments = []
    cifar, flowers = ((10, 4, 50), (20, 8, 100)), ((10, 40, 200), (20, 40, 200))
    for name, classes, rounds, cells in (
        ("cifar10", 10, 200, cifar),
        ("cifar100", 100, 200, cifar),
        ("flowers102", 102, 100, flowers),
    ):
        data = DataConfig(name, image_size=pixels, channels=3, num_classes=classes, limit=examples(scale))
        for participants, epochs, alone in cells:
            task = TaskConfig(data, patch_size=patch, augmentation=PAPERS)
            base = scaled(replace(full, participants=participants, task=task, rounds=rounds), scale)
            compared = _papers_methods(scale, epochs=epochs, alone=alone, lr=5e-4, batch_size=64, weight_decay=0.05)
            experiments += [each for alpha in (0.5, 100.0) for each in each_of(dealt(base, alpha), compared)]
    return experiments


def paper_nlp(scale: float = 1.0) -> list[Experiment]:
    """The paper's text runs: AG News and 20 Newsgroups, 10 and 20 participants, alpha 0.5 and 100, with BERT.

    Forms, rounds, epochs, batches, rates, clipping and the schedule of the learning rate, which rises over the first
    6 % of every local call and falls to 0 by its end, are those of the released code. Of its dropout nothing is known:
    it is 0.1, as in BERT's own training and the default of its config. WikiNER is not among the sets that have a
    name here.

    - `scale`: as in `paper_cv`; below 1 texts are read as bytes, so that no tokenizer is needed.
    """
    experiments = []
    for name, classes, rounds, epochs, alone, lr in (
        ("ag_news", 4, 100, 1, 10, 1e-4),
        ("newsgroups", 20, 200, 10, 100, 3e-4),
    ):
        data = DataConfig(
            name,
            text=("text",),
            label="label",
            num_classes=classes,
            max_length=128,
            tokenizer="google-bert/bert-base-uncased" if scale == 1 else "bytes",
            hub=scale == 1,
            limit=examples(scale),
        )
        for participants in (10, 20):
            task = TaskConfig(data, "bert", dropout=0.1)
            whole = replace(released_ladder(), task=task, participants=participants, rounds=rounds)
            optimizer: dict[str, Any] = {"weight_decay": 0.01, "clip": 1.0, "schedule": "linear", "lr_warmup": 0.06}
            compared = _papers_methods(scale, epochs=epochs, alone=alone, lr=lr, batch_size=32, **optimizer)
            base = scaled(whole, scale)
            experiments += [each for alpha in (0.5, 100.0) for each in each_of(dealt(base, alpha), compared)]
    return experiments


def _papers_methods(scale: float, *, epochs: int, alone: int, lr: float, **settings: Any) -> list[Algorithm]:
    """Fed-Grow, the paper's own controls (no aggregation; the target from scratch), and what else must be beaten."""
    epochs, alone = max(1, round(epochs * scale)), max(2, round(alone * scale))
    staged: dict[str, Any] = {"local_lr": lr, "local_epochs": alone, "small_lr": lr, "small_epochs": alone}
    local: dict[str, Any] = {"lr": lr, "epochs": epochs, "clip": None} | settings
    grow = FedGrow(preset="paper", **local, **staged)
    return [
        grow,
        replace(grow, federate=False),
        replace(grow, preset="preserving"),
        replace(grow, preset="preserving", federate=False),
        FedAvg(**local),
        fedavg_small(**local),
        heterofl_clean(**local),
        FedBRBLike(**local),
        fedit(**local),
    ]


def tiny() -> Experiment:
    """One Fed-Grow run on digits that takes seconds: what parity, kill and resume checks use."""
    return Experiment(
        algorithm=FedGrow(
            preset="paper",
            lr=3e-3,
            local_lr=3e-3,
            local_epochs=5,
            small_lr=3e-3,
            small_epochs=5,
            batch_size=32,
        ),
        task=TaskConfig(digits(), patch_size=2),
        tiers=(
            Tier("phone", Form(16, 1), num_cpus=0.5),
            Tier("tablet", Form(24, 2), num_cpus=0.5),
            Tier("laptop", Form(24, 3), num_cpus=0.5),
        ),
        intermediate=Form(32, 3),
        target=Form(40, 4),
        partition=Partition("dirichlet", alpha=0.5, min_size=40),
        participants=3,
        rounds=3,
        chunk=2,
    )


def released_ladder() -> Experiment:
    """The sizes of the authors' released code: ViT 256 x {2,3,4} -> 320x4 -> 384x6. For `fedsim inspect`."""
    return ladder(256, Form(320, 4, 8), Form(384, 6, 8))


def abstract_ladder() -> Experiment:
    """Sizes whose counts give the abstract's two figures, 73.01 % and 59.25 %: ViT 320 x {2,3,4} -> 384x4 -> 480x8."""
    return ladder(320, Form(384, 4, 8), Form(480, 8, 8))
