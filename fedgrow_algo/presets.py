"""Presets: which matrices a LiGO operator has, how they are tied and where training starts.

A number in a table always names its preset. Besides Fed-Grow's own, LiGO's and the project's, the growth operators of
the literature are starts of the same machinery: `ABOUT` says what each is, and its source.

Differs from the papers: all of them grow width and depth in one step, biases and normalisations included, copy units in
turn instead of drawing them at random, and copy whole heads; where a head grows, queries and keys are rescaled so that
q.k / sqrt(e) stays as it was. Their matrices are then trained like any LiGO operator's.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedgrow_algo.blocks import depth_tables, interlaced_blocks, stacked_blocks, stacked_from_top
from fedgrow_algo.equations import copies
from fedgrow_algo.ligo import Operator
from fedgrow_algo.preset import NEXT, READ, Preset
from fedsim.core.submodel import Dim
from fedsim.core.tree import Tree


def by_name(name: str) -> Preset:
    """**Raises:** `ValueError` naming the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"algorithm.preset={name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


# paper: full matrices, tied in and out, Xavier ------------------------------------------------------------------------


def xavier(operator: Operator, generator: torch.Generator) -> Tree:
    """`B` Xavier normal, `w = 1/L1`: the grown model starts at chance."""
    tensors: Tree = {}
    for name, shape in operator.shapes.items():
        if name.startswith("depth."):
            tensors[name] = torch.full(shape, 1.0 / shape[-1])
        else:
            std = math.sqrt(2.0 / (shape[-1] + shape[-2]))
            tensors[name] = torch.randn(shape, generator=generator) * std
    return tensors


def tied(operator: Operator, dim: Dim) -> None:
    """One matrix for every use of an axis; under `own_read` the residual axis alone has two."""
    return None


def mixes_heads(operator: Operator) -> None:
    """Full matrices map any size to any larger one, across head borders, which rotary position embeddings forbid."""
    if "rotary" in operator.axes:
        works = [preset.name for preset in PRESETS.values() if preset.check not in (mixes_heads, equal_chunks)]
        raise ValueError(
            f"preset {operator.preset.name!r} mixes the coordinates of heads, which rotary position embeddings turn "
            f"in pairs: choose one of {', '.join(works)}"
        )


def equal_chunks(operator: Operator) -> None:
    """One matrix for every chunk: the MLP must be as many times as wide as the residual stream before and after."""
    mixes_heads(operator)
    small, large = operator.small_axes, operator.large_axes
    if small["mlp"] % small["embed"] or large["mlp"] * small["embed"] != small["mlp"] * large["embed"]:
        raise ValueError(
            f"form.mlp: preset 'paper-chunked' needs one whole ratio to form.width, before and after; they are "
            f"{small['mlp']}/{small['embed']} and {large['mlp']}/{large['embed']}"
        )


def never(operator: Operator) -> bool:
    """Not even at equal sizes."""
    return False


# ligo: the official code's tying --------------------------------------------------------------------------------------


def noisy_stacking(operator: Operator, generator: torch.Generator) -> Tree:
    """Rows of `C` uniform, divided by their sum; depth rows U(0, 0.03) with a 1 at k mod L1, divided likewise."""
    tensors: Tree = {}
    for name, shape in operator.shapes.items():
        drawn = torch.rand(shape, generator=generator)
        if name.startswith("depth."):
            drawn = 0.03 * drawn
            drawn[torch.arange(shape[0]), torch.arange(shape[0]) % shape[1]] = 1.0
        tensors[name] = drawn / drawn.sum(-1, keepdim=True)
    return tensors


# copies: how units are copied, and what readers make of it ------------------------------------------------------------


def equal_shares(old: int, new: int) -> Tensor:
    """Readers divide a unit's work evenly among its copies: `(new,)`. Copies then stay copies."""
    return 1.0 / _counts(old, new)


def unequal_shares(old: int, new: int) -> Tensor:
    """The same, 1/3 and 2/3 for two copies: `(new,)`, summing to 1 over the copies of a unit.

    Copies that are read alike get like gradients and stay copies for ever (LEMON, Wang et al., ICLR 2024).
    """
    count, rank = _counts(old, new), torch.arange(new, dtype=torch.float64) // old
    return (rank + 1.0) / (count * (count + 1) / 2)


def _counts(old: int, new: int) -> Tensor:
    """How many copies there are of the unit that each new one copies: `(new,)`."""
    index = torch.arange(new, dtype=torch.float64)
    return (new - 1 - index % old) // old + 1


def spanned(operator: Operator, dim: Dim, of_factor: Callable[[int, int], Tensor]) -> list[Tensor]:
    """`of_factor(old, new)` for each factor that the dimension's matrix spans."""
    return [of_factor(f.old, f.new) for f in operator.factors(dim) if f.kind == "map"]


def product(factors: list[Tensor]) -> Tensor:
    """Outer product of vectors, flattened with the first factor slowest."""
    return functools.reduce(lambda left, right: (left[:, None] * right).flatten(), factors, torch.ones(1).double())


def copied_units(operator: Operator, group: str) -> Tensor:
    """`copies` on a product of axes, head-major `(D2,)`: whole heads are copied, nothing is mixed across heads."""
    index = torch.zeros(1, dtype=torch.long)
    for factor in operator.factors(operator.groups[group]):
        if factor.kind == "map":
            index = (index[:, None] * factor.old + copies(factor.old, factor.new)).flatten()
    return index


def copied(operator: Operator, group: str) -> Tensor:
    """The matrix of `copied_units`: one-hot rows, `(D2, D1)`."""
    return one_hot(copied_units(operator, group), operator.mapped(operator.groups[group])[0]).double()


def divided(operator: Operator, dim: Dim) -> Tensor | None:
    """Row factors that make readers of copies undo the writer, `A^T B = I`, and keep attention as it was.

    - Readers divide each unit's work among its copies; where the reader is a tied matrix, the normalisation before it.
    - Heads that nobody reads (queries and keys meet in q.k / sqrt(e)): both sides take the square root of the share,
      and of the correction sqrt(e'/e) of the temperature.
    """
    share = operator.preset.share
    if dim.mode == "read" or dim.tied:
        return product(spanned(operator, dim, share))
    if dim.group not in operator.read and dim.group not in operator.whole and "head_dim" in dim.axes:
        factors = [f for f in operator.factors(dim) if f.kind == "map"]
        ones = torch.ones
        shares = [share(f.old, f.new) if f.axis == "head_dim" else ones(f.new).double() for f in factors]
        temperature = operator.large_axes["head_dim"] / operator.small_axes["head_dim"]
        return product(shares).sqrt() * temperature**0.25
    return None


def nothing_shrinks(operator: Operator) -> None:
    """Copies need every axis, and the depth, to be at least as large as before."""
    name = operator.preset.name
    old_depth, new_depth = operator.depths
    if new_depth < old_depth:
        raise ValueError(
            f"preset {name!r} cannot drop blocks: depth would go from {old_depth} to {new_depth} "
            f"(preset 'paper' mixes any depth into any other)"
        )
    for axis in sorted(operator.axes):
        old, new = operator.small_axes[axis], operator.large_axes[axis]
        if new < old:
            raise ValueError(
                f"preset {name!r} copies whole heads: axis {axis!r} cannot go from {old} to {new} "
                f"(choose heads so that neither their number nor their size shrinks)"
            )


def whole_ratios(operator: Operator) -> None:
    """Tiling needs every axis to grow by an integer, and heads to keep their size."""
    nothing_shrinks(operator)
    for axis in sorted(operator.axes):
        old, new = operator.small_axes[axis], operator.large_axes[axis]
        if new % old or (axis == "head_dim" and new != old):
            accepted = "the same" if axis == "head_dim" else "a multiple"
            raise ValueError(f"preset 'hypercloning' tiles: axis {axis!r} goes from {old} to {new}, not {accepted}")


# the literature's operators -------------------------------------------------------------------------------------------


def copying(
    blocks: Callable[[int, int], list[int]], silent: bool = False
) -> Callable[[Operator, torch.Generator], Tree]:
    """Starts that copy units in width, and blocks in depth as `blocks` says."""

    def init(operator: Operator, generator: torch.Generator) -> Tree:
        tensors = depth_tables(operator, blocks, silent)
        for name, shape in operator.shapes.items():
            if name.startswith("width."):
                matrix = copied(operator, name.removeprefix("width.").removesuffix(NEXT))
                if f"{name}{NEXT}" in operator.shapes:
                    matrix[shape[-1] :] = 0.0
                elif name.endswith(NEXT):
                    matrix[: shape[-1]] = 0.0
                tensors[name] = matrix.expand(shape).clone()
        return tensors

    return init


def residual_ratio_is_whole(operator: Operator) -> bool:
    """Equally many copies of each coordinate leave the statistics of a normalisation as they were (table A9)."""
    old, new = operator.small_axes["embed"], operator.large_axes["embed"]
    return new % old == 0


def same_depth(operator: Operator) -> bool:
    return operator.depths[0] == operator.depths[1]


def exact_copies(operator: Operator) -> bool:
    """Copied blocks compute something else; so does a normalisation over unequally many copies."""
    return residual_ratio_is_whole(operator) and same_depth(operator)


def exact_below(operator: Operator) -> bool:
    """Units of the block above are foreign to a block, unless there are no new units, or no block above."""
    grown = any(
        operator.mapped(operator.groups[g])[0] < operator.mapped(operator.groups[g])[1] for g in operator.groups
    )
    return same_depth(operator) and (not grown or (operator.depths[0] == 1 and residual_ratio_is_whole(operator)))


def exact_silent(operator: Operator) -> bool:
    """A block that adds nothing is exact before a normalisation, not under one."""
    return residual_ratio_is_whole(operator) and (same_depth(operator) or not operator.post_norm)


# preserving: the grown model computes what the small one did ----------------------------------------------------------


def keeps_statistics(operator: Operator, dim: Dim) -> Tensor | None:
    """As `divided`, except on the residual axis, which is read with a matrix of its own.

    Before blocks (pre-norm): normalised, the coordinates that were added are 0, for they hold the mean of the others,
    or 0 where the statistic is RMSNorm's; the others have grown by sqrt(D2/D1), which the gain takes back. The shift of
    the added ones is 0, so any reader of them is exact. After blocks (post-norm): the shift is averaged as well.
    """
    old, new = operator.sizes(dim.group)
    if dim.group not in operator.residual:
        apart = dim.tied and not tiles(operator)  # the tied matrix was averaged: it reads the old coordinates only
        return (torch.arange(new) < old).double() if apart else divided(operator, dim)
    if dim.mode not in ("gain", "shift"):
        return None
    if tiles(operator):
        return divided(operator, dim)
    if dim.mode == "gain":
        return torch.full((new,), math.sqrt(old / new), dtype=torch.float64)
    return None if operator.post_norm else (torch.arange(new) < old).double()


def tiles(operator: Operator) -> bool:
    """Whether the residual axis is tiled: nothing else keeps what normalisations write into the stream (table A9).

    They do after blocks, and where one stands between embeddings and blocks: it makes added coordinates 0, and 0 is not
    the mean of the others.
    """
    return (operator.post_norm or operator.starts_normalised) and residual_ratio_is_whole(operator)


def statistics_kept(operator: Operator, generator: torch.Generator) -> Tree:
    """Copies in width, on the residual axis as `keeps_statistics` says; blocks that add nothing in depth."""
    tensors = depth_tables(operator, interlaced_blocks, silent=True)
    for name, shape in operator.shapes.items():
        if not name.startswith("width."):
            continue
        group = name.removeprefix("width.").removesuffix(READ)
        matrix, old = copied(operator, group), shape[-1]
        if group in operator.residual and name.endswith(READ):
            if tiles(operator):
                matrix *= operator.preset.share(old, shape[-2])[:, None]
            elif operator.post_norm:
                matrix[old:] = 0.0  # there, added coordinates are not 0 but the mean of the shifts
            else:  # reads of added coordinates are free: made unlike, so that no two stay alike
                matrix *= (1 + torch.arange(shape[-2]) // old)[:, None]
        elif group in operator.residual and not tiles(operator):
            matrix[old:] = 1.0 / old if group in operator.shifted else 0.0
        tensors[name] = matrix.expand(shape).clone()
    return tensors


def exact_preserving(operator: Operator) -> bool:
    """Always before blocks, but for a stream that starts normalised; after blocks as copies, but for equal gains."""
    width = residual_ratio_is_whole(operator) or not (operator.post_norm or operator.starts_normalised)
    return width and (same_depth(operator) or not operator.post_norm)


def _growth(name, init, exact=exact_copies, check=nothing_shrinks, **fields) -> Preset:
    return Preset(name, "source", init, check, exact, divided, equal_shares, **fields)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("paper", "source", xavier, mixes_heads, never, tied, equal_shares),
        Preset("paper-untied", "source", xavier, mixes_heads, never, tied, equal_shares, own_read=True),
        Preset("paper-chunked", "source", xavier, equal_chunks, never, tied, equal_shares, chunked=True),
        Preset(
            "ligo", "target", noisy_stacking, mixes_heads, never, tied, equal_shares, fixed_top=True, depth_by="role"
        ),
        Preset(
            "preserving",
            "target",
            statistics_kept,
            nothing_shrinks,
            exact_preserving,
            keeps_statistics,
            unequal_shares,
            own_read=True,
        ),
        _growth("net2net", copying(stacked_from_top)),
        _growth("aki", copying(stacked_from_top), exact_below, own_next=True),
        _growth("stacking", copying(stacked_blocks)),
        _growth("interlacing", copying(interlaced_blocks)),
        _growth("zero-block", copying(interlaced_blocks, silent=True), exact_silent),
        _growth("hypercloning", copying(interlaced_blocks, silent=True), exact_silent, whole_ratios),
    )
}
ABOUT = {
    "paper": "full matrices, Xavier normal, blocks averaged: as Fed-Grow's text has it; starts at chance",
    "paper-untied": "the same, reading the residual stream with a matrix of its own",
    "paper-chunked": "the same, one matrix for all chunks of an MLP",
    "ligo": "LiGO's official code, Wang et al., ICLR 2023: new units mix old ones, blocks are stacked with noise",
    "preserving": "ours: unequal copies, the residual axis keeps its statistics, new blocks add nothing",
    "net2net": "copies, readers divide (FPI); blocks copied, what is left from the top: Net2Net, Chen et al. 2015",
    "aki": "the same; new units copy the block above: bert2BERT, Chen et al., ACL 2022",
    "stacking": "width as net2net; block k is block k mod L1: StackBERT, Gong et al., ICML 2019",
    "interlacing": "width as net2net; block k is block k L1 / L2: the same, as an alternative",
    "zero-block": "width as net2net; as interlacing, new blocks add nothing: Net2Net's deeper net, for pre-norm blocks",
    "hypercloning": "the whole tiled, every ratio an integer; depth as zero-block: HyperCloning, Samragh et al. 2024",
}
