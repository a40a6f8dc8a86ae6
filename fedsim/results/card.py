"""The model card of an exported model: how it was grown, what was shared for it, what it scored, how to use it.

`templates/card.j2` is the card; here is what it is filled with.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsim.algorithm import ClientInfo, Payload
from fedsim.core.text import printable
from fedsim.core.tree import State, nbytes, numel
from fedsim.data.config import KNOWN
from fedsim.experiment import Experiment
from fedsim.models import Form
from fedsim.results.records import stage_of


PIPELINES = {
    "image": "image-classification",
    "text": "text-classification",
    "tokens": "token-classification",
    "lm": "text-generation",
    "mlm": "fill-mask",
}
AUTO_CLASSES = {
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "lm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
}
SCORES = {  # columns of the `clients` table
    "accuracy": "on the global test set",
    "loss": "on the global test set, mean negative log-likelihood",
    "precision": "of entities, on the global test set",
    "recall": "of entities, on the global test set",
    "f1": "of entities, on the global test set",
    "accuracy_local": "on what the participant itself meets: classes in its own shares, or its own held-out part",
    "accuracy_val": "on the participant's own validation examples",
}


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What there is to tell of a model that is exported.

    - `form`: of the model. - `info`: of the participant whose model it is. - `round`: the last one that was finished.
    - `run`: the run's row of the `runs` table. - `clients`: the participant's rows of `clients`, oldest first.
    - `received`, `private`: what the server sends for this model, and what the participant adds and never sends.
    """

    experiment: Experiment
    form: Form
    info: ClientInfo
    round: int
    run: Mapping[str, Any]
    clients: list[dict[str, Any]]
    received: Payload
    private: State


def card(model: Deployed) -> str:
    """A README for the exported folder: front matter of a model card, then prose."""
    experiment, data = model.experiment, model.experiment.task.data
    loader = PackageLoader("fedsim.results")
    environment = Environment(
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    text = environment.get_template("card.j2").render(
        metadata=metadata(model).to_yaml(),
        model=model,
        experiment=experiment,
        algorithm=experiment.algorithm,
        info=model.info,
        data=data,
        dealt=experiment.partition,
        family=experiment.task.family.rpartition(".")[2],
        about=(inspect.getdoc(type(experiment.algorithm)) or "").partition("\n")[0],
        origin=origin(model.info),
        stages=stages(experiment),
        described=described,
        counted=counted,
        sent=max((row["bytes_up"] for row in model.clients), default=0),
        received=max((row["bytes_down"] for row in model.clients), default=0),
        uploaded=max((row["upload_params"] or 0 for row in model.clients), default=0),
        scored=next((row for row in reversed(model.clients) if row["accuracy"] is not None), None),
        scores=SCORES,
        auto_class=AUTO_CLASSES[data.kind],
        versions=json.loads(model.run["versions"]),
        settings=json.dumps(json.loads(experiment.canonical_json()), indent=2),
    )
    return text + "\n"


def metadata(model: Deployed) -> ModelCardData:
    """The card's front matter."""
    algorithm, data, checkpoint = model.experiment.algorithm, model.experiment.task.data, model.info.checkpoint
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[data.kind],
        tags=["federated-learning", *(["model-growth"] if algorithm.preset_name else []), algorithm.name],
        datasets=[KNOWN[data.name].hub_name] if data.name in KNOWN and KNOWN[data.name].hub_name else None,
        base_model=checkpoint.path if checkpoint is not None and checkpoint.hub else None,
    )


def origin(info: ClientInfo) -> str:
    """Where the participant's small model came from."""
    if info.checkpoint is None:
        return "trained on the participant's own data"
    revision = f" at revision `{info.checkpoint.revision}`" if info.checkpoint.revision else ""
    return f"from the checkpoint `{info.checkpoint.path}`{revision}"


def stages(experiment: Experiment) -> str:
    """Which rounds were of which stage, round 0 included: `0 local, 1 to 8 federated, 9 to 10 finetune`."""
    named = [stage_of(experiment, round) for round in range(experiment.rounds + 1)]
    spans, first = [], 0
    for round, stage in enumerate(named):
        if round == experiment.rounds or named[round + 1] != stage:
            spans.append(f"{first} {stage}" if first == round else f"{first} to {round} {stage}")
            first = round + 1
    return ", ".join(spans)


def described(form: Form) -> str:
    """A form in words."""
    grouped = "" if form.kv_heads in (None, form.heads) else f" in {form.kv_heads} groups"
    sizes = f"{form.heads} heads{grouped} of {form.head_size}, feed-forward width {form.inner}"
    return f"{form} (width x depth; {sizes})"


def counted(tree: Mapping[str, Any]) -> str:
    """Parameters of a tree, and the first parts of their names."""
    if not tree:
        return "nothing"
    groups = sorted({name.partition(".")[0] for name in tree})
    names = ", ".join(f"`{group}`" for group in groups)
    return f"{numel(dict(tree)):,} parameters ({nbytes(tree) / 1e6:.3f} MB): {names}"
