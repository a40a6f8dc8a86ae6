"""A participant's grown model as a folder that plain `transformers` loads, with a card that says how it came about."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants

from fedsim.algorithm import ClientContext, ClientInfo, ServerContext
from fedsim.core.canonical import parsed, revived
from fedsim.core.environment import located
from fedsim.core.fields import refuse
from fedsim.core.sealed import Damaged
from fedsim.core.tree import PATH, State, flat, nested, sha256
from fedsim.data import bpe, text
from fedsim.data.byte_tokenizer import byte_tokenizer
from fedsim.data.config import DataConfig
from fedsim.data.content import sha256s
from fedsim.data.source import Split
from fedsim.engine.cohort import tiers_of
from fedsim.engine.cost import DryRun
from fedsim.experiment import Experiment
from fedsim.learning.meter import Meter
from fedsim.learning.task import Task
from fedsim.models import get_family
from fedsim.results import card
from fedsim.results import manifest as manifests
from fedsim.results import tables as results
from fedsim.results.provenance import code_sha256
from fedsim.results.store import TOKENIZER, hashes_of_tokenizer
from fedsim.storage.checkpoint import Versions, private_of
from fedsim.storage.place import Place, fetched


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_backends import PilBackend


def export(
    directory: Place, run_id: str | None, participant: int, to: Path, modules: Sequence[ModuleType] = ()
) -> Path:
    """Write the model `participant` would deploy after a finished run; needs no data, and fetches nothing.

    - `modules`: where classes of the run's config may lie that are neither fedsim's nor in a module imported already.

    **Raises:** `ValueError` naming what is not there: the run, the participant, its checkpoint, its tokenizer.
    """
    run = finished_run(directory, run_id)
    if hashlib.sha256(run["config"].encode()).hexdigest()[:16] != run["run_id"]:
        raise ValueError(f"{directory}: the config is not that of run {run['run_id']}, whose id is made of it")
    with offline():
        try:
            experiment: Experiment = revived(parsed(run["config"]), Experiment, modules)
        except ValueError as error:
            raise ValueError(f"run {run['run_id']}: {error}") from error
        return _exported(directory, run, experiment, participant, to)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Hugging Face's libraries find only what lies on this machine: a stored config may name anything."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _exported(directory: Place, run: dict[str, Any], experiment: Experiment, participant: int, to: Path) -> Path:
    if not 0 <= participant < experiment.participants:
        refuse("--participant", participant, f"from 0 to {experiment.participants - 1}")
    model, told = deployed(directory, run, experiment, participant)
    data, kept = experiment.task.data, directory / "checkpoints" / run["run_id"]
    if not data.class_names:
        data = replace(data, class_names=tuple((manifests.read(directory, run["run_id"]) or {}).get("classes", ())))
    if bpe.parsed(data.tokenizer) is None:
        check_tokenizer_folder(directory, run["run_id"], Path(located(data.tokenizer)))
        write(model, data, card.card(told), to)
        return to
    folder = kept / TOKENIZER
    if not folder.is_dir():
        raise ValueError(f"{folder}: the tokenizer that was trained for the run is not there any more")
    with fetched(folder) as here:
        check_tokenizer(directory, run["run_id"], here)
        write(model, replace(data, tokenizer=str(here)), card.card(told), to)
    return to


def finished_run(directory: Place, run_id: str | None) -> dict[str, Any]:
    """The row of the `runs` table of a finished run in a results folder.

    **Raises:** `ValueError` if there is no such run, it failed, or there are several and none is named.
    """
    runs = {row["run_id"]: row for row in results.rows_of(results.read_table(directory, "runs"), "runs")}
    if not runs:
        raise ValueError(f"{directory}: holds no run that finished or failed; resume the one that was cut")
    if run_id is None and len(runs) > 1:
        known = ", ".join(f"{id_} ({row['algorithm']}, seed {row['seed']})" for id_, row in runs.items())
        raise ValueError(f"--run: {directory} holds several runs, name one of {known}")
    chosen = run_id if run_id is not None else next(iter(runs))
    if chosen not in runs:
        refuse("--run", chosen, f"one of {', '.join(runs)}")
    if runs[chosen]["status"] != "finished":
        refuse("--run", chosen, f"a run that finished; this one failed ({runs[chosen]['error']}): resume it first")
    return runs[chosen]


def deployed(
    directory: Place, run: dict[str, Any], experiment: Experiment, participant: int
) -> tuple["PreTrainedModel", card.Deployed]:
    """The model of one participant after the last round, made as it is made for scoring, and what its card tells.

    **Raises:** `ValueError` if the checkpoints are not there.
    """
    run_id = run["run_id"]
    folder, manifest = directory / "checkpoints" / run_id, manifests.read(directory, run_id)
    if manifest is None:
        raise ValueError(f"{folder}: holds no checkpoint of run {run_id}")
    last = int(manifest["round"])
    if last != experiment.rounds:
        raise ValueError(f"{folder}: holds round {last} of a finished run of {experiment.rounds}: put back the last")
    clients = results.rows_of(results.read_run(directory, "clients", run_id), "clients")
    sizes = {row["client"]: row["num_examples"] or 0 for row in clients}  # null in a run that is published
    try:
        held, state = states_of(folder, last, participant, sealed=manifests.FILES in manifest)
    except Damaged as error:
        raise manifests.damaged(str(error), directory, run_id) from error
    if state is None and participant not in sizes:
        raise ValueError(f"--participant={participant}: took part in no round of run {run_id}")
    state = {} if state is None else state  # an empty one is not written
    parts = any(not isinstance(each, torch.Tensor) for each in (*held.values(), *state.values()))
    if not parts and run["code_sha256"] != code_sha256(experiment.algorithm, experiment.task.family, experiment.start):
        held, state = in_parts(experiment, last, held, state, participant)

    population = [
        ClientInfo(id_, tier.name, tier.form, sizes.get(id_, 0), checkpoint=tier.checkpoint)
        for id_, tier in enumerate(tiers_of(experiment))
    ]
    task, algorithm, info = Task(experiment.task), experiment.algorithm, population[participant]
    seed, middle, target = experiment.seed, experiment.middle, experiment.target
    start, forms = experiment.start, experiment.forms
    at_server = ServerContext(seed, last, task, middle, target, population, start)
    nothing, cpu = Split({}, torch.zeros(0, dtype=torch.long)), torch.device("cpu")
    meter, precision = Meter({}), experiment.precision
    at_client = ClientContext(seed, last, task, middle, target, info, nothing, cpu, meter, precision, forms, start)
    payload = algorithm.server_broadcast(held, [info], at_server)[participant]
    model: Any = algorithm.client_model(payload, state, at_client)
    if not hasattr(model, "config"):
        raise ValueError(f"run {run_id}: {algorithm.name} deploys several models, which no folder can hold")
    told = card.Deployed(
        experiment=experiment,
        form=get_family(experiment.task.family).form(model.config),
        info=info,
        round=last,
        run=run,
        clients=sorted((row for row in clients if row["client"] == participant), key=lambda row: row["round"]),
        received=payload,
        private=state,
    )
    return model, told


def states_of(folder: Place, last: int, participant: int, sealed: bool) -> tuple[State, State | None]:
    """What the server and a participant hold after round `last`; None: nothing is written of the participant.

    - `sealed`: compare the private state with the hash that the server has of it; earlier versions of fedsim wrote
      files without seals.

    **Raises:** `Damaged` naming what is missing, or not as it was written.
    """
    versions, own = Versions(folder, "server"), private_of(folder / "private", participant)
    server, private = versions.load(last + 1, sealed), own.load(last + 1, sealed)
    if server is None or server.number != last:
        raise Damaged(f"{versions.path(last)}: is missing")
    known = json.loads(server.metadata.get("private", "{}")).get(str(participant)) if sealed else None
    if known not in (None, sha256({}) if private is None else private.sha256):
        raise Damaged(f"{own.folder}: the private state of participant {participant} after round {last} is missing")
    return server.state, None if private is None else private.state


def check_tokenizer_folder(directory: Place, run_id: str, folder: Path) -> None:
    """Compare a tokenizer that the run was told of with what the run has read.

    **Raises:** `ValueError` naming a file that has changed, with both hashes.
    """
    content = (manifests.read(directory, run_id) or {}).get("content") or {}
    read, now = content.get("files", {}), sha256s(folder) if folder.is_dir() else {}
    for path, digest in now.items():
        if read.get(path, digest) != digest:
            raise ValueError(f"{path} has changed since run {run_id} read it: sha256 {read[path]} then, {digest} now")


def check_tokenizer(directory: Place, run_id: str, here: Path) -> None:
    """Compare a run's tokenizer, copied to `here`, with its manifest. **Raises:** `Damaged` naming a file."""
    listed = (manifests.read(directory, run_id) or {}).get(manifests.FILES)
    if listed is None:
        return  # of an earlier version
    found = hashes_of_tokenizer(here, run_id)
    known = {name: digest for name, digest in listed.items() if name.startswith(f"checkpoints/{run_id}/{TOKENIZER}/")}
    for name in sorted(found.keys() | known.keys()):
        if found.get(name) != known.get(name):
            what = "is missing" if name not in found else "is not as it was written"
            raise manifests.damaged(f"{directory / name}: {what}", directory, run_id)


def in_parts(experiment: Experiment, last: int, server: State, private: State, participant: int) -> tuple[State, State]:
    """Both states of a run of another version, nested as they are in this one.

    The first version wrote them flat, with the names of parts in front ("middle.vit..."). What the parts are, the same
    experiment without data tells.
    """
    dry_run, tier = DryRun(experiment, {}), experiment.tiers.index(tiers_of(experiment)[participant])
    start, _ = dry_run.begin()
    calls = dry_run.train(start, last)
    after = dry_run.aggregate(start, last, calls)
    examples = (start.server | after.server, start.private[tier] | calls[tier].state)
    found = []
    for state, example in zip((server, private), examples, strict=True):
        paths = {path.replace(PATH, "."): path for path in flat(example)}
        found.append(nested({paths.get(name, name): tensor for name, tensor in flat(state).items()}))
    return found[0], found[1]


def write(model: "PreTrainedModel", data: DataConfig, readme: str, to: Path) -> None:
    """The folder: model, what brings data to it, and README.

    **Raises:** `ValueError` if the folder cannot be written to, or the tokenizer is gone.
    """
    describe(model, data)
    preprocessor = image_processor(data) if data.kind == "image" else text_tokenizer(data)
    try:
        to.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(to)
        preprocessor.save_pretrained(to)
        (to / "README.md").write_text(readme, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--to={str(to)!r}: not a folder that can be written to ({error})") from error


def describe(model: "PreTrainedModel", data: DataConfig) -> None:
    """Put into the config what users of the model rely on, and training had no use for."""
    if data.kind == "lm":
        model.config.use_cache = True
        assert model.generation_config is not None
        model.generation_config.use_cache = True
    if data.kind in ("image", "text"):
        model.config.problem_type = "single_label_classification"
    if data.class_names and data.kind in ("image", "text", "tokens"):
        model.config.id2label = dict(enumerate(data.class_names))
        model.config.label2id = {name: number for number, name in enumerate(data.class_names)}


def image_processor(data: DataConfig) -> "PilBackend":
    """What `fedsim.data.vision` does to an image, or to a grey one where `data.channels` is 1.

    What is transparent is laid on white; then bilinear resizing to a square and `(x / 255 - mean) / std`, with halves
    for `x / 127.5 - 1`, which rounds alike. Works without torchvision. Pipelines turn images the way up that cameras
    say; images given to the processor itself are taken as they lie.
    """
    from PIL.Image import Resampling
    from transformers import ViTImageProcessorPil

    half = (0.5,) * data.channels
    return ViTImageProcessorPil(
        do_convert_rgb=data.channels == 3,
        do_resize=True,
        size={"height": data.image_size, "width": data.image_size},
        resample=Resampling.BILINEAR,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[*(data.image_mean or half)],
        image_std=[*(data.image_std or half)],
    )


def text_tokenizer(data: DataConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer that made the data, set to cut and pad as they were."""
    if data.tokenizer == "bytes":
        return byte_tokenizer(data.kind, data.max_length)
    # Types of tokens, which some tokenizers add, were never given to the model.
    settings: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    if data.kind == "tokens":
        settings["add_prefix_space"] = True  # as for the lists of words that were learned from
    tokenizer = text.pretrained_tokenizer(data.tokenizer, data.hub, **settings)
    tokenizer.model_max_length = data.max_length
    return tokenizer
