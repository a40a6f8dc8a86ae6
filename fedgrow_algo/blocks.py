"""Which block of a small model each block of a deeper one copies, and the depth tables that say so."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import one_hot

from fedgrow_algo.ligo import Operator
from fedsim.core.tree import Tree


def stacked_blocks(old: int, new: int) -> list[int]:
    """StackBERT: `k mod L1`. 2 to 5: 0 1 0 1 0."""
    return [k % old for k in range(new)]


def interlaced_blocks(old: int, new: int) -> list[int]:
    """Copies follow their block: `floor(k L1 / L2)`. 2 to 4: 0 0 1 1."""
    return [k * old // new for k in range(new)]


def stacked_from_top(old: int, new: int) -> list[int]:
    """bert2BERT: whole copies, then the top blocks for the remainder. 2 to 5: 0 1 0 1 1."""
    whole = new // old * old
    return [k % old if k < whole else old - new + k for k in range(new)]


def in_their_places(small: Sequence[str], large: Sequence[str]) -> list[int]:
    """`interlaced_blocks`, except that the first copy of a block, the one that counts, is on a block of its kind.

    Kinds g l l g, and g l l g l: 0 1 2 3 3, where interlacing would say 0 0 1 2 3. Each goes to the first place of its
    kind from where interlacing has it, or to the last one that leaves room for the blocks above.
    """
    last, free = [], len(large)
    for kind in reversed(small):
        free = max((k for k in range(free) if large[k] == kind), default=-1)
        assert free >= 0, f"blocks of kinds {small} have no place among {large}"
        last.insert(0, free)
    places: list[int] = []
    for block, kind in enumerate(small):
        least = places[-1] + 1 if places else 0
        wanted = max(least, -(-block * len(large) // len(small)))
        fitting = [k for k in range(least, last[block] + 1) if large[k] == kind]
        places.append(next((k for k in fitting if k >= wanted), fitting[-1]))
    return [sum(place <= k for place in places) - 1 for k in range(len(large))]


def depth_tables(operator: Operator, blocks: Callable[[int, int], list[int]], silent: bool) -> Tree:
    """One-hot depth tables; with `silent`, copies after the first of a run of equal blocks write nothing."""
    old, new = operator.depths
    source, tensors = in_their_places(*operator.kinds) if silent else blocks(old, new), {}
    for table, writes in operator.tables.items():
        rows = one_hot(torch.tensor(source), old).double()
        if silent and writes:
            rows[[k for k in range(1, new) if source[k] == source[k - 1]]] = 0.0
        tensors[f"depth.{table}"] = rows
    return tensors
