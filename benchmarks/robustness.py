"""The suite `robustness`: what hostile participants do to FedAvg and to Fed-Grow, and which rule bears it.

Ten participants with digits, of whom none, two or four are hostile. Rules are told of two attackers, Bulyan of one, as
ten participants allow no more: four hostile ones are beyond what any rule but the median of coordinates, the geometric
median and FLTrust claims to bear. Bounds are the median norm of an honest update in round 1 (`LOG.md`).
"""

from dataclasses import replace

from benchmarks.federations import on_digits
from benchmarks.methods import DIGITS, methods
from fedsim.algorithm import Algorithm
from fedsim.data.partition import Partition
from fedsim.experiment import Experiment
from fedsim.privacy.hostile import Hostile
from fedsim.privacy.pairs import Around
from fedsim.privacy.robust import Robust


BOUNDS = {"fedavg": 2.5, "fedgrow preserving": 0.55}
ATTACKS = (
    *(Hostile("label_flip", 0.2), Hostile("sign_flip", 0.2, scale=3.0), Hostile("little", 0.2, scale=1.5)),
    *(Hostile("min_max", 0.2), Hostile("backdoor", 0.2, scale=3.0)),
)
SHARES = (0.2, 0.4)


def robustness() -> list[Experiment]:
    """Rule x attack x share of attackers, on digits: FedAvg, and Fed-Grow with preset `preserving`.

    Krum, additive noise, larger scales and free riders are left to `--set algorithm.pairs.0.rule=...` and the like.
    """
    base = replace(
        on_digits(),
        participants=10,
        partition=Partition("dirichlet", alpha=1.0, min_size=40),
        rounds=5,
        eval_every=5,
        chunk=5,
    )
    attacks = [Hostile("sign_flip", 0.0), *(replace(attack, share=share) for share in SHARES for attack in ATTACKS)]
    return [
        replace(base, algorithm=Around(light(method), (rule, attack)))
        for name, bound in BOUNDS.items()
        for method in methods({name: DIGITS[name]})
        for rule in rules(bound)
        for attack in attacks
    ]


def rules(bound: float) -> tuple[Robust, ...]:
    return (
        Robust("mean"),
        Robust("median"),
        Robust("trimmed_mean", trim=2),
        Robust("multi_krum", attackers=2),
        Robust("bulyan", attackers=1),
        Robust("geometric_median"),
        Robust("norm_bound", bound=bound),
        Robust("centered_clipping", bound=bound),
        Robust("fltrust"),
    )


def light(method: Algorithm) -> Algorithm:
    """The same with five epochs of the stages that are Fed-Grow's alone, and nobody's that is attacked."""
    staged = {name: 5 for name in ("small_epochs", "local_epochs") if hasattr(method, name)}
    return replace(method, **staged)  # type: ignore[type-var]
