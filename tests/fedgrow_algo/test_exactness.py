"""What growth leaves of the function of a small model: family by preset by growth, and what each part of it is for."""

import dataclasses
import functools

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from fedgrow_algo.presets import PRESETS
from tests.support.family_rows import EPS
from tests.support.growing import (
    GROWTH,
    MAIN,
    MIX_HEADS,
    MODELS,
    SMALL,
    accepted,
    anywhere,
    batch,
    exact,
    family,
    large,
    logits,
    module,
    operator_between,
    random,
    random_tree,
    rotary,
    small,
    start,
    where,
)


pytestmark = pytest.mark.usefixtures("one_thread")

EXACT, BROKEN = 1e-9, 1e-3
PRE_NORM = [model for model in MAIN if where(model) == "before blocks"]
POST_NORM = [model for model in MAIN if where(model) == "after blocks"]
CELLS = [(model, growth) for model in MAIN for growth in GROWTH[family(model)]]
CELLS += [(model, growth) for model in MODELS if model not in MAIN for growth in ("residual x2", "all x2", "all")]


cached_tree = functools.cache(random_tree)


@functools.cache
def cached_logits(model, form):
    return logits(model, form, cached_tree(model, form))


def gap(model, old, new, preset, change=lambda tensors: tensors, tree=None):
    """Largest difference between a logit of a random small model and of the model grown from it."""
    operator = operator_between(preset, model, old, new)
    before = cached_logits(model, old) if tree is None else logits(model, old, tree)
    grown_tree = operator(change(start(operator)), cached_tree(model, old) if tree is None else tree)
    return float((logits(model, new, grown_tree) - before).abs().max())


# the table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "growth"), CELLS)
def test_growth_is_exact_where_the_preset_says_so_and_nowhere_else(model, growth):
    found, expected = {}, {}
    for preset in PRESETS:
        old, new = small(model), large(model, growth, preset)
        try:
            operator = operator_between(preset, model, old, new)
        except ValueError:
            found[preset], expected[preset] = "refused", "accepted" if accepted(model, growth, preset) else "refused"
            continue
        expected[preset] = "exact" if exact(model, growth, preset) else "another function"
        assert PRESETS[preset].exact(operator) == exact(model, growth, preset), preset
        difference = gap(model, old, new, preset)
        found[preset] = {True: "exact", False: difference}[difference < EXACT]
        if difference > BROKEN:
            found[preset] = "another function"
    assert found == expected


def test_every_preset_and_every_family_is_in_the_table():
    columns = {preset: {exact(*cell, preset) for cell in CELLS if accepted(*cell, preset)} for preset in PRESETS}
    always_and_sometimes = {True, False}
    assert {preset for preset, cells in columns.items() if cells == always_and_sometimes} == PRESETS.keys() - {
        "paper",
        "paper-chunked",
        "paper-untied",
        "ligo",
        "aki",
    }
    assert {family(model) for model, _ in CELLS} == SMALL.keys()


@pytest.mark.parametrize(("depth", "growth"), [(1, "mlp"), (1, "residual x2"), (1, "residual"), (2, "mlp")])
def test_units_of_the_block_above_are_no_copies_unless_there_is_no_block_above(depth, growth):
    old = dataclasses.replace(small("gpt2-lm"), depth=depth)
    new = dataclasses.replace(large("gpt2-lm", growth, "aki"), depth=depth)
    says = PRESETS["aki"].exact(operator_between("aki", "gpt2-lm", old, new))
    assert says == (depth == 1 and growth != "residual")
    difference = gap("gpt2-lm", old, new, "aki")
    assert difference < EXACT if says else difference > BROKEN


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("preset", ["preserving", "zero-block", "hypercloning"])
@pytest.mark.parametrize("model", ["modernbert-text", "modernbert-mlm"])
def test_blocks_of_two_kinds_the_first_of_which_lacks_a_norm_grow_exactly_in_depth(model, preset, depth):
    """Even from block 0 alone, which has no such norm to grow others from."""
    old = dataclasses.replace(small(model), depth=depth)
    for new_depth in range(depth, 9):
        new = dataclasses.replace(large(model, "residual x2", preset), depth=new_depth)
        assert PRESETS[preset].exact(operator_between(preset, model, old, new))
        assert gap(model, old, new, preset) < EXACT, new_depth


@pytest.mark.parametrize("model", ["vit", "gpt2-lm", "llama-lm", "bert-text", "deberta-text", "modernbert-text"])
def test_growth_to_the_same_size_changes_no_weight_unless_the_start_is_random(model):
    unchanged = set()
    tree = random_tree(model, small(model))
    for preset in PRESETS:
        if rotary(model) and preset in MIX_HEADS:
            continue
        operator = operator_between(preset, model, small(model), small(model))
        grown_tree = operator(start(operator), tree)
        assert grown_tree.keys() == tree.keys()
        if all(torch.equal(grown_tree[name], tree[name]) for name in tree):
            unchanged.add(preset)
        assert PRESETS[preset].exact(operator) == (preset in unchanged), preset
    assert unchanged == PRESETS.keys() - {"paper", "paper-untied", "paper-chunked", "ligo"}


# loss and gradient, training mode -------------------------------------------------------------------------------------


def loss_and_gradient(model, form, tree, embedded, train):
    """Cross-entropy, and its gradient in what enters the first block's sum: pixels, or embedded tokens."""
    given, entry = batch(model), embedded.detach().clone().requires_grad_()
    skeleton = module(model, form)
    skeleton.train(train)
    if family(model) == "vit":
        out = functional_call(skeleton, tree, kwargs={"pixel_values": entry}).logits
    else:
        kwargs = {"inputs_embeds": entry, "attention_mask": given["attention_mask"]}
        out = functional_call(skeleton, tree, kwargs=kwargs).logits
        out = out[given["attention_mask"] == 1] if out.ndim == 3 else out
    skeleton.eval()
    loss = F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])
    return loss.detach(), torch.autograd.grad(loss, entry)[0]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("model", MAIN)
def test_exact_growth_leaves_the_loss_and_its_gradient_in_the_input(model, train):
    checked = set()
    for preset, growth in [(preset, growth) for preset in PRESETS for growth in ("residual x2", "all x2", "all")]:
        if not exact(model, growth, preset):
            continue
        old, new = small(model), large(model, growth, preset)
        operator, tree = operator_between(preset, model, old, new), random_tree(model, old)
        tensors = start(operator)
        grown_tree = operator(tensors, tree)
        if family(model) == "vit":
            entry, grown_entry = batch(model)["pixel_values"], batch(model)["pixel_values"]
            back = torch.eye(8).double()
        else:
            name = next(name for name, spec in operator.small.items() if spec.dims == ("=token", "embed"))
            ids = batch(model)["input_ids"]
            entry, grown_entry = tree[name][ids], grown_tree[name][ids]
            back = operator.matrix(tensors, operator.groups["embed"])  # e' = B e, so dL/de = B^T dL/de'
        loss, gradient = loss_and_gradient(model, old, tree, entry, train)
        grown_loss, grown_gradient = loss_and_gradient(model, new, grown_tree, grown_entry, train)
        assert_close(grown_loss, loss, rtol=0, atol=EXACT)
        assert_close(grown_gradient @ back, gradient, rtol=0, atol=EXACT)
        assert gradient.abs().max() > BROKEN
        checked.add(preset)
    expected = {"preserving", "net2net", "stacking", "interlacing", "zero-block", "hypercloning"}
    assert checked == expected


# epsilon --------------------------------------------------------------------------------------------------------------


def is_embedding(name):
    return any(part in name for part in ("embed", "wte", "wpe"))


@pytest.mark.parametrize(
    ("model", "preset", "shrinks"),
    [(model, "preserving", model in PRE_NORM) for model in MAIN]
    + [(model, preset, False) for model in MAIN for preset in ("net2net", "hypercloning")],
)
def test_epsilon_goes_as_the_variance_does(model, preset, shrinks):
    """With activations so small that epsilon is much of the variance."""
    old, new = small(model), large(model, "residual x2", preset)
    embeddings = [name for name, t in random_tree(model, old).items() if is_embedding(name) and t.ndim > 1]
    tree = {name: 0.02 * t if name in embeddings else t for name, t in random_tree(model, old).items()}
    before = logits(model, old, tree)
    size = float((before - before.mean(0)).abs().max())  # small itself where the embeddings are the head
    eps = {True: EPS * old.width / new.width, False: EPS}
    assert new.norm_eps == eps[shrinks]
    assert gap(model, old, new, preset, tree=tree) < EXACT * size
    assert gap(model, old, dataclasses.replace(new, norm_eps=eps[not shrinks]), preset, tree=tree) > BROKEN * size


@pytest.mark.parametrize("model", ["gpt2-lm", "llama-lm"])
def test_epsilon_of_a_family_shrinks_with_the_width_by_itself(model):
    old, new = (dataclasses.replace(form, norm_eps=None) for form in (small(model), large(model, "all", "preserving")))
    assert gap(model, old, new, "preserving") < EXACT
    assert gap(model, old, dataclasses.replace(new, norm_eps=EPS), "preserving") > EXACT


# coordinates that are added to the residual axis ----------------------------------------------------------------------


def added(operator, name, rows):
    """`start(operator)` with other rows for the coordinates that are added to the residual axis."""

    def change(tensors):
        matrix = tensors[name].clone()
        matrix[operator.small_axes["embed"] :] = rows(len(matrix) - operator.small_axes["embed"], matrix.shape[1])
        return tensors | {name: matrix}

    return change


@pytest.mark.parametrize("growth", ["residual", "residual x2"])
@pytest.mark.parametrize("model", PRE_NORM)
def test_before_blocks_what_added_coordinates_are_read_with_is_free(model, growth):
    old, new = small(model), large(model, growth, "preserving")
    change = added(operator_between("preserving", model, old, new), "width.embed.read", random)
    assert gap(model, old, new, "preserving", change) < EXACT


@pytest.mark.parametrize("model", POST_NORM)
def test_after_blocks_what_added_coordinates_are_read_with_is_not_free(model):
    old, new = small(model), large(model, "residual", "preserving")
    operator, tree = operator_between("preserving", model, old, new), random_tree(model, old)
    tensors = start(operator)
    changed = added(operator, "width.embed.read", random)(tensors)
    apart = logits(model, new, operator(changed, tree)) - logits(model, new, operator(tensors, tree))
    assert apart.abs().max() > BROKEN


@pytest.mark.parametrize(
    ("model", "rows", "is_exact"),
    [
        ("gpt2-lm", "mean", True),
        ("gpt2-lm", "zero", False),
        ("vit", "mean", True),
        ("vit", "zero", False),
        ("llama-lm", "mean", False),
        ("llama-lm", "zero", True),
    ],
)
def test_added_coordinates_hold_the_mean_under_layer_norm_and_zero_under_rms_norm(model, rows, is_exact):
    old, new = small(model), large(model, "residual", "preserving")
    fill = {"mean": lambda n, D: torch.full((n, D), 1 / D).double(), "zero": lambda n, D: torch.zeros(n, D).double()}
    operator = operator_between("preserving", model, old, new)
    assert (gap(model, old, new, "preserving", added(operator, "width.embed", fill[rows])) < EXACT) == is_exact


def equal_gains(tree):
    """Each normalisation with one gain and one shift for all its coordinates, other than 1 and 0."""
    norms = [name for name in tree if "LayerNorm" in name]
    assert len(norms) >= 10
    return tree | {name: torch.full_like(tree[name], 0.7 + 0.05 * i) for i, name in enumerate(norms)}


@pytest.mark.parametrize("width", [12, 15])
@pytest.mark.parametrize("model", ["bert-text", "bert-tokens"])
def test_after_blocks_another_ratio_is_exact_if_the_gains_of_each_normalisation_are_equal(model, width):
    old = small(model)
    new = dataclasses.replace(old, width=width, heads=3, norm_eps=EPS * old.width / width)
    alike = equal_gains(random_tree(model, old))
    assert gap(model, old, new, "preserving", tree=alike) < EXACT
    assert gap(model, old, new, "preserving") > BROKEN
    assert gap(model, old, new, "net2net", tree=alike) > BROKEN


def test_a_normalisation_of_units_after_an_activation_needs_a_whole_ratio_even_so():
    """Only copies of units pass through an activation, and a normalisation sees how many copies there are."""
    old = small("bert-mlm")
    new = dataclasses.replace(old, width=12, heads=3, norm_eps=EPS * 8 / 12)
    assert gap("bert-mlm", old, new, "preserving", tree=equal_gains(random_tree("bert-mlm", old))) > BROKEN


# symmetry -------------------------------------------------------------------------------------------------------------


def trained(model, form, tree, steps=3, lr=0.02):
    """A few steps of SGD on the grown model's own weights."""
    for _ in range(steps):
        tree = {name: t.detach().requires_grad_() for name, t in tree.items()}
        out = logits(model, form, tree)
        loss = F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])
        gradients = torch.autograd.grad(loss, list(tree.values()), allow_unused=True)
        pairs = zip(tree.items(), gradients, strict=True)
        tree = {name: t.detach() if g is None else t.detach() - lr * g for (name, t), g in pairs}
    return tree


def distances(operator, tree):
    """By group: how far two copies of one unit are apart, at most, in the parameters that write the group."""
    apart = {}
    for name, spec in operator.large.items():
        assert spec.fused is None
        for position, dim in enumerate(spec.parsed):
            if dim.mode == "write" and dim.axes and dim.group != "embed":
                units = tree[name].unflatten(position, [operator.large_axes[axis] for axis in dim.axes])
                units = units.movedim(position, 0)
                half = operator.small_axes[dim.axes[0]]
                assert len(units) == 2 * half
                distance = float((units[:half] - units[half:]).abs().max())
                apart[dim.group] = max(apart.get(dim.group, 0.0), distance)
    return apart


@pytest.mark.parametrize("model", ["vit", "llama-lm", "bert-text"])
def test_copies_that_are_read_alike_stay_copies_and_others_part(model):
    growth = {"mlp": 2 * small(model).inner, "heads": 2 * small(model).heads}
    if family(model) == "llama":
        growth |= {"kv_heads": 4, "width": 24}
    if family(model) == "bert":
        growth |= {"width": 16}
    new = dataclasses.replace(small(model), **growth)
    for preset, part in (("hypercloning", False), ("preserving", True)):
        operator = operator_between(preset, model, small(model), new)
        grown_tree = operator(start(operator), random_tree(model, small(model)))
        before, after = distances(operator, grown_tree), distances(operator, trained(model, new, grown_tree))
        for group in ("value", "mlp", "query", "key"):
            assert before[group] < 1e-12
            assert after[group] > 1e-6 if part else after[group] < 1e-12, (preset, group)


@pytest.mark.parametrize("model", ["vit", "gpt2-lm", "llama-lm"])
def test_tiled_residual_coordinates_stay_copies_and_added_ones_part(model):
    old = small(model)
    for preset, part in (("hypercloning", False), ("preserving", True)):
        new = large(model, "residual x2", preset)
        operator, D = operator_between(preset, model, old, new), old.width
        grown_tree = trained(model, new, operator(start(operator), random_tree(model, old)), lr=0.2)
        written = {name: spec.dims.index("embed") for name, spec in operator.large.items() if "embed" in spec.dims}
        assert any(position == 0 for position in written.values()) or model == "gpt2-lm"
        for name, position in written.items():
            columns = grown_tree[name].movedim(position, -1).reshape(-1, 2 * D)
            if part:
                among_added = (columns[:, D:, None] - columns[:, None, D:]).abs().amax(0)
                assert among_added[~torch.eye(D, dtype=torch.bool)].min() > 1e-9, name
            else:
                assert_close(columns[:, :D], columns[:, D:], rtol=0, atol=1e-12)


# rotary coordinates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in MIX_HEADS])
@pytest.mark.parametrize("role", ["q_proj", "k_proj"])
def test_rotary_coordinates_are_never_mixed_whatever_the_operators_tensors_are(preset, role):
    model = "llama-tied"
    old, new = small(model), large(model, "all x2", preset)
    operator, tree = operator_between(preset, model, old, new), random_tree(model, old)
    names = [name for name in tree if role in name]
    assert len(names) == 4  # weights and biases of two blocks
    for coordinate in range(4):
        alone = dict(tree)
        for name in names:
            alone[name] = torch.zeros_like(tree[name])
            alone[name].unflatten(0, (-1, 4))[:, coordinate] = tree[name].unflatten(0, (-1, 4))[:, coordinate]
        grown_tree = operator(anywhere(operator), alone)
        for name in [name for name in grown_tree if role in name]:
            of_coordinates = grown_tree[name].unflatten(0, (-1, 4)).abs().transpose(0, 1).flatten(1).amax(1)
            assert (of_coordinates > 0).tolist() == [other == coordinate for other in range(4)]
