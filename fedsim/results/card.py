"""The model card of an exported model: how it was grown, what was shared for it, what it scored, how to use it."""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

from fedsim.algorithm import ClientInfo, Payload
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
    experiment, algorithm, info = model.experiment, model.experiment.algorithm, model.info
    sections = {
        "How it was grown": grown(model),
        "What was private, what was shared": shared(model),
        "Scores": scores(model),
        "How to use it": f"Run where this file lies, or put the folder's path for `folder`:\n\n"
        f"```python\n{snippet(experiment)}```",
        "Limits": limits(experiment),
        "The run": run(model),
    }
    family = experiment.task.family.rpartition(".")[2]
    opening = f"""{front_matter(model)}
# {family} {model.form}, {algorithm.name}, participant {info.id}

The model that participant {info.id} of a simulated federation would deploy: a research result, not a product.
"""
    return opening + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def front_matter(model: Deployed) -> str:
    """The card's metadata; values are JSON, which is YAML as well."""
    experiment = model.experiment
    algorithm, data = experiment.algorithm, experiment.task.data
    tags = ["federated-learning", *(["model-growth"] if algorithm.preset_name else []), algorithm.name]
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": PIPELINES[data.kind], "tags": tags}
    if data.name in KNOWN:
        fields["datasets"] = [KNOWN[data.name].hub_name]
    checkpoint = model.info.checkpoint
    if checkpoint is not None and checkpoint.hub:
        fields["base_model"] = checkpoint.path
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def grown(model: Deployed) -> str:
    """The method, the forms, the round and the federation."""
    experiment, info = model.experiment, model.info
    algorithm, partition = experiment.algorithm, experiment.partition
    about = (inspect.getdoc(type(algorithm)) or "").partition("\n")[0]
    preset, forms = "", f"- The participant's class of device is `{info.tier}`; no small model was grown."
    if algorithm.preset_name:
        preset = f", preset `{algorithm.preset_name}`"
        forms = f"""\
- Small model: {described(info.form)}; {origin(info)}; class of device `{info.tier}`.
- Intermediate form: {described(experiment.middle)}.
- Target form: {described(experiment.target)}."""
    dealt = partition.scheme
    if partition.scheme in ("dirichlet", "by_size"):
        dealt += f", alpha {partition.alpha}"
    return f"""\
- Method: `{algorithm.name}`{preset}. {about}
{forms}
- This model: {described(model.form)}, after round {model.round} of {experiment.rounds}, seed {experiment.seed}.
- Rounds: {stages(experiment)}.
- Federation: {experiment.participants} participants, {experiment.cohort or experiment.participants} in each round.
- Data: `{experiment.task.data.name}`, dealt to the participants by `{dealt}`."""


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


def shared(model: Deployed) -> str:
    """What travelled, and what did not: counts of the tensors themselves."""
    sent, received = (max((row[column] for row in model.clients), default=0) for column in ("bytes_up", "bytes_down"))
    uploads = [row["upload_params"] for row in model.clients if row["upload_params"]]
    upload = f"at most {max(uploads):,} parameters ({sent / 1e6:.3f} MB) in a round" if uploads else "nothing"
    examples = f"{model.info.num_examples:,} training examples"
    return f"""\
- The participant sent {upload}, and received at most {received / 1e6:.3f} MB in a round.
- For this model the server sends, after the last round, {counted(model.received)}.
- The participant adds what it holds in its own state, {counted(model.private)}.
- Its {examples} never left it.
- Whoever publishes this folder publishes what the model learned from private data. Nothing was done to hide single
  examples: no differential privacy, no secure aggregation."""


def counted(tree: Mapping[str, Any]) -> str:
    """Parameters of a tree, and the first parts of their names."""
    if not tree:
        return "nothing"
    groups = sorted({name.partition(".")[0] for name in tree})
    names = ", ".join(f"`{group}`" for group in groups)
    return f"{numel(dict(tree)):,} parameters ({nbytes(tree) / 1e6:.3f} MB): {names}"


def scores(model: Deployed) -> str:
    """A table of the participant's scores in the last round in which it was scored."""
    scored = [row for row in model.clients if row["accuracy"] is not None]
    if not scored:
        return "This participant was never scored."
    row = scored[-1]
    unit = "tokens" if model.experiment.task.data.kind in ("tokens", "lm", "mlm") else "examples"
    lines = [
        f"| {name} | {row[name]:.4f} | {meaning} |" for name, meaning in SCORES.items() if row.get(name) is not None
    ]
    table = "\n".join(["| score | value | what of |", "| --- | ---: | --- |", *lines])
    held = f" The test set holds {row['num_test_examples']:,} examples." if row["num_test_examples"] else ""
    return f"After round {row['round']}; accuracies are shares of {unit}.{held}\n\n{table}"


def snippet(experiment: Experiment) -> str:
    """Python that loads the folder it runs in and uses the model once."""
    data = experiment.task.data
    kind, auto_class = data.kind, AUTO_CLASSES[data.kind]
    if kind == "image":
        mode = "L" if data.channels == 1 else "RGB"
        return f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

folder = "."
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
model = {auto_class}.from_pretrained(folder)
image = Image.open("image.png").convert("{mode}")
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])
"""
    loading = f"""\
import torch
from transformers import {auto_class}, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
"""
    if kind == "lm":
        return f"""{loading}
prompt = tokenizer("The", add_special_tokens=False, return_tensors="pt")
text = model.generate(**prompt, do_sample=False, max_length={min(data.max_length, 64)})
print(tokenizer.decode(text[0], skip_special_tokens=True))
"""
    if kind == "mlm":
        return f"""{loading}
batch = tokenizer(f"The {{tokenizer.mask_token}}", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
print(tokenizer.decode(logits[batch["input_ids"] == tokenizer.mask_token_id].argmax(-1)))
"""
    if kind == "text":
        return f"""{loading}
batch = tokenizer(["One text.", "Another."], truncation=True, padding="max_length", return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
print([model.config.id2label[int(best)] for best in logits.argmax(-1)])
"""
    # The first token of a word carries its tag. Word pieces know their words; bytes only know their places in the text.
    if data.tokenizer == "bytes":
        words = """\
batch = tokenizer(" ".join(words), truncation=True, padding="max_length", return_tensors="pt")
places = [len(" ".join([*words[:number], ""])) for number in range(len(words))]
first = [batch.char_to_token(place) for place in places]
"""
    else:
        words = """\
batch = tokenizer(words, is_split_into_words=True, truncation=True, padding="max_length", return_tensors="pt")
first = [batch.word_to_tokens(number) for number in range(len(words))]
first = [span.start if span else None for span in first]
"""
    return f"""{loading}
words = ["Ada", "met", "Bob"]
{words}with torch.no_grad():
    best = model(**batch).logits[0].argmax(-1)
print([(word, model.config.id2label[int(best[at])]) for word, at in zip(words, first) if at is not None])
"""


def limits(experiment: Experiment) -> str:
    """What the model is not, and where its input is not what it was in training."""
    data = experiment.task.data
    lines = [
        "A research simulation: all participants ran on machines of one owner, and their data were dealt from one set.",
        "Small, and trained briefly; not examined for bias, safety or use outside these data.",
    ]
    if data.kind == "image":
        mode = "grey" if data.channels == 1 else "RGB"
        lines.append(
            f"Images are {data.image_size} x {data.image_size}, {mode}. The processor does what training did, to the "
            'bit, with `backend="pil"` and images converted as above; torchvision resizes a little differently.'
        )
    else:
        lines.append(f"Texts of at most {data.max_length} tokens; what lies beyond is not read.")
        if data.tokenizer == "bytes":
            lines.append("A token is one byte of the UTF-8 text.")
        if data.kind == "mlm":
            lines.append("Masks are written into the text as `tokenizer.mask_token`.")
    if data.kind == "lm":
        lines.append("A prompt is given without the end token (`add_special_tokens=False`).")
    return "\n".join(f"- {line}" for line in lines)


def run(model: Deployed) -> str:
    """Where the numbers come from."""
    experiment, row = model.experiment, model.run
    versions = ", ".join(f"{package} {version}" for package, version in json.loads(row["versions"]).items())
    commit = f", commit `{row['git_commit']}`" if row["git_commit"] else ""
    return f"""\
- Run `{experiment.run_id}`, sources `{row["code_sha256"]}`{commit}.
- Computed with {versions}.

Its settings:

```json
{json.dumps(json.loads(experiment.canonical_json()), indent=2)}
```"""
