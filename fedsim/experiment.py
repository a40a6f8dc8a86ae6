"""Experiments: frozen, typed, hashable. Everything that decides the numbers, nothing about where they are computed."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from fedsim.algorithm import LATER, Algorithm
from fedsim.core.canonical import canonical, reviving
from fedsim.core.fields import WHOLE, check_range, check_types, refuse, shown
from fedsim.core.modules import called, module_named
from fedsim.core.settings import nearest, parsed, replaced
from fedsim.data.partition import Partition
from fedsim.devices import Conditions, Device, device_named
from fedsim.learning.starts import Start
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form, Like, get_family
from fedsim.models.checkpoint import Checkpoint
from fedsim.models.pretrained import fixed_settings, form_of


TIMED = "conditions.deadline and conditions.over_selection"
TARGET = "MODULE:FUNCTION"  # what commands call the words that name experiments
PLACEMENT = {"placement": True}  # marks fields that say where a run is computed: left out of its identity


@dataclasses.dataclass(frozen=True)
class Tier:
    """A class of device: the small form its owners have, and what a participant of it asks of the machine.

    - `form`: the participant's own small model.
    - `checkpoint`: the pretrained model its owners start from (`fedsim.models.pretrained`); None: each trains its own.
      Its form must be `form`: `from_pretrained` makes a tier from a checkpoint alone.
    - `share`: the tier's part of the population, relative to the other tiers'.
    - `device`: what its owners compute with, in simulated time (`fedsim.devices`): the name of a profile, or a
      `Device`; None: nothing is known of it, and it takes no time.
    - `num_cpus`, `num_gpus` (fractions allowed), `memory_mb`: resources of one participant's actor on Ray.
    - `resources`: further ones, as nodes were started with: `(("phone_rack", 1.0),)`.
    - `gpu_fraction`: "auto" measures one participant on a GPU, and asks for the fraction that it needs
      (`fedsim.engine.gpu`); None: `num_gpus` says it.
    """

    name: str
    form: Form
    share: float = 1.0
    checkpoint: Checkpoint | None = None
    device: str | Device | None = None
    num_cpus: float = dataclasses.field(default=1.0, metadata=PLACEMENT)
    num_gpus: float = dataclasses.field(default=0.0, metadata=PLACEMENT)
    memory_mb: float | None = dataclasses.field(default=None, metadata=PLACEMENT)
    resources: tuple[tuple[str, float], ...] = dataclasses.field(default=(), metadata=PLACEMENT)
    gpu_fraction: Literal["auto"] | None = dataclasses.field(default=None, metadata=PLACEMENT)

    def __post_init__(self) -> None:
        check_types(self, "tiers")
        if isinstance(self.form, Like):
            refuse("tiers.form", self.form, "a Form: a target and an intermediate form may be Like those of the tiers")
        check_range(self, "tiers", "share", "memory_mb", above=0)
        check_range(self, "tiers", "num_cpus", "num_gpus", least=0)
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            refuse("tiers.num_gpus", self.num_gpus, "a fraction of one GPU, or a whole number of GPUs")
        if self.gpu_fraction is not None and self.num_gpus:
            refuse("tiers.num_gpus", self.num_gpus, f"left out where gpu_fraction={self.gpu_fraction!r} measures it")
        own = {"CPU", "GPU", "memory", "object_store_memory"}
        if any(not name or name in own or amount <= 0 for name, amount in self.resources):
            accepted = f"pairs of a name (none of {', '.join(sorted(own))}) and an amount above 0"
            refuse("tiers.resources", self.resources, accepted)
        with of_tier(self.name):
            _ = self.simulated

    @property
    def simulated(self) -> Device | None:
        """The device itself, where one is named."""
        return device_named(self.device) if isinstance(self.device, str) else self.device


def from_pretrained(name: str, family: str, checkpoint: Checkpoint | str, **fields: Any) -> Tier:
    """A tier whose owners start from a checkpoint, of the form its config says.

    **Arguments:**

    - `family`: as in `TaskConfig.family`.
    - `checkpoint`: a folder's path stands for `Checkpoint(path)`.
    - `fields`: further fields of the tier.

    **Raises:** `ValueError` if there is no such checkpoint, or it is another family's.
    """
    found = Checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    with of_tier(name):
        return Tier(name, form_of(family, found), checkpoint=found, **fields)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run. Derive another with `dataclasses.replace`, or on the command line with `--set field=value`.

    - `algorithm`: what runs, with its hyperparameters. - `task`: data and model family. What
      the checkpoints of `tiers` and `start` fix for all models is put into `task.settings`, where it is not said.
    - `tiers`: classes of participants and their small forms. - `target`: the form that all work towards.
    - `intermediate`: the form between them, for methods that have one (Fed-Grow); None: there is none. Both may be
      given as `Like(width=..., depth=...)`.
    - `partition`: how the data are dealt. - `participants`: size of the population.
    - `cohort`: participants a round; None: all of them. - `rounds`: federated rounds (round 0 comes on top).
    - `sampling`: "fixed": so many, without replacement; "poisson": each with probability `cohort / participants`, by a
      coin of its own: so many in the mean, and perhaps nobody.
    - `validation_share`: part of each shard that is never trained on; the only scores tuning may look at.
    - `eval_every`: score every so many rounds (round 0 and the last round always).
    - `scored`: who is scored: "everyone", the round's "cohort", or "auto": everyone in populations of at most 100.
    - `chunk`: consecutive participants whose updates are added up before anything else: fixes the order of the sum.
    - `precision`: "fp32", or "bf16": training runs under autocast; weights, updates and scores stay fp32.
    - `on_error`: what a participant that raises does: "stop" the run, be "drop"ped from the round, or "retry" once and
      then stop. Where a device had too little memory, the participant tries again when nobody else computes.
    - `batched`: participants of a chunk whose trainings are alike are trained in one batched computation
      (`fedsim.learning.batched`): the same results to rounding, not bit by bit.
    - `start`: a public model that everyone may begin with, grown into whatever form a method trains
      (`fedgrow_algo.grown.Grown`); None: models begin at random. A tier's own checkpoint comes first for its form.
    - `conditions`: who is away, too slow or too small to take part.
    - `call_seconds`: limit for one call of a participant; then its host is replaced, and `on_error` applies.
    """

    algorithm: Algorithm
    task: TaskConfig
    tiers: tuple[Tier, ...]
    intermediate: Form | None = None
    target: Form = dataclasses.field(default=None)  # type: ignore[assignment] # must be given: it follows a default
    partition: Partition = Partition()
    participants: int = 6
    cohort: int | None = None
    rounds: int = 10
    seed: int = dataclasses.field(default=0, metadata={"most": WHOLE})
    validation_share: float = 0.1
    eval_every: int = 1
    scored: Literal["auto", "everyone", "cohort"] = "auto"
    chunk: int = 4
    precision: Literal["fp32", "bf16"] = "fp32"
    on_error: Literal["stop", "drop", "retry"] = "stop"
    batched: bool = False
    conditions: Conditions = Conditions()
    start: Start | None = dataclasses.field(default=None, metadata=LATER)
    sampling: Literal["fixed", "poisson"] = dataclasses.field(default="fixed", metadata=LATER)
    call_seconds: float | None = dataclasses.field(default=None, metadata=PLACEMENT)

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "", "participants", "rounds", "eval_every", "chunk", "cohort", least=1)
        check_range(self, "", "seed", least=0)
        check_range(self, "", "call_seconds", above=0)
        check_range(self, "", "validation_share", least=0, most=0.9)
        if self.cohort is not None and self.cohort > self.participants:
            refuse("cohort", self.cohort, f"at most participants={self.participants}")
        if self.sampling == "poisson" and self.conditions.over_selection:
            refuse("conditions.over_selection", self.conditions.over_selection, "0 where sampling='poisson'")
        if not self.tiers:
            refuse("tiers", self.tiers, "at least one tier")
        if len({tier.name for tier in self.tiers}) < len(self.tiers):
            refuse("tiers", [tier.name for tier in self.tiers], "tiers of different names")
        if self.conditions.timed and not all(tier.device for tier in self.tiers):
            nameless = [tier.name for tier in self.tiers if not tier.device]
            refuse("tiers.device", None, f"given for every tier, as {TIMED} ask for simulated time: {nameless}")
        if self.participants < len(self.tiers):
            refuse("participants", self.participants, f"at least the number of tiers, {len(self.tiers)}")
        self._complete()
        task = Task(self.task)
        self._check_forms(task)
        for tier in self.tiers:
            with of_tier(tier.name):
                get_family(self.task.family).check(tier.form, task.inputs)
        self._check_method(task)
        self.algorithm.check_experiment(self)

    def _complete(self) -> None:
        """Put in what other fields decide: settings that checkpoints fix, and forms that are like the tiers'."""
        family, inputs = self.task.family, self.task.inputs
        owners = {f"tier {tier.name!r}": tier.checkpoint for tier in self.tiers if tier.checkpoint is not None}
        if self.start is not None:
            owners |= {f"start.checkpoints.{number}": each for number, each in enumerate(self.start.checkpoints)}
        if owners and not reviving() and (fixed := fixed_settings(family, inputs, owners)):
            settings = (*self.task.settings, *sorted(fixed.items()))
            object.__setattr__(self, "task", dataclasses.replace(self.task, settings=settings))
        for name in ("intermediate", "target"):
            if isinstance(form := getattr(self, name), Like):
                whole = form.beside(self.forms, get_family(family), self.task.inputs, name)
                object.__setattr__(self, name, whole)

    def _check_forms(self, task: Task) -> None:
        for name, size in (("width", "width"), ("depth", "depth"), ("mlp", "inner")) if self.intermediate else ():
            middle, target = getattr(self.intermediate, size), getattr(self.target, size)
            if target < middle:
                refuse(f"target.{name}", target, f"at least intermediate.{name}={middle}: growth never shrinks")
        name, larger = ("intermediate", self.intermediate) if self.intermediate else ("target", self.target)
        for tier in self.tiers:
            if tier.form.width > larger.width:
                refuse(f"tier {tier.name!r}: form.width", tier.form.width, f"at most {name}.width={larger.width}")
        for form in (self.intermediate, self.target):
            if form is not None:
                get_family(self.task.family).check(form, task.inputs)

    def _check_method(self, task: Task) -> None:
        """Ask the algorithm about all forms; where it cannot work with one tier's, but with others', name the tier."""
        self.algorithm.check_cohort(self.cohort or self.participants)
        try:
            self.algorithm.check(task, self.forms, self.intermediate, self.target)
        except ValueError:
            self.algorithm.check(task, (), self.intermediate, self.target)
            refused = [tier for tier in self.tiers if not self._works_with(tier, task)]
            if refused and (len(refused) < len(self.tiers) or len(self.tiers) == 1):
                with of_tier(refused[0].name):
                    self.algorithm.check(task, (refused[0].form,), self.intermediate, self.target)
            raise

    def _works_with(self, tier: Tier, task: Task) -> bool:
        try:
            self.algorithm.check(task, (tier.form,), self.intermediate, self.target)
        except ValueError:
            return False
        return True

    @property
    def middle(self) -> Form:
        """The intermediate form; the target where there is none, for methods that do not ask for it."""
        return self.intermediate or self.target

    @property
    def forms(self) -> tuple[Form, ...]:
        """The small forms, one a tier."""
        return tuple(tier.form for tier in self.tiers)

    @property
    def run_id(self) -> str:
        """Hash of the canonical JSON: experiments with one id compute the same numbers."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]

    def canonical_json(self) -> str:
        """Every field that decides the numbers, classes by name, keys sorted."""
        return json.dumps(canonical(self), sort_keys=True)


@contextlib.contextmanager
def of_tier(name: str) -> Iterator[None]:
    """Put the tier's name before what is refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"tier {name!r}: {error}") from error


# named on the command line -------------------------------------------------------------------------------------------


def load_experiments(target: str) -> list[Experiment]:
    """The experiments that `module:function` returns (one, or a list).

    **Raises:** `ValueError` saying which part of `target` does not lead anywhere.
    """
    return experiments_from(target, function_at(target))


def function_at(target: str) -> Callable[..., Any]:
    """What `module:function` names. **Raises:** `ValueError` saying which part of it does not lead anywhere."""
    module_name, _, function_name = target.partition(":")
    if not function_name or not module_name or module_name.startswith("."):
        refuse(TARGET, target, "an importable module and a function in it, such as benchmarks.suites:tiny")
    what = f"{TARGET}={shown(target)}"
    module = module_named(module_name, what)
    function = called(lambda: getattr(module, function_name, None), what)
    if not callable(function):
        names = [name for name, item in vars(module).items() if callable(item) and not name.startswith("_")]
        refuse(TARGET, target, f"a function of {module_name}{nearest(function_name, names)}")
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: is called without arguments, but {error}") from error
    return function


def experiments_from(target: str, function: Callable[[], Any]) -> list[Experiment]:
    """What the function that `target` names returns. **Raises:** `ValueError` if that is no experiment."""
    result = called(function, f"{TARGET}={shown(target)}")
    results = result if isinstance(result, list | tuple) else [result]
    others = [item for item in results if not isinstance(item, Experiment)]
    if others or not results:
        returned = shown(others[0]) if others else "an empty list"
        refuse(TARGET, target, f"a function that returns an Experiment or a list of them, not {returned}")
    return list(results)


def with_settings(experiment: Experiment, settings: Sequence[str]) -> Experiment:
    """The experiment with `field=value` applied; dotted paths reach inside, numbers index tuples (`tiers.0.num_gpus`).

    **Raises:** `ValueError` naming the field, and the nearest names if there is none of that name.
    """
    changes: dict[tuple[str, ...], Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            refuse("--set", setting, "of the form field=value")
        changes[tuple(path.split("."))] = parsed(text)
    return replaced(experiment, changes, "")
