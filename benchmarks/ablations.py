"""What the suite `ablations` varies around Fed-Grow's two presets."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.federations import on_digits, on_pydoc
from benchmarks.methods import DIGITS, GRID, TOKENS, methods
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedsim.algorithm import Algorithm
from fedsim.data.partition import Partition
from fedsim.experiment import Experiment
from fedsim.models import Form


_PRESETS = ("paper", "preserving")
# Learning rates where starts are common to all, and where participants besides hardly train before Global: on digits,
# the best of `ablations_grid` (`LOG.md`, 2026-11-21).
_COMMON = {
    "fedgrow paper": 3e-3,
    "fedgrow preserving": 3e-3,
    "fedgrow_no_federation paper": 1e-3,
    "fedgrow_no_federation preserving": 1e-4,
}
_ALIGNED = {"fedgrow preserving": 1e-2, "fedgrow_no_federation preserving": 3e-3}
_ALIGNED_TOKENS = {"fedgrow preserving": 1e-2, "fedgrow_no_federation preserving": 1e-2}  # `LOG.md`, 2026-11-22
_COPIES = ("net2net", "aki", "stacking", "interlacing", "zero-block")
_WHOLE = ("grow_then_fedavg preserving", "fedavg")
_SMALL = ("fedavg_small", "hetlora")


def ablations() -> list[Experiment]:
    """One thing changed at a time around Fed-Grow's two presets, on digits and, where it matters most, on pydoc.

    What averaging Global adds is read off pairs: the same with and without federation, each at its own learning rate.
    Not tuned: the rates of `fedgrow_joint (paper)`, of five epochs apart, and on pydoc those of one epoch apart and of
    common starts that are then trained for 15.
    """
    base, text_base = replace(on_digits(), chunk=6, eval_every=2), on_pydoc()
    paper, preserving = (_pair(DIGITS, preset) for preset in ("paper", "preserving"))
    common = [replace(each, init="common") for preset in _PRESETS for each in _pair(_COMMON, preset)]
    aligned = _pair(_ALIGNED, "preserving")
    shared = preserving[0]
    return [
        # what participants start from, and how much of it they change before Global is trained
        *each_of(base, [*paper, *preserving, *common]),
        *each_of(base, [_aligned(each, epochs) for epochs in (0, 1, 5) for each in aligned]),
        # what is uploaded (nothing, Global, intermediate models and targets too, the target), and in how many stages
        *each_of(base, methods({name: DIGITS[name] for name in ("fedgrow_released_code paper", *_WHOLE, *_SMALL)})),
        *each_of(base, [_joint(paper[0], 1e-2), _joint(shared, DIGITS["fedgrow_joint preserving"])]),
        # how operators are built: tying, what starts where; those that start from copies have the rate of `preserving`
        *each_of(base, [replace(paper[0], preset=preset) for preset in ("paper-untied", "ligo")]),
        *each_of(base, [replace(shared, preset=preset) for preset in _COPIES]),
        # forms: the intermediate one's size; an MLP twice as wide, mapped whole or by chunks
        *each_of(replace(base, intermediate=Form(32, 3)), [paper[0], *preserving]),
        *each_of(replace(base, intermediate=Form(48, 4)), [paper[0], *preserving]),
        *each_of(_wide_mlp(base), [paper[0], replace(paper[0], preset="paper-chunked"), shared]),
        # who has what
        *(
            experiment
            for alpha in (0.1, 100.0)
            for experiment in each_of(
                replace(base, partition=Partition("dirichlet", alpha=alpha, min_size=10)),
                [*paper, *preserving, *(_aligned(each, 0) for each in aligned)],
            )
        ),
        *(
            experiment
            for participants in (3, 24)
            for experiment in each_of(
                replace(base, participants=participants, partition=Partition("dirichlet", alpha=0.5, min_size=10)),
                [
                    *preserving,
                    *(_aligned(each, 0) for each in aligned),
                    *methods({name: DIGITS[name] for name in _SMALL}),
                ],
            )
        ),
        *each_of(text_base, [*_pair(TOKENS, "paper"), *_pair(TOKENS, "preserving")]),
        *each_of(text_base, [replace(each, init="common") for preset in _PRESETS for each in _pair(TOKENS, preset)]),
        *each_of(
            text_base, [_aligned(each, epochs) for epochs in (0, 1) for each in _pair(_ALIGNED_TOKENS, "preserving")]
        ),
        *each_of(text_base, [_joint(_pair(TOKENS, "preserving")[0], 3e-4)]),
        *each_of(text_base, methods({name: TOKENS[name] for name in ("fedavg", *_SMALL)})),
    ]


def ablations_grid() -> list[Experiment]:
    """Learning rates for the variants of `ablations` that its conclusions rest on: starts common to all, on digits."""
    base = replace(on_digits(), chunk=6, eval_every=10)
    kinds = [replace(each, init="common") for preset in _PRESETS for each in _pair(DIGITS, preset)]
    kinds += [_aligned(each, epochs) for epochs in (0, 1) for each in _pair(DIGITS, "preserving")]
    return each_of(base, [replace(each, lr=lr) for lr in GRID for each in kinds])


def each_of(base: Experiment, algorithms: Sequence[Algorithm]) -> list[Experiment]:
    return [replace(base, algorithm=algorithm) for algorithm in algorithms]


def _pair(rates: dict[str, float], preset: str) -> list[FedGrow]:
    """Fed-Grow with and without federation, each at its own learning rate."""
    found = methods({name: rates[name] for name in (f"fedgrow {preset}", f"fedgrow_no_federation {preset}")})
    return [algorithm for algorithm in found if isinstance(algorithm, FedGrow)]


def _aligned(algorithm: FedGrow, epochs: int) -> FedGrow:
    """Small models and Local start equal for all, and hardly move before Global is trained."""
    return replace(algorithm, init="common", small_epochs=epochs, local_epochs=epochs)


def _joint(algorithm: FedGrow, lr: float) -> FedGrowJoint:
    names = ("preset", "epochs", "small_lr", "small_epochs", "batch_size")
    return replace(FedGrowJoint(lr=lr, local_lr=1e-3), **{name: getattr(algorithm, name) for name in names})


def _wide_mlp(base: Experiment) -> Experiment:
    """The MLP of every form twice as wide as its residual stream."""
    wide = lambda form: replace(form, mlp=2 * form.width)  # noqa: E731
    tiers = tuple(replace(tier, form=wide(tier.form)) for tier in base.tiers)
    return replace(base, tiers=tiers, intermediate=wide(base.intermediate), target=wide(base.target))
