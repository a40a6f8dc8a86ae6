"""What an experiment says about its data."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from fedsim.core.fields import WHOLE, check_range, check_sha256, check_types, refuse
from fedsim.data import bpe, text


@dataclass(frozen=True)
class KnownSet:
    """What a bare name stands for.

    **Arguments:**

    - `hub_name`: empty: it is looked up under the data folder alone. - `kind`: "image" or "text".
    - `columns`: the columns of its local files where these have no header line.
    - `hub_test_split`: the hub's split that stands for "test", as not every set's test split has labels.
    """

    hub_name: str
    kind: str
    columns: tuple[str, ...] = ()
    hub_test_split: str = "test"


OBJECTIVES = {"next_token": "lm", "masked_token": "mlm", "token_classes": "tokens"}  # objective -> kind
PER_TOKEN = tuple(OBJECTIVES.values())  # the kinds in which tokens are labelled, not examples
EMBEDDED = {"digits": "image", "pydoc": "lm"}  # name -> kind
KNOWN = {
    "cifar10": KnownSet("uoft-cs/cifar10", "image"),
    "cifar100": KnownSet("uoft-cs/cifar100", "image"),
    "fashion_mnist": KnownSet("zalando-datasets/fashion_mnist", "image"),
    "flowers102": KnownSet("dpdl-benchmark/oxford_flowers102", "image"),
    "sst2": KnownSet("stanfordnlp/sst2", "text", columns=("sentence", "label"), hub_test_split="validation"),
    "ag_news": KnownSet("fancyzhx/ag_news", "text"),
    "newsgroups": KnownSet("SetFit/20_newsgroups", "text"),
    "r8": KnownSet("", "text"),
}


@dataclass(frozen=True)
class DataConfig:
    """What data an experiment names.

    **Arguments:**

    - `name`: `digits` or `pydoc` (embedded); `cifar10`, `cifar100`, `fashion_mnist`, `flowers102`, `sst2`, `ag_news`,
        `newsgroups` or `r8` (looked up under the data folder); or the path of a file or folder (parquet, csv, tsv, an
        image folder, a `save_to_disk` folder), as a text or a `Path`. `fedsim.data.from_frame` gives one to data that
        lie in memory.
    - `hub`: whether a name that is not found locally, or a tokenizer, may be fetched from the hub.
    - `config_name`: the hub data set's configuration.
    - `train_split`, `test_split`: names of files, folders or hub splits; other usual names stand in for the defaults.
    - `test_share`: share held out when the source has one split only, and by the embedded sets.
    - `objective`: "classes": one for each example. "next_token" or "masked_token": language modelling on the texts,
        which reads no labels; `pydoc` is "next_token" unless it is "masked_token". "token_classes": one for each word.
    - `image`, `text`, `label`: columns by name or by position from 0. Text columns are joined with a space. Left out,
        usual names are tried; a path's text columns must be named, except for language modelling. For token classes
        `text` is one column of lists of words and `label` one of lists of tags: numbers, or texts of `class_names`.
    - `group`: the column whose distinct values are natural groups; examples held out for test are of any group.
    - `label_offset`: subtracted from labels; 1 for classes counted from 1.
    - `header`: whether the first line of a csv or tsv names the columns.
    - `skip`: the first so many training examples are nobody's: what a public model was trained on. Counted as those of
        `limit` are, and before it.
    - `first`: training examples after the first so many are nobody's: with the number that another configuration
        skips, what is public there.
    - `limit`: keep at most this many training, and at most this many test examples; the same for every seed. An
        example of language modelling is a piece of `max_length` tokens. - `test_limit`: of test examples, instead.
    - `image_size`, `channels`: what images are brought to.
    - `image_mean`, `image_std`: of each channel, for pixels of 0..1, as a checkpoint's `preprocessor_config.json` has
        them; empty for 0.5 each.
    - `num_classes`: not read for language modelling.
    - `class_names`: the classes' names in order, by which labels that have names are numbered; or none. Tags named
        "O", "B-..." and "I-..." get entity scores.
    - `tokenizer`: "bytes", "bpe:SPLIT:SIZE" (`fedsim.data.bpe`), a folder, or a hub name (with `hub`).
    - `max_length`: tokens an example.
    - `sha256`: what `Dataset.fingerprint` must be; None: anything. No part of what a run is called.
    """

    name: str = "digits"
    hub: bool = False
    config_name: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    test_share: float = 0.2
    objective: Literal["classes", "next_token", "masked_token", "token_classes"] = "classes"
    image: str | int | None = None
    text: tuple[str | int, ...] = ()
    label: str | int | None = None
    group: str | int | None = None
    label_offset: int = 0
    header: bool = True
    limit: int | None = field(default=None, metadata={"most": WHOLE})
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    class_names: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    max_length: int = field(default=64, metadata={"most": 100_000})
    image_mean: tuple[float, ...] = field(default=(), metadata={"later": True})
    image_std: tuple[float, ...] = field(default=(), metadata={"later": True})
    skip: int = field(default=0, metadata={"later": True, "most": WHOLE})
    first: int | None = field(default=None, metadata={"later": True, "most": WHOLE})
    test_limit: int | None = field(default=None, metadata={"later": True, "most": WHOLE})
    sha256: str | None = field(default=None, metadata={"placement": True})

    def __post_init__(self) -> None:
        for name in ("name", "tokenizer"):
            if isinstance(given := getattr(self, name), PurePath):
                object.__setattr__(self, name, str(given))
        if hasattr(self.name, "columns") or hasattr(self.name, "column_names"):
            accepted = "a name or a path; fedsim.data.from_frame writes frames to where every process can read them"
            refuse("task.data.name", type(self.name).__name__, accepted)
        check_types(self, "task.data")
        check_range(self, "task.data", "limit", "test_limit", "image_size", "num_classes", least=1)
        check_range(self, "task.data", "max_length", least=2)
        check_range(self, "task.data", "skip", least=0)
        check_range(self, "task.data", "first", above=self.skip)
        for name in ("name", "config_name", "train_split", "test_split", "tokenizer"):
            if getattr(self, name) == "":
                refuse(f"task.data.{name}", "", "not empty")
        for name in ("image", "text", "label", "group"):
            value = getattr(self, name)
            for column in value if name == "text" else (value,):
                if column == "" or (isinstance(column, int) and column < 0):
                    refuse(f"task.data.{name}", value, "column names, or positions counted from 0")

        own = bpe.parsed(self.tokenizer)
        if own is not None and own.split in (self.train_split, self.test_split):
            accepted = "'bpe:SPLIT:SIZE' with a split that nobody trains on and nobody is scored on"
            refuse("task.data.tokenizer", self.tokenizer, accepted)
        if own is not None and self.name in EMBEDDED:
            refuse("task.data.tokenizer", self.tokenizer, f"'bytes' for the embedded set {self.name!r}")
        if not 0 < self.test_share < 1:
            refuse("task.data.test_share", self.test_share, "between 0 and 1, both excluded")
        if self.channels not in (1, 3):
            refuse("task.data.channels", self.channels, "1 (grey) or 3 (RGB)")
        if self.train_split == self.test_split:
            refuse("task.data.test_split", self.test_split, "another split than task.data.train_split")
        if self.image is not None and self.text:
            refuse("task.data.text", self.text, f"empty when task.data.image is given ({self.image!r})")
        columns_named = self.text or any(column is not None for column in (self.image, self.label, self.group))
        if self.name in EMBEDDED and columns_named:
            refuse("task.data.name", self.name, "a file or folder when task.data.image, text, label or group is given")
        if self.name == "pydoc" and self.tokenizer != "bytes":
            refuse("task.data.tokenizer", self.tokenizer, "'bytes' for the embedded set 'pydoc'")
        images = self.image is not None or (not self.text and _kind_of(self.name) == "image")
        if self.objective != "classes" and images:
            accepted = f"'classes' for images (task.data.name={self.name!r}, task.data.image={self.image!r})"
            refuse("task.data.objective", self.objective, accepted)
        both = (("image_mean", self.image_mean), ("image_std", self.image_std))
        for (name, values), (other, _) in zip(both, reversed(both), strict=True):
            fits = len(values) == self.channels and all(-1e6 < value < 1e6 for value in values) and self.kind == "image"
            if (self.image_mean or self.image_std) and (not fits or (name == "image_std" and min(values) <= 0)):
                accepted = f"a number for each of task.data.channels={self.channels}, together with task.data.{other}"
                refuse(f"task.data.{name}", values, f"{accepted}; deviations are above 0, and texts have none")
        check_sha256(self, "task.data")
        self._check_classes()

    def _check_classes(self) -> None:
        if self.objective == "token_classes" and self.name == "pydoc":
            refuse("task.data.objective", self.objective, "'next_token' or 'masked_token' for the embedded set 'pydoc'")
        if self.objective == "token_classes" and len(self.text) > 1:
            refuse(
                "task.data.text", self.text, "one column, of lists of words, for task.data.objective='token_classes'"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            accepted = f"empty or task.data.num_classes={self.num_classes} names; there are {len(self.class_names)}"
            refuse("task.data.class_names", self.class_names, accepted)
        if "" in self.class_names or len({*self.class_names}) < len(self.class_names):
            refuse("task.data.class_names", self.class_names, "names that differ, none of them empty")

    @property
    def kind(self) -> str:
        """What is learned: "image", "text", "tokens", "lm" or "mlm". Known without loading; `load` holds data to it.

        A path's columns are not known here, so it is a path of images unless the settings say otherwise.
        """
        if self.objective in OBJECTIVES:
            return OBJECTIVES[self.objective]
        if self.image is not None:
            return "image"
        return "text" if self.text else _kind_of(self.name) or "image"

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary, a mask among it where tokens are masked; None for images. Never reads data."""
        if self.kind == "image":
            return None
        size, mask = text.vocabulary(self.tokenizer, self.hub), self.mask_id
        return size if mask is None else max(size, mask + 1)

    @property
    def special_ids(self) -> tuple[int | None, int | None]:
        """The ids that pad a text and that close it; None for images. Reads the tokenizer, never data."""
        return (None, None) if self.kind == "image" else text.special_ids(self.tokenizer, self.hub)

    @property
    def mask_id(self) -> int | None:
        """The id that stands for a token to predict; None unless tokens are masked. Reads the tokenizer, never data.

        **Raises:** `ValueError` if the tokenizer has none.
        """
        return text.mask_id(self.tokenizer, self.hub) if self.kind == "mlm" else None


def _kind_of(name: str) -> str | None:
    return KNOWN[name].kind if name in KNOWN else EMBEDDED.get(name)


def digits(**changes: Any) -> DataConfig:
    """Embedded 8x8 grey images of 10 digits: what tests and first experiments use."""
    return DataConfig(**{"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10, **changes})


def pydoc(**changes: Any) -> DataConfig:
    """Embedded English text by bytes, for language modelling; its topics are natural groups."""
    return DataConfig(**{"name": "pydoc", "objective": "next_token", "num_classes": 1, **changes})


def cifar10(**changes: Any) -> DataConfig:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32."""
    return DataConfig(**{"name": "cifar10", "image_size": 32, "channels": 3, "num_classes": 10, **changes})


def fashion_mnist(**changes: Any) -> DataConfig:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28x28."""
    return DataConfig(**{"name": "fashion_mnist", "image_size": 28, "channels": 1, "num_classes": 10, **changes})


def sst2(**changes: Any) -> DataConfig:
    """SST-2: sentences of film reviews, 2 classes; local files have no header line."""
    settings = {"name": "sst2", "header": False, "text": ("sentence",), "label": "label", "num_classes": 2}
    return DataConfig(**{**settings, **changes})
