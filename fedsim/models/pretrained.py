"""Pretrained small models: a folder that `transformers` saved, or a name on the hub.

A checkpoint is taken only if the model it holds is the one the experiment says: the same family and form, the same
constants (activation, positions, vocabulary; `Family.constants`), every parameter of its body. Only its head may be
another's: where a checkpoint has none, or one for another number of classes, the head is drawn from the experiment's
seed, alike for all who start from it; a head for the same number of classes is kept, whatever its classes are called.
Weights are read as fp32, in whatever precision they were saved.

ViT checkpoints may be DeiT's where these are saved as `vit`; a model of type `deit` has a distillation token and is
another family.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.core import tree as trees
from fedsim.core.environment import located
from fedsim.core.fields import refuse
from fedsim.core.seeding import derive, torch_seeded
from fedsim.core.tree import Tree
from fedsim.data.config import DataConfig
from fedsim.data.content import Stamp, stamp
from fedsim.models import Family, Form, Inputs, get_family, heads, preparation
from fedsim.models.checkpoint import (
    Checkpoint,
    check_content,
    file_of,
    files_of,
    named,
    on_disk,
    readable,
    source_of,
)


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Fields of a Hugging Face config that the experiment decides elsewhere than in `task.settings`.
DECIDED = {"image_size": "task.data.image_size", "num_channels": "task.data.channels", "patch_size": "task.patch_size"}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def form_of(family: str, checkpoint: Checkpoint) -> Form:
    """The form of a checkpoint's model, every field given; reads its config alone.

    **Raises:** `ValueError` if there is no such checkpoint, or it is another family's.
    """
    return _form(get_family(family), family, _config(checkpoint), checkpoint)


def load(family: str, form: Form, inputs: Inputs, checkpoint: Checkpoint, seed: int) -> Tree:
    """The parameters of a checkpoint's model, fp32 on the CPU, under the names of the family's `specs`.

    Read once a process: all who start from it hold the same tensors, which nobody may write to.

    **Arguments:**

    - `seed`: the experiment's; a head that the checkpoint lacks is drawn from it.

    **Raises:** `ValueError` naming what is not as the experiment says: a field with both values, or parameters.
    """
    check_content(checkpoint)
    return dict(_loaded(family, form, inputs, checkpoint, seed, stamp(*files_of(checkpoint))))


def check(family: str, form: Form, inputs: Inputs, checkpoint: Checkpoint, seed: int, data: DataConfig) -> None:
    """Everything that can be wrong with a checkpoint, before anything starts from it.

    - `data`: the task's.

    **Raises:** `ValueError` as `load` does, or for a tokenizer or a preparation of images that is not the task's.
    """
    _check_config(family, form, inputs, checkpoint)
    if data.kind == "image":
        _check_images(data, checkpoint)
    _check_tokenizer(data.tokenizer, data.hub, inputs, checkpoint, stamp(files_of(checkpoint)[0].parent))
    load(family, form, inputs, checkpoint, seed)


def fixed_settings(family_name: str, inputs: Inputs, owners: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Constants of checkpoints that are neither in `inputs.settings` nor what the data give: all models of an
    experiment share them.

    Reads configs on this machine alone. What cannot be read, and what no model of these data can have, is left for
    `check` to refuse. A vocabulary is taken only where its tokenizer lies beside it, which `check` compares.

    - `owners`: the checkpoints, by what messages call those who name them.

    **Raises:** `ValueError` for two checkpoints that differ in such a constant, naming both.
    """
    named_files = [on_disk(each, name) for each in owners.values() for name in ("config.json", *TOKENIZER_FILES)]
    files = stamp(*(path for path in named_files if path is not None))
    return dict(_fixed_settings(family_name, inputs, tuple(owners.items()), files))


@functools.lru_cache(maxsize=64)  # suites of hundreds of experiments name the same few checkpoints
def _fixed_settings(
    family_name: str, inputs: Inputs, owners: tuple[tuple[str, Checkpoint], ...], files: Stamp
) -> dict[str, Any]:
    family, given = get_family(family_name), {*DECIDED, *(name for name, _ in inputs.settings)}
    first: dict[str, tuple[Any, str]] = {}
    fixed: dict[str, Any] = {}
    for owner, checkpoint in owners:
        try:
            if (path := on_disk(checkpoint, "config.json")) is None:
                continue
            held = _config(checkpoint, path)
            form = _form(family, family_name, held, checkpoint)
            family.check(form, inputs)
            ours = family.shared(family.config(form, inputs))
        except ValueError:
            continue
        theirs, by = family.shared(held), f"{owner}: {named(checkpoint)}"
        left = {name: value for name, value in theirs.items() if name not in given}
        for name, value in left.items():
            other, whose = first.setdefault(name, (value, by))
            if value != other:
                raise ValueError(f"{by}: {name} is {value!r}, but {other!r} in {whose}: must be one for all models")
        if not any(on_disk(checkpoint, name) for name in TOKENIZER_FILES):
            left.pop("vocab_size", None)
        left = {name: value for name, value in left.items() if ours.get(name) != value}
        with contextlib.suppress(ValueError):
            family.check(form, dataclasses.replace(inputs, settings=(*inputs.settings, *left.items())))
            fixed |= left
    return fixed


# its config -----------------------------------------------------------------------------------------------------------


def _config(checkpoint: Checkpoint, path: Path | None = None) -> "PretrainedConfig":
    """- `path`: its config, where that is known to lie on this machine."""
    from transformers import AutoConfig

    with readable(checkpoint, "its config.json could not be read"):
        if Path(checkpoint.source).is_dir() and not Path(checkpoint.source, "config.json").is_file():
            raise ValueError(f"{named(checkpoint)}: holds no config.json, so it is no folder of a saved model")
        return AutoConfig.from_pretrained(path or checkpoint.source, **source_of(checkpoint))


def _form(family: Family, name: str, config: "PretrainedConfig", checkpoint: Checkpoint) -> Form:
    try:
        return family.form(config)
    except (ArithmeticError, TypeError, ValueError) as error:  # a config may say that there are 0 heads
        text = f"holds a model of type {config.model_type!r}, which task.family={name!r} cannot read ({error})"
        raise ValueError(f"{named(checkpoint)}: {text}") from error


def _check_config(family_name: str, form: Form, inputs: Inputs, checkpoint: Checkpoint) -> None:
    """Hold a checkpoint's config against the one its model would have in this experiment."""
    family, held = get_family(family_name), _config(checkpoint)
    wanted = family.config(form, inputs)
    held_form, wanted_form = _form(family, family_name, held, checkpoint), family.form(wanted)
    for field in dataclasses.fields(Form):
        given, theirs, ours = (getattr(one, field.name) for one in (form, held_form, wanted_form))
        if not math.isclose(theirs, ours, rel_tol=1e-6):  # an epsilon may have been computed in another way
            stands_for = "" if given is not None else f" (None stands for {ours!r} here)"
            refuse(f"form.{field.name}", given, f"{theirs!r}, as in {named(checkpoint)}{stands_for}")
    _check_lengths(held, inputs, checkpoint)
    _check_constants(family, form, inputs, wanted, held, checkpoint)


def _check_lengths(held: "PretrainedConfig", inputs: Inputs, checkpoint: Checkpoint) -> None:
    """Refuse data with more positions or more tokens than the checkpoint has."""
    positions = getattr(held, "max_position_embeddings", None)
    if inputs.max_length and positions is not None and positions < inputs.max_length:
        refuse("task.data.max_length", inputs.max_length, f"at most {positions}, the positions of {named(checkpoint)}")
    tokens = getattr(held, "vocab_size", None)
    if inputs.vocab_size and tokens is not None and tokens < inputs.vocab_size:
        text = f"its vocabulary has {tokens} tokens, that of task.data.tokenizer {inputs.vocab_size}"
        raise ValueError(f"{named(checkpoint)}: {text}; it must be the one that the checkpoint was trained with")


def _check_constants(
    family: Family,
    form: Form,
    inputs: Inputs,
    wanted: "PretrainedConfig",
    held: "PretrainedConfig",
    checkpoint: Checkpoint,
) -> None:
    ours, theirs = family.shared(wanted), family.shared(held)
    differing = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    for name in differing:
        if name in DECIDED:
            refuse(DECIDED[name], ours.get(name), f"{theirs.get(name)!r}, as in {named(checkpoint)}")
    if not differing:
        return
    said = "; ".join(f"{name} is {theirs.get(name)!r}, here it is {ours.get(name)!r}" for name in differing)
    settings = {name: value for name, value in inputs.settings if name not in differing}
    settings |= {name: theirs[name] for name in differing if name in theirs}
    remedy = f"task.settings={tuple(settings.items())!r} gives every model of the experiment what this one has"
    if "vocab_size" in differing:
        remedy += " (if its vocabulary is task.data.tokenizer's, and only padded)"
    try:
        family.check(form, dataclasses.replace(inputs, settings=tuple(settings.items())))
    except ValueError as error:
        remedy = f"no model of this experiment can have that ({error})"
    raise ValueError(f"{named(checkpoint)}: {said}: {remedy}")


# what prepares its data -----------------------------------------------------------------------------------------------


def _check_images(data: DataConfig, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that was trained on images prepared otherwise, if it comes with a file that says so."""
    with readable(checkpoint, f"its {preparation.IMAGES} could not be read"):
        path = file_of(checkpoint, preparation.IMAGES)
        differing = preparation.differing(json.loads(Path(path).read_text()), data) if path else {}
    for name, (theirs, ours) in differing.items():
        if name in preparation.FIELDS:
            refuse(f"task.data.{name}", ours, f"{theirs!r}, as in the {preparation.IMAGES} of {named(checkpoint)}")
        said = f"its {preparation.IMAGES} says {name}={theirs!r}, here it is {ours!r}"
        raise ValueError(f"{named(checkpoint)}: {said}; a copy without that file is taken for the weights alone")


@functools.lru_cache(maxsize=32)
def _check_tokenizer(tokenizer: str, hub: bool, inputs: Inputs, checkpoint: Checkpoint, contents: object) -> None:
    """Refuse a checkpoint that comes with another tokenizer than the task's: equal sizes do not make equal tokens."""
    from transformers import AutoTokenizer

    if inputs.vocab_size is None or located(tokenizer) == checkpoint.source:
        return
    with readable(checkpoint, "its tokenizer could not be read"):
        if not any(file_of(checkpoint, name) for name in TOKENIZER_FILES):
            return
        held: Any = AutoTokenizer.from_pretrained(checkpoint.source, **source_of(checkpoint))
    difference = preparation.token_difference(tokenizer, hub, held)
    if difference is not None:
        accepted = f"the tokenizer that {named(checkpoint)} was trained with and comes with{difference}"
        refuse("task.data.tokenizer", tokenizer, accepted)


# its weights ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _loaded(
    family_name: str, form: Form, inputs: Inputs, checkpoint: Checkpoint, seed: int, contents: object
) -> Mapping[str, Any]:
    import torch

    _check_config(family_name, form, inputs, checkpoint)
    family = get_family(family_name)
    model_class: Any = family.model_class(inputs)
    with readable(checkpoint, "its weights could not be read"), torch_seeded(0):
        module, report = model_class.from_pretrained(
            checkpoint.source,
            config=family.config(form, inputs),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # which sizes may differ is decided below
            output_loading_info=True,
            **source_of(checkpoint),
        )
    tree = dict(module.named_parameters())
    if apart := sorted(tree.keys() - family.specs(form, inputs).keys()):
        text = (
            f"its config ties {_some(apart)} to another one, but its file holds other values: save it without them, or"
        )
        untied = "with tie_word_embeddings=false, to be trained with task.settings=(('tie_word_embeddings', False),)"
        raise ValueError(f"{named(checkpoint)}: {text} {untied}")
    if drawn := _to_draw(module, report, inputs, checkpoint):
        with torch_seeded(derive(seed, "head")):
            fresh = dict(family.build(form, inputs).named_parameters())
        tree |= {name: fresh[name] for name in drawn}
    if broken := [name for name, tensor in tree.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{named(checkpoint)}: NaN or an infinite number is among the values of {_some(broken)}")
    return trees.clone(tree)  # what was read is still the file itself, mapped into memory


def _to_draw(module: "PreTrainedModel", report: Mapping[str, Any], inputs: Inputs, checkpoint: Checkpoint) -> list[str]:
    """The parameters that a checkpoint need not have; refuse it if it lacks others, or holds what no such model has."""
    names = [name for name, _ in module.named_parameters()]
    missing = {name for name in report["missing_keys"] if name in names}
    shapes = {name: (tuple(held), tuple(wanted)) for name, held, wanted in report["mismatched_keys"]}
    drawn: list[str] = []
    for part in heads.parts(module):
        resized = [name for name in part if name in shapes]
        if missing.issuperset(part) or (
            resized and all(heads.other_classes(*shapes[name], inputs) for name in resized)
        ):
            drawn += part
    for name, (held, wanted) in sorted(shapes.items()):
        if name not in drawn:
            raise ValueError(
                f"{named(checkpoint)}: {name} has shape {held}, where its config and this form say {wanted}"
            )
    lacking = sorted(missing.difference(drawn))
    if lacking:
        raise ValueError(f"{named(checkpoint)}: lacks {_some(lacking)}")
    strays = sorted(name for name in report["unexpected_keys"] if heads.of_body(name, module))
    if strays:
        raise ValueError(f"{named(checkpoint)}: holds {_some(strays)} that a model of its config does not have")
    return drawn


def _some(names: list[str]) -> str:
    """At most three names, and how many there are."""
    count = "a parameter" if len(names) == 1 else f"{len(names)} parameters"
    return f"{count} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
