"""LiRA online, across finished runs that differ in their seed alone (Carlini et al. 2022, algorithm 1).

    score(x) = log N(phi; mu_in, sigma_in) - log N(phi; mu_out, sigma_out)

    phi      log(p_y / (1 - p_y)) of x under the model made of the attacked update
    in, out  the same under models of other runs, made of the updates of who held x there, and of who did not

One run does not do. Its shards never change, so that the "in" models of an example would all be those of one
participant, in other rounds, and for its own examples of the very one that is attacked: the score would tell
participants apart, and presume the answer. Another seed deals all examples anew, whoever holds them in the attacked
run: "in" and "out" are made in the same way for members and for others. Examples of a natural group always go together,
so that models in and out would tell the group: such partitions are left out. So are examples with fewer than two models
on either side, which takes three seeds.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedsim.core.seeding import numpy_generator
from fedsim.core.tree import flat
from fedsim.models import Form
from fedsim.privacy.attacks import membership
from fedsim.privacy.kept import Run
from fedsim.privacy.measures import Value


SEEDS = 3  # as many runs, at least: the attacked one, and two in each of which somebody held an example


@dataclasses.dataclass(frozen=True)
class Seen:
    """Examples under one update's model, at one level of knowledge: phi `(N,)`, and who of them was trained on."""

    run_id: str
    client: int
    level: str
    form: Form
    phi: np.ndarray
    held: np.ndarray


def across_seeds(
    runs: Sequence[Run], round: int, participants: int, examples: int
) -> Iterator[tuple[str, tuple[str, str, int, dict[str, Value]]]]:
    """Of each of these runs, by its id, what the attack finds of a round's updates.

    - `runs`: of one experiment, by different seeds. - `participants`: of each, at most. - `examples`: likewise.
    """
    if len(runs) < SEEDS or runs[0].experiment.partition.scheme == "natural":
        return
    dataset = runs[0].task.dataset
    assert dataset is not None
    pool = numpy_generator(0, "audit/online").permutation(len(dataset.train))[:examples]
    labels = dataset.train.labels[torch.from_numpy(pool)]
    seen = [each for run in runs for each in seen_of(run, round, participants, pool)]
    for target in seen:
        alike = [each for each in seen if (each.level, each.form) == (target.level, target.form)]
        others = [each for each in alike if each.run_id != target.run_id]
        if not others:
            continue
        scores = membership.likelihood_ratio_online(
            target.phi, np.stack([each.phi for each in others]), np.stack([each.held for each in others])
        )
        sides = [np.flatnonzero(side & np.isfinite(scores)) for side in (target.held, ~target.held)]
        stream = numpy_generator(0, "audit/online/pairs", round, target.client)
        places = membership.matched(labels[sides[0]], labels[sides[1]], stream)
        if len(places[0]) < membership.FEWEST:
            continue
        found = membership.readings(*(scores[side[place]] for side, place in zip(sides, places, strict=True)))
        yield target.run_id, ("likelihood_online", target.level, target.client, found)


def seen_of(run: Run, round: int, participants: int, pool: np.ndarray) -> Iterator[Seen]:
    """What the models of a run's updates say of a pool of training examples, by their places."""
    assert run.task.dataset is not None
    split = run.task.dataset.train.select(pool)
    for client in run.rounds.get(round, ())[:participants]:
        member = run.population[client]
        for level, replay in run.replays(round, client).items():
            sent = replay.exchange.sent
            if replay.sends_what_it_receives and flat(sent):
                phi = membership.confidences(run.task, replay.model(sent), split)[:, 1]
                yield Seen(run.run_id, client, level, member.info.form, phi, np.isin(pool, member.train))
