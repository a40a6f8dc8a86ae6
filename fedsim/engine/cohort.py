"""The federation: who the participants are, what data they hold, and who takes part in which round.

All of it depends on the seed, the data and the population alone, so every method of a suite meets the same federation.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from fedsim.algorithm import ClientInfo
from fedsim.core import tree as trees
from fedsim.core.seeding import numpy_generator
from fedsim.data.partition import train_validation
from fedsim.experiment import Experiment, Tier
from fedsim.learning.starts import check_start, load_small
from fedsim.learning.task import Task
from fedsim.models import get_family


EVERYONE_UP_TO = 100  # populations of at most this size are scored as a whole
NAMED = 8  # a message names at most so many participants


@dataclasses.dataclass(frozen=True)
class Member:
    """One participant: what the server may know of it, its tier, and its shard as indices into the training data."""

    info: ClientInfo
    tier: Tier
    train: np.ndarray  # (n,) int64
    validation: np.ndarray  # (m,) int64


def tiers_of(experiment: Experiment) -> list[Tier]:
    """The tier of each participant: numbers by share (largest remainder), places by the seed."""
    shares = np.array([tier.share for tier in experiment.tiers])
    exact = shares / shares.sum() * experiment.participants
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() < experiment.participants:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > experiment.participants:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    dealt = np.repeat(np.arange(len(counts)), counts)
    return [experiment.tiers[i] for i in numpy_generator(experiment.seed, "tiers").permutation(dealt)]


def check_forms(experiment: Experiment) -> None:
    """**Raises:** `ValueError` if a model of one of the experiment's forms is larger than this machine's memory."""
    for form in (*experiment.forms, experiment.middle, experiment.target):
        get_family(experiment.task.family).check_memory(form, experiment.task.inputs)


def check_checkpoints(experiment: Experiment) -> None:
    """Read every tier's checkpoint and hold it against the experiment.

    **Raises:** `ValueError` naming the tier, its participants, the field and both values.
    """
    task, tiers = Task(experiment.task), tiers_of(experiment)
    for tier in experiment.tiers:
        if tier.checkpoint is None:
            continue
        try:
            check_start(task, tier.form, tier.checkpoint, experiment.seed)
        except ValueError as error:
            owners = [str(id_) for id_, owned in enumerate(tiers) if owned.name == tier.name]
            named = ", ".join(owners[:NAMED]) + (f", ...: {len(owners)} in all" if len(owners) > NAMED else "")
            raise ValueError(f"tier {tier.name!r} (participants {named}): {error}") from error


def members(experiment: Experiment, task: Task) -> list[Member]:
    """The population, in order of id.

    **Raises:** `ValueError` if the data cannot be dealt as `experiment.partition` asks.
    """
    assert task.dataset is not None
    train = task.dataset.train
    groups = None if train.groups is None else train.groups.numpy()
    shards = experiment.partition.split(train.labels.numpy(), groups, experiment.participants, experiment.seed)
    population = []
    for id_, (tier, shard) in enumerate(zip(tiers_of(experiment), shards, strict=True)):
        rng = numpy_generator(experiment.seed, "validation", client=id_)
        kept, validation = train_validation(shard, experiment.validation_share, rng)
        population.append(
            Member(ClientInfo(id_, tier.name, tier.form, len(kept), tier.checkpoint), tier, kept, validation)
        )
    return population


def cohort_of(experiment: Experiment, round: int) -> tuple[int, ...]:
    """Who is asked to train in a round, in order of id, of those who are available: uniform without replacement, or
    each by a coin of its own (`Experiment.sampling`).

    Round 0 scores the state before round 1. Fewer than wanted, or nobody, where too few are available, or by the coins.
    """
    conditions, everyone = experiment.conditions, np.arange(experiment.participants)
    if conditions.availability < 1:
        draws = numpy_generator(experiment.seed, "availability", max(round, 1)).random(experiment.participants)
        everyone = everyone[draws < conditions.availability]
    wanted = conditions.sampled(experiment.cohort or experiment.participants, experiment.participants)
    rng = numpy_generator(experiment.seed, "cohort", max(round, 1))
    if experiment.sampling == "poisson":
        coins = rng.random(experiment.participants) < wanted / experiment.participants
        return tuple(everyone[coins[everyone]].tolist())
    if wanted >= len(everyone):
        return tuple(everyone.tolist())
    return tuple(sorted(rng.choice(everyone, wanted, replace=False).tolist()))


@dataclasses.dataclass(frozen=True)
class RoundCohort:
    """What becomes of a round's cohort before anybody has trained, each in order of id.

    - `takes_part`: who trains. - `dropped_out`: who received the payload and was not heard of again.
    - `excluded`: whose device is too small for the method, so that nothing was sent to it.
    """

    takes_part: tuple[int, ...]
    dropped_out: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()

    @property
    def reached(self) -> tuple[int, ...]:
        """Who receives what the server sends."""
        return tuple(sorted((*self.takes_part, *self.dropped_out)))


def round_cohort_of(experiment: Experiment, round: int, too_small: Collection[int] = ()) -> RoundCohort:
    """Who of a round's cohort takes part in it.

    - `too_small`: participants whose device cannot hold what the method asks (`too_small`).
    """
    cohort = cohort_of(experiment, round)
    excluded = tuple(id_ for id_ in cohort if id_ in too_small)
    kept = [id_ for id_ in cohort if id_ not in too_small]
    if not experiment.conditions.dropout or round == 0:
        return RoundCohort(tuple(kept), (), excluded)
    draws = numpy_generator(experiment.seed, "dropout", round).random(experiment.participants)
    gone = draws < experiment.conditions.dropout
    return RoundCohort(tuple(id_ for id_ in kept if not gone[id_]), tuple(id_ for id_ in kept if gone[id_]), excluded)


def scored_in(experiment: Experiment, round: int, excluded: Collection[int] = ()) -> tuple[int, ...]:
    """Who is scored after a round; nobody where `eval_every` skips it, and nobody who is `excluded`."""
    last = round == experiment.rounds
    if round % experiment.eval_every and not last:
        return ()
    small = experiment.participants <= EVERYONE_UP_TO
    everyone = last or experiment.scored == "everyone" or (experiment.scored == "auto" and small)
    ids = range(experiment.participants) if everyone else cohort_of(experiment, round)
    return tuple(id_ for id_ in ids if id_ not in excluded)


def federation_sha256(experiment: Experiment, population: Sequence[Member]) -> str:
    """Hash of shards, small forms and cohorts: equal for all methods that met the same federation.

    Of checkpoints the weights are hashed: what they hold counts, not where they lie.
    """
    digest, task = hashlib.sha256(), Task(experiment.task)
    weights = {
        tier.name: trees.sha256(load_small(task, tier.form, tier.checkpoint, experiment.seed))
        for tier in experiment.tiers
        if tier.checkpoint is not None
    }
    for member in population:
        digest.update(f"{member.info.id}:{member.info.tier}:{member.info.form!r};".encode())
        digest.update(weights.get(member.info.tier, "").encode())
        digest.update(member.train.tobytes() + b"/" + member.validation.tobytes())
    for round in range(1, experiment.rounds + 1):
        digest.update(str(cohort_of(experiment, round)).encode())
    return digest.hexdigest()


def label_histograms(population: Sequence[Member], task: Task) -> list[list[int]]:
    """How many training examples of each class every participant holds."""
    assert task.dataset is not None
    labels = task.dataset.train.labels.numpy()
    classes = task.dataset.num_classes
    return [np.bincount(labels[member.train], minlength=classes).tolist() for member in population]
