"""Methods whose rows stand in one table must have met the same federation: checked before anything starts."""

import json
from collections import defaultdict
from collections.abc import Sequence

from fedsim.core.canonical import canonical
from fedsim.engine.cohort import federation_sha256, members
from fedsim.experiment import Experiment
from fedsim.learning.task import load_task
from fedsim.sweeps.differences import differences
from fedsim.sweeps.progress import label_of


# All that decides which participants there are, what they hold, and who of them takes part when.
FEDERATION = ("task", "tiers", "partition", "participants", "cohort", "rounds", "seed", "validation_share")


def check_fair(experiments: Sequence[Experiment], data_dir: str | None) -> None:
    """Hold the experiments of a suite against those that a report puts into one table with them.

    Where all that decides the federation is equal, nothing has to be loaded; where it is not, the data are dealt.

    **Raises:** `ValueError` naming two runs that would meet different federations, and the fields they differ in.
    """
    tables: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        tables[_table(experiment)].append(experiment)
    for compared in tables.values():
        ways: dict[str, Experiment] = {}
        for experiment in compared:
            ways.setdefault(_federation(experiment), experiment)
        first, *others = ways.values()
        if not others:
            continue
        met = _met(first, data_dir)
        for other in others:
            if _met(other, data_dir) != met:
                found = differences(_federation(first), _federation(other))
                differ = ", ".join(f"{path} is {one!r} and {two!r}" for path, (one, two) in found.items())
                raise ValueError(
                    f"{label_of(first)} and {label_of(other)} would stand in one table, but not meet the same "
                    f"federation: {differ}"
                )


def _table(experiment: Experiment) -> str:
    """What a report tells tables apart by, and the seed."""
    task, dealt, cohort = experiment.task, experiment.partition, experiment.cohort or experiment.participants
    setting = (task.data, task.family, dealt.scheme, dealt.alpha, experiment.participants, cohort, experiment.seed)
    return json.dumps([canonical(each) for each in (*setting, experiment.forms)])


def _federation(experiment: Experiment) -> str:
    return json.dumps({name: canonical(getattr(experiment, name)) for name in FEDERATION}, sort_keys=True)


def _met(experiment: Experiment, data_dir: str | None) -> str:
    return federation_sha256(experiment, members(experiment, load_task(experiment.task, data_dir)))
