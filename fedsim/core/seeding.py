"""Random numbers by coordinates.

Every draw in the project comes from `generator(seed, purpose, round, client)`. A stream is a function of its four
coordinates and of nothing else, so results do not depend on where, in which order or how often something is computed,
and a run that resumes at round r replays nothing.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def derive(seed: int, purpose: str, round: int = 0, client: int = -1) -> int:
    """The 63-bit seed of one stream; `client=-1` stands for the server."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
    """A fresh CPU `torch.Generator` for one purpose at one place and time."""
    return torch.Generator().manual_seed(derive(seed, purpose, round, client))


def numpy_generator(seed: int, purpose: str, round: int = 0, client: int = -1) -> np.random.Generator:
    """The same stream for code that draws with NumPy (partitions, cohorts)."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, round, client)))


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's global stream inside the block and put it back afterwards.

    For code that is not ours and draws from the global stream: Hugging Face weight initialisation, dropout.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
