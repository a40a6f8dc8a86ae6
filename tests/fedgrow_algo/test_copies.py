"""Copies: how units are copied, how readers share them, whether training parts them; gradients in the operator."""

import dataclasses
import functools

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from fedgrow_algo.dual_ligo import GrownLoss
from fedgrow_algo.dual_ligo import operator_between as operator_of_task
from fedgrow_algo.presets import PRESETS, by_name, copied_units, equal_shares
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support import growing
from tests.support.family_rows import FAMILIES
from tests.support.growing import logits, moved, operator_between, random, start


pytestmark = pytest.mark.usefixtures("one_thread")

MODEL, SMALL = "vit", Form(8, 2, heads=2, mlp=8, head_dim=4, norm_eps=0.0)
BLOCK = "vit.layers.{}.{}".format
LABELS = torch.arange(4) % 3
PAPER, PRESERVING = by_name("paper"), by_name("preserving")
NET2NET = dataclasses.replace(PRESERVING, share=equal_shares)
TIED_COPIES = dataclasses.replace(PRESERVING, scale=lambda operator, dim: None)
TIED_RESIDUAL = dataclasses.replace(PRESERVING, own_read=False)
COPYING = [preset for preset in PRESETS if preset not in growing.MIX_HEADS]
EXACT, BROKEN = 1e-9, 1e-3

assert_close = functools.partial(assert_close, rtol=1e-12, atol=1e-12)
random_tree = functools.partial(growing.random_tree, MODEL)


def operator_of(small, large, preset=PRESERVING):
    return operator_between(preset, MODEL, small, large)


def larger(**axes):
    return dataclasses.replace(SMALL, **axes)


def gap(small, large, preset):
    operator, tree = operator_of(small, large, preset), random_tree(small)
    return float((logits(MODEL, large, operator(start(operator), tree)) - logits(MODEL, small, tree)).abs().max())


# readers --------------------------------------------------------------------------------------------------------------


def net2net(tree, units, heads, head_dim=4):
    """Wider by plain index copies; each reader's columns are divided by how often the unit is there."""
    values = [h * head_dim + j for h in heads for j in range(head_dim)]
    grown_tree = dict(tree)
    for k in range(2):
        for names, index, reader in (
            (["mlp.fc1.weight", "mlp.fc1.bias"], units, "mlp.fc2.weight"),
            ([f"attention.v_proj.{p}" for p in ("weight", "bias")], values, "attention.o_proj.weight"),
            ([f"attention.{x}_proj.{p}" for x in "qk" for p in ("weight", "bias")], values, None),
        ):
            for name in names:
                grown_tree[BLOCK(k, name)] = tree[BLOCK(k, name)][index]
            if reader:
                count = torch.tensor([index.count(i) for i in index])
                grown_tree[BLOCK(k, reader)] = tree[BLOCK(k, reader)][:, index] / count
    return grown_tree


def test_one_hot_maps_with_equal_shares_are_net2net():
    operator, tree = operator_of(SMALL, larger(heads=3, mlp=13), NET2NET), random_tree(SMALL)
    expected = net2net(tree, units=[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4], heads=[0, 1, 0])
    grown_tree = operator(start(operator), tree)
    assert grown_tree.keys() == expected.keys()
    for name in expected:
        assert_close(grown_tree[name], expected[name])


def test_preserving_reads_two_copies_with_one_third_and_two_thirds():
    large, tree = larger(heads=3, mlp=20), random_tree(SMALL)
    operator = operator_of(SMALL, large)
    grown_tree = operator(start(operator), tree)
    for k in range(2):
        W, W_grown = (t[BLOCK(k, "attention.o_proj.weight")].unflatten(1, (-1, 4)) for t in (tree, grown_tree))
        for new, (head, share) in enumerate([(0, 1 / 3), (1, 1.0), (0, 2 / 3)]):
            assert_close(W_grown[:, new], share * W[:, head])
        W, W_grown = (t[BLOCK(k, "mlp.fc2.weight")] for t in (tree, grown_tree))
        for new in range(20):  # units 0 to 3 are there three times
            share = (new // 8 + 1) / 6 if new % 8 < 4 else (new // 8 + 1) / 3
            assert_close(W_grown[:, new], share * W[:, new % 8])
            assert torch.equal(grown_tree[BLOCK(k, "mlp.fc1.weight")][new], tree[BLOCK(k, "mlp.fc1.weight")][new % 8])


def test_tied_copies_are_not_net2net():
    operator, tree = operator_of(SMALL, larger(heads=3, mlp=13), TIED_COPIES), random_tree(SMALL)
    expected = net2net(tree, units=[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4], heads=[0, 1, 0])
    grown_tree = operator(start(operator), tree)
    differing = {name for name in expected if (grown_tree[name] - expected[name]).abs().max() > 0.1}
    assert differing == {BLOCK(k, role) for k in (0, 1) for role in ("attention.o_proj.weight", "mlp.fc2.weight")}
    assert gap(SMALL, larger(heads=3, mlp=13), TIED_COPIES) > BROKEN


def written_and_read(operator, tensors):
    """`(group, B, A)` of every axis that is read back, by whatever reads it: a projection, or the gain of a norm whose
    result a tied matrix reads."""
    for read in {dim for dim in operator.dims if dim.mode == "read" or (dim.tied and dim.mode == "gain")}:
        yield read.group, operator.matrix(tensors, operator.groups[read.group]), operator.matrix(tensors, read)


READ_BACK = {
    model: {
        "embed",
        "value",
        "mlp",
        *filter(None, [FAMILIES[growing.family(model)].apart.get(growing.MAIN[model].kind)]),
    }
    for model in (
        "vit",
        "gpt2-lm",
        "llama-tied",
        "bert-text",
        "bert-mlm",
        "deberta-mlm",
        "modernbert-text",
        "modernbert-mlm",
    )
}


@pytest.mark.parametrize(
    ("preset", "model", "growth"),
    [
        (preset, model, growth)
        for preset in COPYING
        for model in READ_BACK
        for growth in ("all x2", "all", "mlp")
        if growing.accepted(model, growth, preset)
    ],
)
def test_readers_undo_writers(preset, model, growth):
    operator = operator_between(preset, model, growing.small(model), growing.large(model, growth, preset))
    undone = {}
    for group, B, A in written_and_read(operator, start(operator)):
        found, identity = A.mT @ B, torch.eye(B.shape[-1], dtype=torch.float64)
        undone[group] = undone.get(group, True) and bool((found - identity).abs().max() < 1e-12)
    averaged = {"before blocks": ("all", "all x2"), "on normalised embeddings": ("all",)}.get(growing.where(model), ())
    # there, a normalisation leaves 0 of the coordinates that were added: the others undo each other
    free = preset == "preserving" and growth in averaged
    assert undone == {group: group != "embed" or not free for group in READ_BACK[model]}


@pytest.mark.parametrize(
    ("preset", "growth"),
    [(preset, g) for preset in COPYING for g in ("all x2", "all") if growing.accepted("bert-mlm", g, preset)],
)
def test_token_embeddings_as_the_head_undo_the_axis_that_the_transform_writes(preset, growth):
    """The head is E B^T with the residual axis' B; what is compared with it was written by the transform's own map."""
    new = growing.large("bert-mlm", growth, preset)
    operator = operator_between(preset, "bert-mlm", growing.small("bert-mlm"), new)
    tensors = start(operator)
    tied = next(dim for dim in operator.dims if dim.tied and dim.mode == "gain")
    B, A = operator.matrix(tensors, operator.groups["embed"]), operator.matrix(tensors, tied)
    assert (tied.group, A.shape) == ("transform", B.shape)
    assert_close(B.mT @ A, torch.eye(8).double())


@pytest.mark.parametrize("model", ["vit", "gpt2-lm", "llama-tied"])
def test_preserving_reads_the_coordinates_there_were_as_they_are_written(model):
    old = growing.small(model)
    operator = operator_between("preserving", model, old, growing.large(model, "all", "preserving"))
    tensors, identity = start(operator), torch.eye(old.width, dtype=torch.float64)
    assert torch.equal(tensors["width.embed"][: old.width], identity)
    assert torch.equal(tensors["width.embed.read"][: old.width], identity)


@pytest.mark.parametrize(
    ("preset", "head_dim"), [(preset, e) for preset in COPYING for e in (4, 6, 8) if preset != "hypercloning" or e == 4]
)
def test_queries_and_keys_of_a_copied_head_meet_as_before_at_the_temperature_of_its_size(preset, head_dim):
    operator = operator_of(SMALL, larger(heads=4, head_dim=head_dim), by_name(preset))
    tensors = start(operator)
    B_query, B_key = (operator.matrix(tensors, operator.groups[group])[0] for group in ("query", "key"))
    for head in range(4):
        q, k = (B.unflatten(0, (4, head_dim))[head].unflatten(1, (2, 4)) for B in (B_query, B_key))
        met = torch.einsum("jha,jib->haib", q, k)
        expected = torch.zeros_like(met)
        expected[head % 2, :, head % 2] = torch.eye(4).double() * (head_dim / 4) ** 0.5
        assert_close(met, expected)


def test_tied_readers_of_an_identity_on_top_read_the_added_rows_as_well():
    operator, tree = operator_of(SMALL, larger(heads=3, mlp=13), by_name("ligo")), random_tree(SMALL)
    tensors = {name: torch.eye(2).double() if name.startswith("depth.") else t for name, t in start(operator).items()}
    grown_tree = operator(tensors, tree)
    for k in range(2):
        for group, writer, reader in (("mlp", "mlp.fc1", "mlp.fc2"), ("value", "attention.v_proj", "attention.o_proj")):
            C = tensors[f"width.{group}"][k]
            names = BLOCK(k, f"{reader}.weight"), BLOCK(k, f"{writer}.weight")
            expected = tree[names[0]] @ (torch.eye(8).double() + C.mT @ C) @ tree[names[1]]
            assert_close(grown_tree[names[0]] @ grown_tree[names[1]], expected)
            assert (C.mT @ C).abs().max() > 0.01


def test_tied_copies_count_a_copied_unit_twice():
    """What the appendix of LiGO writes down, and what no preset does."""
    operator = operator_of(SMALL, larger(heads=3, mlp=13), TIED_COPIES)
    twice = {"mlp": [2.0] * 5 + [1.0] * 3, "value": [2.0] * 4 + [1.0] * 4, "embed": [1.0] * 8}
    for group, B, A in written_and_read(operator, start(operator)):
        assert (A.mT @ B).reshape(-1, 8, 8)[0].diagonal().tolist() == twice.pop(group)
    assert not twice


# heads and units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "axes"),
    [
        (preset, axes)
        for preset in COPYING
        for axes in (dict(heads=4), dict(heads=5), dict(head_dim=7), dict(heads=5, head_dim=7))
        if preset != "hypercloning" or axes == dict(heads=4)
    ],
    ids=str,
)
def test_no_head_is_mapped_into_a_head_that_is_not_its_copy(preset, axes):
    large = larger(**axes)
    operator = operator_of(SMALL, large, by_name(preset))
    tensors = start(operator)
    for group in ("query", "key", "value"):
        matrix = tensors[f"width.{group}"] + tensors.get(f"width.{group}.next", 0)
        B = matrix.unflatten(2, (2, 4)).unflatten(1, (large.heads, large.head_size))
        used = B.abs().amax((0, 2, 4)) > 0  # (new heads, old heads)
        assert used.tolist() == [[new % 2 == old for old in range(2)] for new in range(large.heads)]
        copied = [new % 2 * 4 + j % 4 for new in range(large.heads) for j in range(large.head_size)]
        assert matrix[0].argmax(1).tolist() == copied == copied_units(operator, group).tolist()


@pytest.mark.parametrize("group", ["query", "key", "value"])
def test_heads_of_queries_copy_a_head_of_the_group_that_shares_their_keys_and_values(group):
    old, new = growing.small("llama-lm"), growing.large("llama-lm", "heads x2", "net2net")
    operator = operator_between("net2net", "llama-lm", old, new)
    assert (old.heads, new.heads, old.kv_heads, new.kv_heads) == (4, 12, 2, 2)
    copies = {"query": [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3], "key": [0, 1], "value": list(range(8))}
    assert copied_units(operator, group).tolist() == copies[group]


def test_order_of_small_mlp_units_does_not_matter():
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    large, tree = larger(mlp=13, width=12), random_tree(SMALL)
    permuted = dict(tree)
    for k in range(2):
        for role in ("mlp.fc1.weight", "mlp.fc1.bias"):
            permuted[BLOCK(k, role)] = tree[BLOCK(k, role)][order]
        permuted[BLOCK(k, "mlp.fc2.weight")] = tree[BLOCK(k, "mlp.fc2.weight")][:, order]
    operator = operator_of(SMALL, large)

    # at the start: the same function, from other copies; `test_ligo` has the same weights from maps that follow
    grown_tree, of_permuted = (operator(start(operator), t) for t in (tree, permuted))
    before, after = (logits(MODEL, large, t) for t in (grown_tree, of_permuted))
    assert_close(after, before, rtol=0, atol=EXACT)
    assert (of_permuted[BLOCK(0, "mlp.fc1.bias")][8:] - grown_tree[BLOCK(0, "mlp.fc1.bias")][8:]).abs().max() > 0.1


# gradients and training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        (preset, model)
        for preset in PRESETS
        for model in ("vit", "gpt2-lm", "llama-tied", "bert-mlm")
        if growing.accepted(model, "all x2", preset)
    ],
)
def test_gradient_of_the_loss_in_the_operator_is_the_finite_difference(preset, model):
    old, new = growing.small(model), growing.large(model, "all x2", preset)
    operator, tree = operator_between(preset, model, old, new), growing.random_tree(model, old)
    stack = operator.stack(tree)

    def loss(tensors):
        out = logits(model, new, operator.grow(tensors, stack))
        return F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])

    tensors = {name: t.requires_grad_() for name, t in moved(operator, by=0.05).items()}
    gradients = dict(zip(tensors, torch.autograd.grad(loss(tensors), list(tensors.values())), strict=True))

    step = 1e-6
    with torch.no_grad():
        for kind in ("width", "depth", ""):
            along = {n: random(*t.shape, seed=i) * n.startswith(kind) for i, (n, t) in enumerate(tensors.items())}
            ahead, behind = (loss({n: t + s * along[n] for n, t in tensors.items()}) for s in (step, -step))
            slope = torch.stack([(gradients[name] * along[name]).sum() for name in tensors]).sum()
            assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=1e-8)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    loss(tensors).backward()
    assert all(t.grad is None and not t.requires_grad for t in tree.values())
    assert all(p.grad is None and not p.requires_grad for p in growing.module(model, new).parameters())


@pytest.mark.parametrize("preset", ["paper", "ligo", "preserving"])
def test_gradient_in_each_tensor_of_the_operator_is_its_finite_difference(preset):
    task, small, large = Task(TaskConfig(patch_size=4)), Form(8, 2, heads=2), Form(12, 3, heads=3, mlp=14)
    operator = operator_of_task(preset, task, small, large)
    tree = {
        name: t.double() + 0.2 * random(*t.shape, seed=i) for i, (name, t) in enumerate(task.fresh(small, 0).items())
    }
    grown, stacked = GrownLoss(task, preset, small, large), operator.stack(tree)
    batch = growing.batch("vit") | {"labels": torch.arange(4)}

    def loss(tensors):
        return task.loss(grown.logits(tensors, stacked, batch), batch)

    tensors = {name: t.requires_grad_() for name, t in moved(operator, by=0.05).items()}
    gradients = torch.autograd.grad(loss(tensors), list(tensors.values()))

    step = 1e-5
    with torch.no_grad():
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
            one = torch.zeros_like(tensor)
            one.view(-1)[tensor.numel() // 2] = step
            ahead, behind = loss(tensors | {name: tensor + one}), loss(tensors | {name: tensor - one})
            assert_close((ahead - behind) / (2 * step), gradient.flatten()[tensor.numel() // 2], rtol=1e-6, atol=1e-8)
    assert all(p.grad is None and not p.requires_grad for p in task.skeleton(large).parameters())


def trained(large, preset, steps=4, lr=0.05):
    """The tree grown from a random small model by an operator that took a few steps of SGD."""
    operator, tree = operator_of(SMALL, large, preset), random_tree(SMALL)
    tensors, stack = start(operator), operator.stack(tree)
    for _ in range(steps):
        tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        loss = F.cross_entropy(logits(MODEL, large, operator.grow(tensors, stack)), LABELS)
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        tensors = {name: t.detach() - lr * g for (name, t), g in zip(tensors.items(), gradients, strict=True)}
    return operator(tensors, tree)


def apart(tensor, left, right):
    """Distance of two rows, relative to their size."""
    return float((tensor[left] - tensor[right]).norm() / tensor[left].norm())


def later_copies(old, new):
    """Pairs of coordinates, of `new`, that started from the same one of `old`."""
    return [(i, j) for i in range(new) for j in range(i + old, new, old)]


MORE_COPIES = larger(heads=6, mlp=24)
COPIES = {"mlp.fc1.weight": later_copies(8, 24)} | {
    f"attention.{x}_proj.weight": later_copies(2, 6) for x in ("q", "k", "v")
}


def copies_apart(preset, steps):
    grown_tree = trained(MORE_COPIES, preset, steps)
    for k in range(2):
        for role, pairs in COPIES.items():
            weight = grown_tree[BLOCK(k, role)]
            units = weight if role.startswith("mlp") else weight.unflatten(0, (-1, 4))
            yield from (apart(units, *pair) for pair in pairs)


def test_copies_with_unequal_shares_part_under_training():
    assert max(copies_apart(PRESERVING, steps=0)) == 0
    assert min(copies_apart(PRESERVING, steps=4)) > 1e-6


def test_copies_with_equal_shares_never_part():
    assert max(copies_apart(NET2NET, steps=4)) < 1e-12


def test_copies_within_a_head_part_under_training():
    grown_tree = trained(larger(head_dim=8), PRESERVING)
    for role in ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"):
        heads = grown_tree[BLOCK(0, role)].unflatten(0, (2, 8))
        # the two copies of a query start with different factors: compare directions
        heads = heads / heads.norm(dim=-1, keepdim=True)
        assert min(apart(heads, (h, j), (h, j + 4)) for h in range(2) for j in range(4)) > 1e-6


def new_residual_coordinates_apart(width, preset):
    grown_tree = trained(larger(width=width), preset)
    written = [grown_tree["vit.embeddings.position_embeddings"].flatten(0, 1).T, grown_tree[BLOCK(0, "mlp.fc2.weight")]]
    return [apart(weight, i, j) for weight in written for i in range(8, width) for j in range(8, i)]


@pytest.mark.parametrize("width", [12, 16, 24])
def test_new_residual_coordinates_part_under_training(width):
    assert min(new_residual_coordinates_apart(width, PRESERVING)) > 1e-6


def test_new_residual_coordinates_read_as_they_are_written_never_part():
    assert gap(SMALL, larger(width=12), TIED_RESIDUAL) < EXACT
    assert max(new_residual_coordinates_apart(12, TIED_RESIDUAL)) < 1e-12
