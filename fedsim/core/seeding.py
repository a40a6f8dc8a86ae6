"""Random numbers by coordinates.

Every draw in the project comes from `generator(seed, purpose, round, client)`. A stream is a function of its four
coordinates and of nothing else, so results do not depend on where, in which order or how often something is computed,
and a run that resumes at round r replays nothing.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator

import numpy as np
import torch


FIELDS, WORDS = 3, 624  # of the state of a Mersenne twister, in units of 8 bytes


def derive(seed: int, purpose: str, round: int = 0, client: int = -1) -> int:
    """The 63-bit seed of one stream; `client=-1` stands for the server."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
    """A fresh CPU `torch.Generator` for one purpose at one place and time."""
    return torch.Generator().manual_seed(derive(seed, purpose, round, client))


def from_system() -> torch.Generator:
    """A stream that nobody can compute again: all of its state is the operating system's randomness.

    `manual_seed` would leave 32 bits of it to guess, whatever the seed: torch's generator takes no more.
    """
    stream = torch.Generator().manual_seed(0)
    state = stream.get_state().view(torch.int64)  # three fields, the words, as many more fields
    words = np.frombuffer(os.urandom(4 * WORDS), np.uint32).astype(np.int64)
    state[FIELDS : FIELDS + WORDS] = torch.from_numpy(words)
    return stream.set_state(state.view(torch.uint8))


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
