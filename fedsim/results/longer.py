"""Runs that go on where a shorter one ended: the same experiment but for `rounds`.

No method is told how many rounds there will be, so the shorter run's rounds are the longer one's too. All but its last:
after that one everybody is scored, and so it is computed once more.
"""

import json
import re
import shutil
from collections.abc import Sequence

from fedsim.core.canonical import with_todays_names
from fedsim.experiment import Experiment
from fedsim.results import tables as results
from fedsim.results.store import RunStore, config_of, run_ids_in
from fedsim.storage.place import Place, fetched, sent


STATE = re.compile(r".*\.(\d+)\.safetensors")


def shorter_runs(directory: Place, experiments: Sequence[Experiment]) -> dict[str, tuple[int, str]]:
    """By run id: the rounds and the run id of the longest run in the folder that has fewer rounds, where one is."""
    there: dict[str, list[tuple[int, str]]] = {}
    for run_id in sorted(run_ids_in(directory)) if experiments else ():
        if config := config_of(directory, run_id):
            rounds, rest = _apart(config)
            there.setdefault(rest, []).append((rounds, run_id))
    found = {}
    for experiment in experiments:
        rounds, rest = _apart(experiment.canonical_json())
        if fewer := [each for each in there.get(rest, ()) if each[0] < rounds]:
            found[experiment.run_id] = max(fewer)
    return found


def begin_from(store: RunStore, rounds: int, run_id: str) -> bool:
    """Make an unfinished run of what a shorter one, of so many `rounds`, has finished; it stays as it is.

    **Returns:** False, and nothing is made, where nothing can be taken from it: its checkpoints are gone, or it was
    computed by other sources or from other data.
    """
    directory, before = store.directory, RunStore(store.directory, run_id, store.code_sha256, store.content)
    manifest = before._manifest()
    last = min(int(manifest["round"]), rounds - 1) if manifest else -1
    if manifest is None or last < 0 or before.outdated_by() or before._content_change():
        return False
    rows = before._rows("rounds", last)
    if [row["round"] for row in rows] != list(range(last + 1)):
        return False
    store.open(resume=False, numerics=manifest["numerics"][-1])
    with fetched(before.folder) as here, sent(store.folder) as there:
        shutil.copytree(here, there, ignore=_newer_than(last), dirs_exist_ok=True)
    store.numerics = manifest["numerics"]
    relabelled = [row | {"run_id": store.run_id} for row in rows]
    clients = results.arrow_of_run(directory, "clients", run_id, last).to_pylist()
    columns = {name: [row[name] for row in clients] for name in results.TABLES["clients"].names}
    store.rounds = relabelled[:-1]
    store.commit(last, relabelled[-1], columns | {"run_id": [store.run_id] * len(clients)})
    profile = results.arrow_of_run(directory, "profile", run_id, last).to_pylist()
    if profile:
        store.add_profile([row | {"run_id": store.run_id} for row in profile])
    return True


def _newer_than(last: int):
    """For `shutil.copytree`: the manifest, and states of rounds after `last`."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        newer = [name for name in names if (match := STATE.fullmatch(name)) and int(match.group(1)) > last]
        return [*newer, *(name for name in names if name == "manifest.json" or name.startswith("."))]

    return left_out


def _apart(config: str) -> tuple[int, str]:
    """The rounds of an experiment, and everything else of it, from its canonical JSON."""
    fields = with_todays_names(json.loads(config))
    return fields.pop("rounds"), json.dumps(fields, sort_keys=True)
