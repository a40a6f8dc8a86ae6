"""How the operator computes: against dense matrices, in which order, at what cost in multiplications and memory."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedgrow_algo import dual_ligo, ligo
from fedgrow_algo.dual_ligo import GrownLoss, first_of_each, looked_up
from fedgrow_algo.dual_ligo import operator_between as operator_of_task
from fedgrow_algo.ligo import MIX
from fedgrow_algo.presets import PRESETS
from fedsim.core.submodel import Dim, join_fused, split_fused
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support.family_rows import ROWS, batch_of
from tests.support.growing import (
    MIX_HEADS,
    accepted,
    anywhere,
    family,
    large,
    operator_between,
    random,
    random_tree,
    rotary,
    small,
)


pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {  # sizes every preset can map, and all different
    "vit": (Form(4, 2, heads=2, mlp=12), Form(8, 3, heads=4, mlp=24)),
    "gpt2": (Form(4, 2, heads=2, mlp=12), Form(8, 3, heads=4, mlp=24)),
    "bert": (Form(4, 2, heads=2, mlp=12), Form(8, 3, heads=4, mlp=24)),
    "modernbert": (Form(4, 2, heads=2, mlp=12), Form(8, 3, heads=4, mlp=24)),
    "llama": (
        Form(4, 2, heads=4, mlp=12, kv_heads=2, head_dim=2),
        Form(8, 3, heads=8, mlp=24, kv_heads=2, head_dim=2),
    ),
}
CASES = [
    (preset, model)
    for preset in PRESETS
    for model in ("vit", "gpt2-lm", "llama-tied", "bert-mlm", "modernbert-mlm")
    if not (rotary(model) and preset in MIX_HEADS)
]


def operator_of(preset, model, old=None, new=None):
    forms = FORMS[family(model)]
    return operator_between(preset, model, old or forms[0], new or forms[1])


# dense matrices -------------------------------------------------------------------------------------------------------


def dense(operator, tensors, dim, block):
    """The matrix of a whole dimension in one block, `(D2, D1)`: every factor of it written out."""
    preset, old_axes, new_axes = operator.preset, operator.small_axes, operator.large_axes
    free = {"read"} if "embed" in operator.shifted else {"read", "gain"}  # coordinates that hold 0 have any gain
    own_read = preset.own_read and dim.group == "embed" and dim.mode in free
    matrix = tensors[f"width.{dim.group}.read" if own_read else f"width.{dim.group}"]
    if f"width.{dim.group}.next" in tensors:
        matrix = matrix + tensors[f"width.{dim.group}.next"]
    matrix = matrix[block] if matrix.ndim == 3 else matrix
    scale = preset.scale(operator, dim)
    matrix = matrix if scale is None else scale[:, None] * matrix
    if preset.fixed_top:
        matrix = torch.cat([torch.eye(matrix.shape[1]).double(), matrix])
    if "rotary" in dim.axes:
        return torch.kron(matrix, torch.eye(old_axes["rotary"]).double())
    if preset.chunked and dim.group == "mlp":
        return torch.kron(torch.eye(3).double(), matrix)
    if dim.axes == ("kv_head", "group", "head_dim") and dim.mode == "read":
        (heads, G, e), (old_heads, G_old) = (new_axes[a] for a in dim.axes), (old_axes[a] for a in dim.axes[:2])
        expanded = torch.zeros(heads * G * e, old_heads * G_old * e).double()
        share = preset.share(G_old, G)
        for h, g, j, old_h, i in itertools.product(*map(range, (heads, G, e, old_heads, e))):
            row, column = (h * G + g) * e + j, (old_h * G_old + g % G_old) * e + i
            expanded[row, column] = share[g] * matrix[h * e + j, old_h * e + i]
        return expanded
    return matrix


def contracted(tensor, matrices):
    for position, matrix in enumerate(matrices):
        if matrix is not None:
            tensor = (tensor.movedim(position, -1) @ matrix.mT).movedim(-1, position)
    return tensor


def table_of(operator, tensors, spec):
    return tensors["depth." + (spec.module if operator.preset.depth_by == "module" else spec.role)]


def explicit(operator, tensors, tree):
    """What `grow` should return, one small block at a time; fused projections are grown by block-diagonal matrices."""
    preset, L1 = operator.preset, operator.depths[0]
    names = {(spec.role, spec.layer): name for name, spec in operator.small.items()}
    grown = {}
    for name, spec in operator.large.items():
        dims = [[Dim.parse(text) for text in texts.split(" + ")] for texts in spec.dims]
        if spec.layer is None:
            matrices = [dense(operator, tensors, of[0], 0) if of[0].axes else None for of in dims]
            grown[name] = contracted(tree[name], matrices)
            continue
        grown[name] = torch.zeros(1).double()
        for source in range(L1):
            block = source if preset.per == "source" else spec.layer
            for above in (False, True) if preset.own_next else (False,):
                at = min(source + above, L1 - 1)
                matrices, weight = (
                    [],
                    1.0 if spec.fused is not None else table_of(operator, tensors, spec)[spec.layer, source],
                )
                for of in dims:
                    blocks = []
                    for dim in of:
                        chosen = dict(tensors)
                        if preset.own_next and dim.mode == "write" and dim.axes:  # of this block, or of the one above
                            silent = f"width.{dim.group}" + ("" if above else ".next")
                            chosen[silent] = torch.zeros_like(tensors[silent])
                        blocks.append(dense(operator, chosen, dim, block) if dim.axes else None)
                    if len(of) > 1:  # each part has a table of its own
                        tables = [table_of(operator, tensors, part) for part in spec.parts(name).values()]
                        blocks = [w[spec.layer, source] * B for w, B in zip(tables, blocks, strict=True)]
                    matrices.append(None if blocks[0] is None else torch.block_diag(*blocks))
                writes = any(dim.mode == "write" and dim.axes for of in dims for dim in of)
                if writes or not above:
                    held = (spec.role, at) in names  # a gain that a block lacks changes nothing
                    small = tree[names[spec.role, at]] if held else torch.ones(operator.small_axes["embed"]).double()
                    grown[name] = grown[name] + weight * contracted(small, matrices)
    return grown


@pytest.mark.parametrize(("preset", "model"), CASES)
def test_grown_weights_are_products_with_dense_matrices_wherever_the_operator_stands(preset, model):
    operator = operator_of(preset, model)
    tensors, tree = anywhere(operator), random_tree(model, FORMS[family(model)][0])
    grown, expected = operator(tensors, tree), explicit(operator, tensors, tree)
    assert grown.keys() == expected.keys()
    for name in grown:
        assert_close(grown[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


PERMUTABLE = [
    (preset, model)
    for preset in PRESETS
    for model in ("vit", "gpt2-lm", "llama-tied", "bert-text")
    if preset != "ligo" and accepted(model, "all x2", preset)
]


@pytest.mark.parametrize(("preset", "model"), PERMUTABLE)
def test_order_of_small_units_does_not_matter_once_the_maps_follow(preset, model):
    """Every group of coordinates permuted at once: units, heads and coordinates of heads, the residual axis."""
    old, new = small(model), large(model, "all x2", preset)
    operator = operator_between(preset, model, old, new)
    tensors, tree = anywhere(operator), random_tree(model, old)
    orders = {
        group: torch.randperm(operator.mapped(dim)[0], generator=torch.Generator().manual_seed(i))
        for i, (group, dim) in enumerate(operator.groups.items())
    }
    follow = {
        name: t[..., orders[name.split(".")[1]]] if name.startswith("width.") else t for name, t in tensors.items()
    }
    parts = dict(split_fused(tree, operator.small, operator.small_axes))
    for name, spec in operator.small_parts.items():
        for position, dim in enumerate(spec.parsed):
            if dim.axes:
                sizes = [f.old for f in operator.factors(dim)]
                index = torch.arange(math.prod(sizes)).view(-1, *sizes)
                spanned = [1 + i for i, f in enumerate(operator.factors(dim)) if f.kind == "map"]
                together = list(range(1, 1 + len(spanned)))
                moved = index.movedim(spanned, together)
                permuted = moved.flatten(1, len(spanned))[:, orders[dim.group]].view(moved.shape)
                parts[name] = parts[name].index_select(position, permuted.movedim(together, spanned).flatten())
    permuted_tree = join_fused(parts, operator.small)
    grown, of_permuted = operator(tensors, tree), operator(follow, permuted_tree)
    for name in grown:
        assert_close(of_permuted[name], grown[name], rtol=1e-12, atol=1e-12)
    unlike = operator(tensors, permuted_tree)
    assert max(float((unlike[name] - grown[name]).abs().max()) for name in grown) > 1e-3


# orders ---------------------------------------------------------------------------------------------------------------


def allowed_orders(operator):
    """For each role: every order in which a map that belongs to blocks meets only those blocks.

    What is copied from the block above is read with the maps of the block it is copied to, so it is copied first.
    """
    orders = {}
    for spec in operator.small_parts.values():
        if spec.layer is None or spec.role in orders:
            continue
        named = [position for position, dim in enumerate(spec.parsed) if dim.axes]
        own = {p for p in named if len(operator.shapes[f"width.{spec.parsed[p].group}"]) == 3}
        if operator.preset.own_next:  # blocks above are known among the small ones only
            own |= {p for p in named if spec.parsed[p].mode == "write"}
        per_source = operator.preset.per == "source"
        writes = {p for p in named if operator.preset.own_next and spec.parsed[p].mode == "write"}
        orders[spec.role] = [
            order
            for order in itertools.permutations([MIX, *named])
            if all((order.index(p) < order.index(MIX)) == per_source for p in own)
            and all(order.index(p) < order.index(q) for p in writes for q in own - writes)
        ]
    return orders


@pytest.mark.parametrize(("preset", "model"), CASES)
def test_every_allowed_order_gives_the_same_weights(preset, model):
    operator = operator_of(preset, model)
    tensors, tree = anywhere(operator), random_tree(model, FORMS[family(model)][0])
    grown, orders = operator(tensors, tree), allowed_orders(operator)
    assert all(operator.plans[role] in choices for role, choices in orders.items())
    assert max(len(choices) for choices in orders.values()) > 1
    for number in range(max(map(len, orders.values()))):
        other = operator_of(preset, model)
        vars(other)["plans"] = {role: choices[number % len(choices)] for role, choices in orders.items()}
        again = other(tensors, tree)
        for name in grown:
            assert_close(again[name], grown[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def multiplications(operator, tensors, stacked):
    """Of a growth and its backward pass, as PyTorch counts them."""
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        torch.stack([t.sum() for t in operator.grow(tensors, stacked).values()]).sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("preset", "model", "old_depth", "new_depth"),
    [
        ("paper", "vit", 2, 5),
        ("paper", "gpt2-lm", 5, 2),
        ("paper-chunked", "vit", 2, 5),
        ("paper-untied", "vit", 2, 5),
        ("ligo", "gpt2-lm", 2, 5),
        ("ligo", "bert-mlm", 5, 2),
        ("preserving", "vit", 2, 5),
        ("preserving", "llama-tied", 2, 5),
        ("net2net", "llama-tied", 2, 5),
        ("aki", "vit", 2, 5),
    ],
)
def test_the_order_taken_costs_the_fewest_multiplications_that_pytorch_counts(
    preset, model, old_depth, new_depth, monkeypatch
):
    monkeypatch.setattr(ligo, "ALIGNED", 1)  # padding is no part of the count
    old, new = (
        Form(form.width, depth, form.heads, form.mlp, form.kv_heads, form.head_dim)
        for form, depth in zip(FORMS[family(model)], (old_depth, new_depth), strict=True)
    )
    operator = operator_of(preset, model, old, new)
    tensors, stacked = anywhere(operator), operator.stack(random_tree(model, old))
    taken, orders = multiplications(operator, tensors, stacked), allowed_orders(operator)
    specs = {spec.role: spec for spec in operator.small_parts.values() if spec.layer is not None}
    shapes = {role: [dim.size(operator.small_axes) or 1 for dim in spec.parsed] for role, spec in specs.items()}

    def counted(plans):
        return {role: operator.multiplications(plans[role], specs[role], shapes[role]) for role in specs}

    fewest = counted(operator.plans)
    for number in range(max(map(len, orders.values()))):
        plans = {role: choices[number % len(choices)] for role, choices in orders.items()}
        assert all(count >= fewest[role] for role, count in counted(plans).items())
        other = operator_of(preset, model, old, new)
        vars(other)["plans"] = plans
        more = multiplications(other, tensors, stacked) - taken
        assert more == sum(counted(plans).values()) - sum(fewest.values())


# memory ---------------------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)
        }
        return out


def sizes_in_growing(operator, tree):
    tensors = {name: t.requires_grad_() for name, t in anywhere(operator).items()}
    with Sizes() as sizes:
        torch.stack([t.square().sum() for t in operator(tensors, tree).values()]).sum().backward()
    return sizes.seen


@pytest.mark.parametrize(
    ("preset", "model", "old_depth", "new_depth"),
    [("ligo", "vit", 4, 6), ("ligo", "vit", 6, 4), ("preserving", "vit", 4, 6), ("preserving", "gpt2-lm", 4, 6)],
)
def test_widening_after_mixing_holds_no_target_matrix_for_each_source_block(preset, model, old_depth, new_depth):
    old, new = Form(22, old_depth, heads=2, mlp=26), Form(44, new_depth, heads=4, mlp=58)
    seen = sizes_in_growing(operator_of(preset, model, old, new), random_tree(model, old))
    inner = {44 * 44, 44 * 58}  # of the inner matrices, whose maps belong to target blocks
    assert seen >= {new_depth * size for size in inner}
    assert seen.isdisjoint(old_depth * size for size in inner)


@pytest.mark.parametrize(("preset", "model"), CASES)
def test_nothing_is_held_for_every_pair_of_a_source_and_a_target_block(preset, model, monkeypatch):
    """At most what two kinds of target matrices take: the two that share the map of an MLP are grown side by side."""
    monkeypatch.setattr(ligo, "ALIGNED", 1)
    old, new = (
        Form(form.width, depth, form.heads, form.mlp, form.kv_heads, form.head_dim)
        for form, depth in zip(FORMS[family(model)], (9, 10), strict=True)
    )
    operator, tree = operator_of(preset, model, old, new), random_tree(model, old)
    grown = split_fused(operator(anywhere(operator), tree), operator.large, operator.large_axes)
    of_target = 2 * 10 * max(grown[n].numel() for n, spec in operator.large_parts.items() if spec.layer is not None)
    of_operator = max(math.prod(shape) for shape in operator.shapes.values())
    assert max(sizes_in_growing(operator, tree)) <= max(of_target, of_operator) < 9 * 10 * old.width * old.inner


def saved_bytes(grown, tensors, stacked, batch):
    """Loss, gradients, and the bytes that wait for the backward pass."""
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = grown(tensors, {"small": stacked}, batch)
    gradients = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    return loss.detach(), gradients, sum(held.values())


@pytest.mark.parametrize("preset", ["paper", "ligo", "preserving", "aki"])
def test_growing_again_in_the_backward_pass_gives_the_same_bits_and_holds_less(preset):
    task, old, new = Task(TaskConfig(patch_size=4)), Form(16, 3, heads=2), Form(32, 4, heads=4)
    operator = operator_of_task(preset, task, old, new)
    tensors = operator.init(torch.Generator().manual_seed(0))
    batch = {"pixel_values": random(4, 1, 8, 8).float(), "labels": torch.arange(4)}
    stacked = operator.stack(task.fresh(old, 0))
    plain, again = (
        saved_bytes(GrownLoss(task, preset, old, new, checkpoint), tensors, stacked, batch)
        for checkpoint in (False, True)
    )
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in tensors)
    tree_bytes = 4 * sum(math.prod(t.shape) for t in operator(tensors, task.fresh(old, 0)).values())
    assert again[2] < plain[2] - 0.3 * tree_bytes


# only the tokens of a batch -------------------------------------------------------------------------------------------


def test_first_of_each():
    assert first_of_each(torch.tensor([7, 2, 7, 7, 0, 2]), 9).tolist() == [True, True, False, False, True, False]


def text_task(name, **settings):
    """Texts of 12 tokens and a vocabulary that 64 of them cannot use up."""
    return Task(dataclasses.replace(ROWS[name].config, settings=(("vocab_size", 800), *settings.items())))


@pytest.mark.parametrize("name", ["bert-text", "gpt2-text", "llama-lm", "bert-mlm", "gpt2-lm", "llama-lm-tied"])
def test_rows_of_tokens_that_a_batch_lacks_are_not_grown(name, monkeypatch):
    """Same logits and gradients; not where a head reads the table, for it reads every row."""
    row = ROWS[name]
    task = text_task(name, **({"tie_word_embeddings": True} if name == "llama-lm-tied" else {}))
    operator = operator_of_task("preserving", task, row.small, row.larger)
    tensors, stacked = operator.init(torch.Generator().manual_seed(0)), operator.stack(task.fresh(row.small, 0))
    tied = name in ("bert-mlm", "gpt2-lm", "llama-lm-tied")
    assert (looked_up(task, operator, stacked) is None) == tied
    batch = {part: tensor for part, tensor in batch_of(task).items() if part != "labels"}

    def run():
        leaves = {part: tensor.clone().requires_grad_() for part, tensor in tensors.items()}
        logits = GrownLoss(task, "preserving", row.small, row.larger).logits(leaves, stacked, batch)
        gradients = torch.autograd.grad(logits.square().sum(), list(leaves.values()))
        return logits, dict(zip(leaves, gradients, strict=True))

    with FlopCounterMode(display=False) as counter:
        logits, gradients = run()
    monkeypatch.setattr(dual_ligo, "USUAL_BATCH", 10**6)
    with FlopCounterMode(display=False) as all_rows:
        expected, expected_gradients = run()
    assert (counter.get_total_flops() < all_rows.get_total_flops()) != tied
    assert_close(logits, expected, rtol=0, atol=1e-5)
    for part in tensors:
        scale = expected_gradients[part].abs().max().clamp(min=1)
        assert_close(gradients[part] / scale, expected_gradients[part] / scale, rtol=0, atol=1e-5)
