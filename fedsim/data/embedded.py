"""Two real data sets that come with installed packages, so that experiments run without any download.

Both return plain tensors with the examples in a fixed order and say which of them are test examples.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.core.seeding import numpy_generator
from fedsim.data import text


# Which examples are test examples must not depend on an experiment's seed: results of two seeds share one test set.
SPLIT_SEED = 0


def digits(test_share: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, 10 classes.

    **Returns:** images, uint8 `(N, 8, 8)` (the set's 0..16 scaled to 0..255 and rounded); labels, int64 `(N,)`; test
    flags, bool `(N,)`, set on the same share of each class.
    """
    table = np.loadtxt(_digits_file(), delimiter=",")
    images_NHW = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels_N = table[:, -1].astype(np.int64)

    rng = numpy_generator(SPLIT_SEED, "embedded_digits")
    test_N = np.zeros(len(labels_N), dtype=bool)
    for value in range(10):
        members = rng.permutation(np.flatnonzero(labels_N == value))
        held = min(max(1, round(test_share * len(members))), len(members) - 1)
        test_N[members[:held]] = True
    return torch.from_numpy(images_NHW), torch.from_numpy(labels_N), torch.from_numpy(test_N)


def _digits_file() -> Path:
    """What `sklearn.datasets.load_digits` reads: 64 pixels and the label a line. Every host reads it, and to import
    scikit-learn takes ten times as long."""
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None, "a dependency of this package"
    return Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


def pydoc(max_length: int, test_share: float = 0.2) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The English reference text that CPython carries for `help()`, as byte tokens for language modelling.

    Each topic is cut into pieces of L = `max_length` tokens (`text.pieces`). Whole topics are held out for test, at
    most `test_share` of the text, so that no topic is in both splits.

    The text differs between CPython versions (and so does a data set's fingerprint): compare runs of one version.

    **Returns:** `{"input_ids", "attention_mask"}`, both int64 `(N, L)`; topic numbers, int64 `(N,)`, in alphabetical
    order of topics; test flags, bool `(N,)`.
    """
    from pydoc_data.topics import topics

    bodies = [topics[name] for name in sorted(topics)]
    inputs, topic_N = text.pieces(bodies, "bytes", max_length)
    sizes = np.asarray([len(text.byte_ids(body)) for body in bodies])
    test_N = np.isin(topic_N, _held_out(sizes, test_share))
    return inputs, torch.from_numpy(topic_N), torch.from_numpy(test_N)


def _held_out(sizes: np.ndarray, share: float) -> list[int]:
    """Random topics that together hold at most `share` of all tokens, and at least one topic.

    Filling stops at four fifths of the share: going on would move almost every short topic into the test set.
    """
    rng = numpy_generator(SPLIT_SEED, "embedded_pydoc")
    room = share * sizes.sum()
    held, filled = [], 0
    for topic in rng.permutation(len(sizes)):
        if filled + sizes[topic] <= room:
            held.append(int(topic))
            filled += sizes[topic]
        if filled >= 0.8 * room:
            break
    # One topic must stay on each side, however small or large the share.
    held = held or [int(np.argmin(sizes))]
    return held[: len(sizes) - 1]
