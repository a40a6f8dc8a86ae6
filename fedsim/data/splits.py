"""Which of the names that lie in a source are its splits: one rule for files, folders, saved sets and hub sets."""

from collections.abc import Sequence

from fedsim.core.fields import refuse
from fedsim.data import bpe
from fedsim.data.config import DataConfig


# Other names of the default splits, in any case of letters; the last are taken for "test" where there is no other.
ALSO = {"train": ("train", "training"), "test": ("test", "testing")}
STAND_INS = ("validation", "valid", "val", "dev", "eval")
AS_CLASSES = (
    "where classes are called like splits, task.data.train_split='whole' (and test_split='none', if one is called so) "
    "reads all folders as classes"
)


def named(wanted: str, names: Sequence[str], config: DataConfig, but: str | None = None) -> str | None:
    """The one of `names` that a split is called by: its own, or else one of the usual ones.

    **Raises:** `ValueError` if several are as usual.
    """
    if wanted in names:
        return wanted
    for usual in (ALSO.get(wanted, ()), STAND_INS if wanted == "test" else ()):
        found = sorted(name for name in names if name.casefold() in usual and name != but)
        if len(found) > 1:
            field = "train_split" if wanted == config.train_split else "test_split"
            refuse(f"task.data.{field}", wanted, f"the name of one split; {found} may all be meant")
        if found:
            return found[0]
    return None


def present(names: Sequence[str], config: DataConfig) -> bool:
    """Whether there is any split among the names."""
    return any(named(wanted, names, config) for wanted in (config.train_split, config.test_split))


def chosen(names: Sequence[str], config: DataConfig, where: str, alone: bool = False) -> dict[str, str]:
    """The names of the splits under "train" and, unless the source has one split only, "test".

    **Arguments:**

    - `where`: the source, in words.
    - `alone`: the split to train on without any other.

    **Raises:** `ValueError` if the split to train on is not there, or another than the default test split; or if what
    lies beside a single split may be one of another name.
    """
    train = named(config.train_split, names, config)
    test = named(config.test_split, names, config, but=train)
    if train is None:
        refuse("task.data.train_split", config.train_split, f"a split of {where}")
    if alone:
        return {"train": train}
    if test is not None:
        return {"train": train, "test": test}
    own = bpe.parsed(config.tokenizer)
    others = sorted({*names} - {train, own.split if own else train})
    if others or config.test_split != "test":
        accepted = f"a split of {where}" + (f"; no share of {train!r} is held out where {others} lie" if others else "")
        refuse("task.data.test_split", config.test_split, accepted)
    return {"train": train}
