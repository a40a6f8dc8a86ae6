"""How one training set is dealt to many participants.

Shape legend: N examples, K participants. Every scheme is a pure function of its arguments and a random generator and
returns K sorted int64 index arrays that are disjoint, together cover 0..N-1, and are never empty.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedsim.core.fields import check_range, check_types, matches, refuse
from fedsim.core.seeding import numpy_generator


SCHEMES = ("iid", "dirichlet", "shards", "by_size", "natural")
MAX_DRAWS = 100


def iid(n: int, participants: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal `n` examples at random, in shards whose sizes differ by at most one.

    **Returns:** K index arrays.
    """
    _check_enough(n, participants)
    return _sorted(np.array_split(rng.permutation(n), participants))


def dirichlet(
    labels: np.ndarray, participants: int, alpha: float, min_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Split each class by its own p ~ Dir(alpha 1_K); a small `alpha` gives each participant few classes.

    **Arguments:**

    - `labels`: `(N,)`.
    - `min_size`: the split is redrawn, at most 100 times, until every shard holds this many examples.

    **Returns:** K index arrays.
    """
    labels = np.asarray(labels)
    classes = [np.flatnonzero(labels == value) for value in np.unique(labels)]

    def draw() -> list[np.ndarray]:
        parts: list[list[np.ndarray]] = [[] for _ in range(participants)]
        for members in classes:
            p_K = rng.dirichlet(np.full(participants, float(alpha)))
            cuts = (np.cumsum(p_K)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(rng.permutation(members), cuts), strict=True):
                part.append(piece)
        return [np.concatenate(part) for part in parts]

    return _draw_until(draw, len(labels), participants, alpha, min_size)


def by_size(n: int, participants: int, alpha: float, min_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal `n` examples at random in shards of unequal size, sizes ~ n Dir(alpha 1_K); labels stay iid.

    **Returns:** K index arrays, redrawn at most 100 times until each holds `min_size` examples.
    """

    def draw() -> list[np.ndarray]:
        cuts = (np.cumsum(rng.dirichlet(np.full(participants, float(alpha))))[:-1] * n).astype(np.int64)
        return np.split(rng.permutation(n), cuts)

    return _draw_until(draw, n, participants, alpha, min_size)


def shards(labels: np.ndarray, participants: int, shards_per_client: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sort by label, cut into K * `shards_per_client` pieces and deal the pieces at random.

    **Arguments:**

    - `labels`: `(N,)`.

    **Returns:** K index arrays.
    """
    labels = np.asarray(labels)
    pieces = participants * shards_per_client
    if pieces > len(labels):
        raise ValueError(
            f"partition.shards_per_client={shards_per_client}: {participants} participants would need {pieces} shards, "
            f"but there are only {len(labels)} examples"
        )

    # Shuffling before the stable sort makes it random which members of a class share a piece.
    shuffled = rng.permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    cut = np.array_split(ordered, pieces)
    hands = rng.permutation(pieces).reshape(participants, shards_per_client)
    return _sorted([np.concatenate([cut[piece] for piece in hand]) for hand in hands])


def natural(groups: np.ndarray, participants: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal whole groups (topics, authors): each goes to one participant, largest first to whoever holds least.

    **Arguments:**

    - `groups`: `(N,)`, the group of each example.

    **Returns:** K index arrays; ties in group size and in load are broken by `rng`.
    """
    groups = np.asarray(groups)
    _, group_of_N, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < participants:
        raise ValueError(
            f"partition.scheme='natural': {len(sizes)} groups cannot be dealt to {participants} participants; "
            "at most one participant a group is accepted"
        )

    shuffled = rng.permutation(len(sizes))
    largest_first = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    load = np.zeros(participants, dtype=np.int64)
    owner = np.empty(len(sizes), dtype=np.int64)
    for group in largest_first:
        emptiest = rng.choice(np.flatnonzero(load == load.min()))
        owner[group] = emptiest
        load[emptiest] += sizes[group]
    owner_N = owner[group_of_N]
    return [np.flatnonzero(owner_N == k).astype(np.int64) for k in range(participants)]


def train_validation(indices: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Set a random `share` of one participant's examples aside for validation.

    **Arguments:**

    - `indices`: `(n,)`, one shard.
    - `share`: in [0, 1). Above 0, at least one example is set aside and at least one stays, where n >= 2; a shard of
        one example keeps it for training.

    **Returns:** (train, validation), two sorted index arrays that together are `indices`.
    """
    if not matches(share, float) or not 0 <= share < 1:
        refuse("share", share, "a number in [0, 1)")
    n = len(indices)
    held = min(max(1, round(share * n)), n - 1) if share > 0 and n >= 2 else 0
    shuffled = rng.permutation(np.asarray(indices, dtype=np.int64))
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


@dataclass(frozen=True)
class Partition:
    """Which scheme deals the data, and its settings.

    **Arguments:**

    - `scheme`: one of iid, dirichlet, shards, by_size, natural.
    - `alpha`: Dirichlet concentration, for dirichlet (over labels) and by_size (over shard sizes).
    - `min_size`: smallest shard that dirichlet and by_size accept.
    - `shards_per_client`: for shards.
    """

    scheme: str = "dirichlet"
    alpha: float = 0.5
    min_size: int = 10
    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_types(self, "partition")
        if self.scheme not in SCHEMES:
            refuse("partition.scheme", self.scheme, f"one of {', '.join(SCHEMES)}")
        if self.alpha == math.inf:
            refuse("partition.alpha", self.alpha, "finite; partition.scheme='iid' is this limit")
        check_range(self, "partition", "alpha", above=0)
        check_range(self, "partition", "min_size", "shards_per_client", least=1)

    def split(self, labels: np.ndarray, groups: np.ndarray | None, participants: int, seed: int) -> list[np.ndarray]:
        """Deal a training set.

        **Arguments:**

        - `labels`: `(N,)`.
        - `groups`: `(N,)`, needed by natural alone.
        - `participants`: K.
        - `seed`: the same seed gives the same split.

        **Returns:** K sorted int64 index arrays.
        """
        if not matches(participants, int) or participants < 1:
            refuse("participants", participants, "a whole number of at least 1")
        if groups is not None and len(groups) != len(labels):
            raise ValueError(f"groups: {len(groups)} values for {len(labels)} labels; one a label is accepted")

        rng = numpy_generator(seed, "partition")
        match self.scheme:
            case "iid":
                return iid(len(labels), participants, rng)
            case "dirichlet":
                return dirichlet(labels, participants, self.alpha, self.min_size, rng)
            case "shards":
                return shards(labels, participants, self.shards_per_client, rng)
            case "by_size":
                return by_size(len(labels), participants, self.alpha, self.min_size, rng)
        if groups is None:
            raise ValueError(
                "partition.scheme='natural': this data has no groups; use one of " + ", ".join(SCHEMES[:-1])
            )
        return natural(groups, participants, rng)


def _draw_until(
    draw: Callable[[], list[np.ndarray]], n: int, participants: int, alpha: float, min_size: int
) -> list[np.ndarray]:
    """The first of at most `MAX_DRAWS` draws in which every shard holds `min_size` examples."""
    if participants * min_size > n:
        raise ValueError(
            f"partition.min_size={min_size}: {participants} participants need {participants * min_size} examples, "
            f"but there are only {n}; lower partition.min_size or the number of participants"
        )
    best = -1
    for _ in range(MAX_DRAWS):
        parts = draw()
        smallest = min(len(part) for part in parts)
        if smallest >= min_size:
            return _sorted(parts)
        best = max(best, smallest)
    raise ValueError(
        f"partition.alpha={alpha}: none of {MAX_DRAWS} draws gave each of {participants} participants "
        f"partition.min_size={min_size} of the {n} examples (the best draw's smallest shard held {best}); "
        "raise partition.alpha, or lower partition.min_size or the number of participants"
    )


def _check_enough(n: int, participants: int) -> None:
    if participants > n:
        raise ValueError(f"participants={participants}: {n} examples cannot be dealt to more than {n} participants")


def _sorted(parts: list[np.ndarray]) -> list[np.ndarray]:
    return [np.sort(part).astype(np.int64) for part in parts]
