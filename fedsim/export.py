"""A participant's grown model as a folder that plain `transformers` loads."""

import json
from pathlib import Path

import torch

from fedsim.algorithm import ClientContext, ClientInfo, ServerContext
from fedsim.checkpoint import Versions, read_json
from fedsim.cohort import tiers_of
from fedsim.data.source import Split
from fedsim.experiment import Experiment, revived
from fedsim.fields import refuse
from fedsim.results import read_table
from fedsim.task import Task
from fedsim.training import Meter


def experiment_of(directory: Path, run_id: str | None) -> Experiment:
    """The experiment of a finished run in a results folder.

    **Raises:** `ValueError` if there is no such run, or several and none is named.
    """
    runs = read_table(directory, "runs").set_index("run_id")
    if runs.empty:
        raise ValueError(f"{directory}: holds no run that finished or failed; resume the one that was cut")
    if run_id is None and len(runs) > 1:
        known = ", ".join(f"{id_} ({row.algorithm}, seed {row.seed})" for id_, row in runs.iterrows())
        raise ValueError(f"--run: {directory} holds several runs, name one of {known}")
    chosen = run_id if run_id is not None else next(iter(runs.index), None)
    if chosen not in runs.index:
        refuse("--run", chosen, f"one of {', '.join(runs.index)}")
    return revived(json.loads(str(runs.loc[chosen, "config"])))


def export(directory: Path, run_id: str | None, participant: int, to: Path) -> Path:
    """Write the model `participant` would deploy after the last finished round; needs no data.

    **Raises:** `ValueError` naming what is not there: the run, the participant, its checkpoint.
    """
    experiment = experiment_of(directory, run_id)
    if not 0 <= participant < experiment.participants:
        refuse("--participant", participant, f"from 0 to {experiment.participants - 1}")
    folder = directory / "checkpoints" / experiment.run_id
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        raise ValueError(f"{folder}: holds no checkpoint of run {experiment.run_id}")
    last = int(manifest["round"])
    server = Versions(folder, "server").load(last + 1)
    private = Versions(folder / "private", str(participant)).load(last + 1)
    if server is None or private is None:
        raise ValueError(f"--participant={participant}: took part in no round of run {experiment.run_id}")

    task, algorithm = Task(experiment.task), experiment.algorithm
    tier = tiers_of(experiment)[participant]
    info = ClientInfo(participant, tier.name, tier.form, 0)
    seed, middle, target = experiment.seed, experiment.intermediate, experiment.target
    at_server = ServerContext(seed, last, task, middle, target, [info])
    nothing, cpu = Split({}, torch.zeros(0, dtype=torch.long)), torch.device("cpu")
    at_client = ClientContext(seed, last, task, middle, target, info, nothing, cpu, Meter("", {}))
    payload = algorithm.server_broadcast(server[1], [info], at_server)[participant]
    model = algorithm.client_model(payload, private[1], at_client)
    try:
        to.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(to)  # type: ignore[operator]  # every family builds Hugging Face models
        (to / "README.md").write_text(card(experiment, participant, last, str(tier.form)))
    except OSError as error:
        raise ValueError(f"--to={str(to)!r}: not a folder that can be written to ({error})") from error
    return to


def card(experiment: Experiment, participant: int, round: int, small: str) -> str:
    """A model card that says how the model came about."""
    algorithm, data = experiment.algorithm, experiment.task.data
    grown = f", preset `{algorithm.preset_name}`" if algorithm.preset_name else ""
    return f"""---
library_name: transformers
tags: [federated-learning, model-growth]
---

# {algorithm.name}, participant {participant}, {experiment.target}

- Method: `{algorithm.name}`{grown}, after round {round} of {experiment.rounds}, seed {experiment.seed}.
- Small form of this participant: {small}; intermediate: {experiment.intermediate}; this model: {experiment.target}.
- Data: `{data.name}`, dealt to {experiment.participants} participants ({experiment.partition.scheme}).
- Run `{experiment.run_id}`. Its settings:

```json
{json.dumps(json.loads(experiment.canonical_json()), indent=2)}
```
"""
