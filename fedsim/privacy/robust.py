"""Robust means: what a server makes of updates of which some may be broken or hostile.

    x_1 ... x_n    what the participants change, `(n, size)`; w_k their weights; f the attackers that are expected

| rule | what it gives | weights | from |
|---|---|---|---|
| `mean` | sum w x / sum w | yes | |
| `median` | of each coordinate; of an even number, the mean of the middle two | no | Yin et al. 2018, Def. 1 |
| `trimmed_mean` | each coordinate without its `trim` smallest and largest; 2 trim < n | no | Yin et al. 2018, Def. 2 |
| `krum` | the x_k of the smallest score; n >= 2f + 3 | no | Blanchard et al. 2017, Sec. 4 |
| `multi_krum` | mean of those of the `keep` smallest scores, n - f unless given; n >= 2f + 3 | no | the same |
| `bulyan` | see `bulyan`; n >= 4f + 3 | no | El Mhamdi et al. 2018 |
| `geometric_median` | RFA: argmin_v sum w abs(v - x), smoothed | yes | Pillutla et al. 2022, Alg. 2 |
| `norm_bound` | mean of x min(1, bound / norm x) | yes | Sun et al. 2019 |
| `centered_clipping` | v + mean of (x - v) min(1, bound / norm(x - v)) | yes | Karimireddy et al. 2021, Alg. 2 |
| `fltrust` | mean of x norm(t) / norm(x), weighted by relu cos(x, t) | no | Cao et al. 2021, Alg. 2 |

A Krum score is the sum of the squared distances to the n - f - 2 nearest others. Rules that count participants, as
those do whose bounds are numbers of participants, use no weights: a weight is what its owner says. RFA iterates until
a step is below `TOLERANCE` of the largest distance from the mean, at most `ITERATIONS` times, with distances
below `SMOOTHING` counted as that. Centred clipping takes one step from v.

The result does not depend on the order of participants, not even its last bit.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim.algorithm import Algorithm, ClientUpdate, Payload, ServerContext, State
from fedsim.core.fields import check_types, dotted, refuse
from fedsim.privacy.pair import Arriving, Pair
from fedsim.privacy.vectors import changes, squared_distances, with_change


Rule = Literal[
    "mean",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "geometric_median",
    "norm_bound",
    "centered_clipping",
    "fltrust",
]
BY_WEIGHT = ("geometric_median", "norm_bound", "centered_clipping")  # and the mean, which is the method's own
NUMBERS, VECTORS = ("trim", "attackers", "keep", "bound"), ("start", "trusted")  # settings
TRUSTED = 0  # the participant whose update is the server's own, for `fltrust`
SMOOTHING, TOLERANCE, ITERATIONS = 1e-6, 1e-10, 1000  # of the geometric median


def robust_mean(rule: str, vectors: Tensor, weights: Tensor | None = None, **settings: Any) -> Tensor:
    """One vector for many, by a rule of the table above.

    **Arguments:**

    - `vectors`: `(clients, size)`; computed with in float64. - `weights`: `(clients,)`, above 0; None: all alike.
    - `trim`, `attackers`: numbers of clients. - `keep`: of `multi_krum`, from 1 to clients - attackers.
    - `bound`: a norm. - `start`: of `centered_clipping`, the v it steps from, `(size,)`; None: 0.
    - `trusted`: of `fltrust`, the server's own vector t, `(size,)`, which is none of `vectors`.

    **Returns:** `(size,)`, float64.

    **Raises:** `ValueError` for an unknown rule or setting, one that is missing or out of its range, more attackers
    than the rule bears, and numbers that are not finite.
    """
    check_settings(rule, settings)
    if vectors.ndim != 2 or not vectors.numel():
        refuse("vectors", tuple(vectors.shape), "of shape (clients, size), both at least 1")
    n, x = len(vectors), vectors.double()
    if bad := (~x.isfinite().all(1)).nonzero().flatten().tolist():
        refuse("vectors", f"NaN or infinite in rows {bad}", "finite")
    w = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    if w.shape != (n,) or not (w.isfinite() & (w > 0)).all():
        refuse("weights", w.tolist(), f"{n} finite numbers above 0")
    if rule == "fltrust" and settings.get("trusted") is None:
        refuse("trusted", None, "the server's own vector")
    for name in VECTORS:
        given = settings.get(name)
        if given is not None and (given.shape != x[0].shape or not given.isfinite().all()):
            refuse(name, tuple(given.shape), f"finite and of shape {tuple(x[0].shape)}")
    check_clients(rule, n, settings)
    # Sums are rounded, and ties broken, in order of the vectors themselves: nobody chooses it by their place.
    order = torch.unique(x, dim=0, return_inverse=True)[1].argsort(stable=True)
    return RULES[rule](x[order], w[order], **settings)


# rules: x (n, size) and w (n,) in float64, rows in order of their numbers ---------------------------------------------


def mean(x: Tensor, w: Tensor) -> Tensor:
    return (w[:, None] * x).sum(0) / w.sum()


def median(x: Tensor, w: Tensor) -> Tensor:
    n, ordered = len(x), x.sort(0).values
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(x: Tensor, w: Tensor, trim: int) -> Tensor:
    return x.sort(0).values[trim : len(x) - trim].mean(0)


def krum(x: Tensor, w: Tensor, attackers: int) -> Tensor:
    return x[_scores(squared_distances(x), attackers).argmin()]


def multi_krum(x: Tensor, w: Tensor, attackers: int, keep: int | None = None) -> Tensor:
    best = _scores(squared_distances(x), attackers).argsort(stable=True)
    return x[best[: keep or len(x) - attackers]].mean(0)


def bulyan(x: Tensor, w: Tensor, attackers: int) -> Tensor:
    """Krum chooses n - 2f, one after another of those that are left; then of each coordinate the mean of the n - 4f
    values nearest to the median. Among m that are left, a score has max(1, m - f - 2) neighbours."""
    left, distances = list(range(len(x))), squared_distances(x)
    chosen = [
        left.pop(int(_scores(distances[left][:, left], attackers).argmin())) for _ in range(len(x) - 2 * attackers)
    ]
    ordered = x[chosen].sort(0).values
    nearest = (ordered - median(ordered, w)).abs().argsort(dim=0, stable=True)[: len(x) - 4 * attackers]
    return ordered.gather(0, nearest).mean(0)


def geometric_median(x: Tensor, w: Tensor) -> Tensor:
    v = mean(x, w)
    size = (x - v).norm(dim=1).max()
    for _ in range(ITERATIONS):
        before = v
        v = mean(x, w / (x - v).norm(dim=1).clamp(min=SMOOTHING))
        if (v - before).norm() <= TOLERANCE * size:
            break
    return v


def norm_bound(x: Tensor, w: Tensor, bound: float) -> Tensor:
    return mean(_clipped(x, bound), w)


def centered_clipping(x: Tensor, w: Tensor, bound: float, start: Tensor | None = None) -> Tensor:
    v = torch.zeros_like(x[0]) if start is None else start.double()
    return v + mean(_clipped(x - v, bound), w)


def fltrust(x: Tensor, w: Tensor, trusted: Tensor) -> Tensor:
    """Zeros where nobody agrees with the server."""
    t, norms = trusted.double(), x.norm(dim=1)
    units = x / norms.where(norms > 0, 1.0)[:, None]
    trust = (units @ (t / t.norm())).relu() if t.any() else torch.zeros_like(norms)
    return t.norm() * mean(units, trust) if trust.any() else torch.zeros_like(t)


def _scores(distances: Tensor, attackers: int) -> Tensor:
    """Krum's, `(m,)`."""
    neighbours = max(1, len(distances) - attackers - 2)
    return distances.sort(1).values[:, 1 : 1 + neighbours].sum(1)  # the nearest is the vector itself


def _clipped(x: Tensor, bound: float) -> Tensor:
    norms = x.norm(dim=1, keepdim=True)
    return x * (bound / norms.clamp(min=bound))


RULES: Mapping[str, Callable[..., Tensor]] = {name: globals()[name] for name in typing.get_args(Rule)}


def check_settings(rule: str, settings: Mapping[str, Any], prefix: str = "") -> None:
    """**Raises:** `ValueError` for a rule there is not, and a setting that it has not, lacks, or that is no such."""
    if rule not in RULES:
        refuse(dotted(prefix, "rule"), rule, f"one of {', '.join(RULES)}")
    _, _, *own = inspect.signature(RULES[rule]).parameters.values()
    for name in sorted(settings.keys() - {parameter.name for parameter in own}):
        refuse(dotted(prefix, name), settings[name], f"left out: {rule} has no such setting")
    for name, required in [(each.name, each.default is each.empty) for each in own if each.name in NUMBERS]:
        value, least, kind = settings.get(name), int(name == "keep"), float if name == "bound" else int
        fits = isinstance(value, int | kind) and not isinstance(value, bool) and least <= value < math.inf
        accepted = f"a whole number, at least {least}"
        if kind is float:
            fits, accepted = fits and value != 0, "a finite number above 0"
        if not fits and (value is not None or required):
            refuse(dotted(prefix, name), value, f"{accepted}, for {rule}")


def least_clients(rule: str, settings: Mapping[str, Any]) -> int:
    """How many clients a rule needs with these settings."""
    f, trim, keep = (settings.get(name) or 0 for name in ("attackers", "trim", "keep"))
    needed = {"trimmed_mean": 2 * trim + 1, "krum": 2 * f + 3, "multi_krum": max(2 * f + 3, keep + f)}
    return (needed | {"bulyan": 4 * f + 3}).get(rule, 1)


def check_clients(rule: str, clients: int, settings: Mapping[str, Any], prefix: str = "") -> None:
    """**Raises:** `ValueError` with both numbers, if a rule cannot bear so many attackers among so few clients."""
    if clients < (least := least_clients(rule, settings)):
        name = "trim" if rule == "trimmed_mean" else "attackers"
        keep = f" and keep={settings['keep']}" if settings.get("keep") else ""
        refuse(dotted(prefix, name), settings.get(name), f"fewer{keep}: {rule} then needs {least} of {clients} clients")


# the pair -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Robust(Pair):
    """A robust mean in the place of the method's mean: the server's side hands the method one update.

        server    x_k = update_k - received;  received + robust_mean(rule, x)

    - `rule`: see the module; "mean" leaves everything to the method: the same bits as without the pair.
    - `trim`, `attackers`, `keep`, `bound`: settings of the rule, for updates as whole vectors.
    - `by_examples`: whether updates have the method's weights in rules that use them, or all count alike: a weight is
      what its owner says.

    Centred clipping steps from the mean of the round before, from 0 at first: that is what the pair remembers. For
    FLTrust, participant 0 is the server: its shard is the small trusted set, its update is the trusted one and is not
    averaged itself; it is never hostile (`fedsim.privacy.hostile`), and has a model of its own like everybody.

    A round changes nothing where fewer updates arrive than the rule needs, or FLTrust's participant 0 is missing.
    """

    rule: Rule
    trim: int | None = None
    attackers: int | None = None
    keep: int | None = None
    bound: float | None = None
    by_examples: bool = False

    def __post_init__(self) -> None:
        check_types(self, "robust")
        check_settings(self.rule, self.settings, "robust")
        if self.by_examples and self.rule not in BY_WEIGHT:
            refuse("robust.by_examples", True, f"False for {self.rule}: weights are for {', '.join(BY_WEIGHT)}")

    @property
    def settings(self) -> dict[str, Any]:
        """The rule's settings, of those that are fields."""
        return {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}

    @property
    def each(self) -> bool:
        return self.rule != "mean"

    @property
    def selects(self) -> bool:
        return self.each

    def check(self, algorithm: Algorithm, participants: int) -> None:
        check_clients(self.rule, participants - (self.rule == "fltrust"), self.settings, "robust")

    def server(
        self, updates: Arriving, state: State, payload: Callable[[], Payload], ctx: ServerContext
    ) -> tuple[Arriving, State]:
        if not self.each:
            return updates, state
        arrived = [update for update in updates if isinstance(update, ClientUpdate)]
        averaged, settings = [update for update in arrived if update.tree], self.settings
        if not averaged:
            return arrived, state  # nothing is sent in this round
        if self.rule == "fltrust":
            own = [update for update in averaged if update.client == TRUSTED]
            averaged = [update for update in averaged if update.client != TRUSTED]
            if not own:
                return [], state
            settings["trusted"] = changes([*own, *averaged], payload())[0]
        if len(averaged) < least_clients(self.rule, settings):
            return [], state
        x = changes(averaged, payload())
        if self.rule == "centered_clipping":
            before = state.get("center")  # of other size where the model has grown since
            settings["start"] = before if before is not None and before.shape == x[0].shape else None
        weights = [float(update.weight) for update in averaged]
        found = robust_mean(self.rule, x, torch.tensor(weights) if self.by_examples else None, **settings)
        mean = dataclasses.replace(with_change(averaged[0], payload(), found), weight=sum(weights))
        return [mean], {"center": found} if self.rule == "centered_clipping" else {}
