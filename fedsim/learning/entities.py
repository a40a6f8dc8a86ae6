"""Entities in sequences of tags, and how many of them a model finds.

Tags are "O", "B-kind" and "I-kind". An entity is a run of tags of one kind; it begins at a "B-", or at an "I-" that
follows none of its kind, and must be found whole and of the right kind. These are the rules of the CoNLL-2000 shared
task's `conlleval`, and of seqeval's default mode.

Shape legend: T tagged tokens of all examples, one example after another; C classes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class EntityCounts:
    """Entities that the data hold (`true`), that a model says (`said`), and that are both (`right`)."""

    right: int = 0
    said: int = 0
    true: int = 0

    def __add__(self, other: "EntityCounts") -> "EntityCounts":
        return EntityCounts(self.right + other.right, self.said + other.said, self.true + other.true)

    @property
    def precision(self) -> float:
        """Share of what is said that is true; 0 where nothing is said."""
        return self.right / self.said if self.said else 0.0

    @property
    def recall(self) -> float:
        """Share of what is true that is said; 0 where nothing is true."""
        return self.right / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where both are."""
        return 2 * self.right / (self.said + self.true) if self.right else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class EntityTags:
    """Class numbers read as tags.

    - `kinds`: number of the kind of entity, int64 `(C,)`; -1 for "O".
    - `begins`: whether the tag begins an entity wherever it stands, bool `(C,)`.
    """

    kinds: np.ndarray
    begins: np.ndarray

    @staticmethod
    def of(class_names: Sequence[str]) -> "EntityTags | None":
        """None unless every class is the name of a tag (and for no classes)."""
        if not class_names or any(name != "O" and name[:2] not in ("B-", "I-") for name in class_names):
            return None
        names = sorted({name[2:] for name in class_names if name != "O"})
        kinds = [-1 if name == "O" else names.index(name[2:]) for name in class_names]
        return EntityTags(np.array(kinds), np.array([name.startswith("B-") for name in class_names]))

    def count(self, true: np.ndarray, said: np.ndarray, example: np.ndarray) -> EntityCounts:
        """Entities of two taggings of the same tokens.

        **Arguments:**

        - `true`, `said`: class numbers `(T,)`.
        - `example`: which example each token is of, `(T,)`, ascending: no entity goes on in the next one.
        """
        there, found = self.entities(true, example), self.entities(said, example)
        return EntityCounts(len(there & found), len(found), len(there))

    def entities(self, tags: np.ndarray, example: np.ndarray) -> set[tuple[int, int, int]]:
        """`(first token, token after the last, kind)` of each entity."""
        kind = self.kinds[tags]
        goes_on = np.zeros(len(tags), dtype=bool)
        goes_on[1:] = (kind[1:] == kind[:-1]) & (example[1:] == example[:-1])
        goes_on &= (kind >= 0) & ~self.begins[tags]
        borders = np.append(np.flatnonzero(~goes_on), len(tags))
        firsts = borders[:-1]
        named = kind[firsts] >= 0
        triples = zip(firsts[named].tolist(), borders[1:][named].tolist(), kind[firsts][named].tolist(), strict=True)
        return {*triples}
