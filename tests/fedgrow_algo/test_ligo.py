"""The LiGO operator: its algebra, against Kronecker products, hand-made maps and plain copying of blocks."""

import dataclasses
import functools

import pytest
import torch
from torch.testing import assert_close

from fedgrow_algo.ligo import Operator, mix, widen
from fedgrow_algo.presets import PRESETS, by_name
from fedsim.core.submodel import split_fused
from fedsim.models import Form, Inputs, get_family
from fedsim.storage.checkpoint import Versions
from tests.support import growing


pytestmark = pytest.mark.usefixtures("one_thread")

VIT = get_family("vit")
INPUTS = Inputs("image", 10, image_size=8, channels=1, patch_size=2)
SMALL, MIDDLE, LARGE = Form(8, 2, heads=2), Form(12, 3, heads=3, mlp=14), Form(15, 4, heads=3, mlp=21)
SMALL_DEEP = Form(8, 4, heads=2)
OTHER_SIZES = {  # for presets that cannot map SMALL to those
    "paper-chunked": {MIDDLE: Form(12, 3, heads=3), LARGE: Form(15, 4, heads=3)},
    "hypercloning": {MIDDLE: Form(16, 3, heads=4), LARGE: Form(24, 4, heads=6, mlp=32)},
}

PAPER = by_name("paper")  # full matrices, tied in and out
PER_BLOCK = {per: dataclasses.replace(PAPER, per=per) for per in ("source", "target")}
per_source_and_target = pytest.mark.parametrize("tied", PER_BLOCK.values(), ids=PER_BLOCK)

assert_close = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def operator_of(small, large, preset=PAPER):
    return Operator(preset, VIT.specs(small, INPUTS), VIT.specs(large, INPUTS), small.axes, large.axes)


def mappable(preset, large=MIDDLE):
    """A form of about this size that the preset can map SMALL into."""
    return OTHER_SIZES.get(preset.name, {}).get(large, large)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@functools.cache
def shapes_of(form):
    with torch.device("meta"):
        module = VIT.build(form, INPUTS)
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def random_tree(form, seed=0):
    return {name: randn(*shape, seed=seed * 1000 + i) for i, (name, shape) in enumerate(shapes_of(form).items())}


def random_tensors(operator, seed=0):
    return {name: randn(*shape, seed=seed * 1000 + i) for i, (name, shape) in enumerate(operator.shapes.items())}


def shared(operator, seed=0):
    """Random tensors whose width maps are the same in every block."""
    tensors = random_tensors(operator, seed)
    return {name: t[:1].expand_as(t) if t.ndim == 3 else t for name, t in tensors.items()}


def with_depth(operator, tensors, table):
    return tensors | {name: table for name in operator.shapes if name.startswith("depth.")}


def identities(operator):
    return {name: torch.eye(*shape[-2:]).double().expand(shape) for name, shape in operator.shapes.items()}


def assert_trees_close(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert_close(left[name], right[name])


def assert_trees_equal(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def trees_differ(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left) > 1e-3


# width ----------------------------------------------------------------------------------------------------------------


def test_widening_both_sides_is_one_kronecker_product():
    W, B, A = randn(4, 3), randn(6, 4, seed=1), randn(5, 3, seed=2)
    grown = widen(widen(W[None], B, 1), A, 2)[0]
    assert_close(grown, B @ W @ A.T)
    assert_close(grown.T.flatten(), torch.kron(A, B) @ W.T.flatten())
    assert_close(grown.flatten(), torch.kron(B, A) @ W.flatten())
    assert not torch.allclose(grown.flatten(), torch.kron(A, B) @ W.flatten())


@pytest.mark.parametrize(("position", "letters"), [(1, "abc,xa->xbc"), (2, "abc,xb->axc"), (3, "abc,xc->abx")])
def test_widening_touches_one_dimension_and_each_block_may_have_its_own_map(position, letters):
    W_L = randn(2, 3, 4, 5)
    B_L = randn(2, 7, W_L.shape[position], seed=1)
    own = widen(W_L, B_L, position)
    for block in range(2):
        expected = torch.einsum(letters, W_L[block], B_L[block])
        assert_close(own[block], expected)
        assert_close(widen(W_L, B_L[block], position)[block], expected)


def test_golden_tied_widening_with_one_learned_row():
    W, B = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert widen(widen(W[None], B, 1), B, 2)[0].tolist() == [[1, 2, 1.5], [3, 4, 3.5], [2, 3, 2.5]]


def test_golden_widening_with_a_copied_unit_read_in_halves():
    W, B = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    A = torch.tensor([0.5, 1.0, 0.5])[:, None] * B
    assert widen(widen(W[None], B, 1), A, 2)[0].tolist() == [[0.5, 2, 0.5], [1.5, 4, 1.5], [0.5, 2, 0.5]]


def test_leading_block_of_identity_on_top_is_the_small_tensor():
    operator = operator_of(SMALL_DEEP, Form(12, 4, heads=3, mlp=14))
    small = random_tree(SMALL_DEEP)
    on_top = identities(operator)
    for name, C in random_tensors(operator).items():
        if name.startswith("width."):
            on_top[name] = on_top[name].clone()
            on_top[name][..., C.shape[-1] :, :] = C[..., C.shape[-1] :, :]
    grown = operator(on_top, small)
    assert_trees_equal({name: t[tuple(map(slice, small[name].shape))] for name, t in grown.items()}, small)

    table = randn(4, 4)
    grown = operator(with_depth(operator, on_top, table), small)
    blended = operator_of(SMALL_DEEP, SMALL_DEEP)
    expected = blended(with_depth(blended, identities(blended), table), small)
    assert_trees_close({name: t[tuple(map(slice, small[name].shape))] for name, t in grown.items()}, expected)


@pytest.mark.parametrize("model", ["vit", "gpt2-lm", "bert-mlm"])
def test_leading_block_of_ligo_is_the_small_tensor_its_blocks_mixed(model):
    small, large = growing.small(model), growing.large(model, "all", "ligo")
    operator = growing.operator_between("ligo", model, small, large)
    tensors, stacked = growing.anywhere(operator), operator.stack(growing.random_tree(model, small))
    grown = split_fused(operator.grow(tensors, stacked), operator.large, operator.large_axes)
    for name, spec in operator.large_parts.items():
        expected = stacked[spec.role if spec.layer is not None else name]
        if spec.layer is not None:
            expected = mix(tensors[f"depth.{spec.role}"], expected)[spec.layer]
        leading = grown[name][tuple(map(slice, expected.shape))]
        assert_close(leading, expected, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(leading, expected) or spec.layer is not None
        assert grown[name].shape != expected.shape or not any(dim.axes for dim in spec.parsed), name


# depth ----------------------------------------------------------------------------------------------------------------


def test_mixing_is_a_weighted_sum_of_blocks():
    w, W_L = randn(3, 2), randn(2, 4, 5, seed=1)
    grown = mix(w, W_L)
    for k in range(3):
        assert_close(grown[k], w[k, 0] * W_L[0] + w[k, 1] * W_L[1])


@per_source_and_target
@pytest.mark.parametrize(
    ("old", "new", "stack"), [(2, 5, [0, 1, 0, 1, 0]), (3, 6, [0, 1, 2, 0, 1, 2]), (4, 3, [0, 1, 2])]
)
def test_one_hot_depth_is_stacking(tied, old, new, stack):
    assert [k % old for k in range(new)] == stack
    small_form, large_form = Form(8, old, heads=2), Form(8, new, heads=2)
    operator = operator_of(small_form, large_form, tied)
    small = random_tree(small_form)
    grown = operator(with_depth(operator, identities(operator), torch.eye(old).double()[stack]), small)
    block = "vit.layers.{}.".format
    expected = {name: tensor for name, tensor in small.items() if not name.startswith("vit.layers.")}
    for k, source in enumerate(stack):
        expected |= {n.replace(block(source), block(k)): t for n, t in small.items() if n.startswith(block(source))}
    assert_trees_equal(grown, expected)


@per_source_and_target
def test_each_module_of_the_block_is_mixed_by_its_own_table_weight_and_bias_alike(tied):
    operator = operator_of(SMALL, SMALL, tied)
    small, swapped = random_tree(SMALL), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    grown = operator(identities(operator) | {"depth.attention.v_proj": swapped}, small)
    changed = {name for name in small if not torch.equal(grown[name], small[name])}
    assert changed == {f"vit.layers.{k}.attention.v_proj.{part}" for k in (0, 1) for part in ("weight", "bias")}
    assert torch.equal(grown["vit.layers.0.attention.v_proj.bias"], small["vit.layers.1.attention.v_proj.bias"])


# order and composition ------------------------------------------------------------------------------------------------


def test_width_and_depth_commute_only_where_maps_are_shared_by_blocks():
    small, large = SMALL, Form(12, 2, heads=3, mlp=14)
    width_first, depth_first = (operator_of(small, large, PER_BLOCK[per]) for per in ("source", "target"))
    tree = random_tree(small)
    alike = shared(width_first)
    assert_trees_close(width_first(alike, tree), depth_first(alike, tree))
    own = random_tensors(width_first)
    assert width_first.shapes == depth_first.shapes
    assert trees_differ(width_first(own, tree), depth_first(own, tree))


def test_shared_maps_commute_with_a_change_of_depth():
    width_first, depth_first = (operator_of(SMALL, MIDDLE, PER_BLOCK[per]) for per in ("source", "target"))
    source, tree = shared(width_first), random_tree(SMALL)
    target = {
        name: source[name][:1].expand(s) if len(s) == 3 else source[name] for name, s in depth_first.shapes.items()
    }
    assert_trees_close(width_first(source, tree), depth_first(target, tree))


@per_source_and_target
def test_growing_twice_is_growing_once_by_the_product_of_the_maps(tied):
    first, second = operator_of(SMALL, MIDDLE, tied), operator_of(MIDDLE, LARGE, tied)
    both = operator_of(SMALL, LARGE, tied)
    # one step has one map a block: whichever step does not own that block must have its maps in common
    per_source = tied.per == "source"
    one = random_tensors(first, seed=1) if per_source else shared(first, seed=1)
    two = shared(second, seed=2) if per_source else random_tensors(second, seed=2)
    product = {}
    for name, shape in both.shapes.items():
        left, right = two[name], one[name]
        if len(shape) == 3:
            left, right = (left[:1], right) if per_source else (left, right[:1])
        product[name] = left @ right
    tree = random_tree(SMALL)
    assert_trees_close(both(product, tree), second(two, first(one, tree)))


# linearity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("trained", [False, True], ids=["start", "moved"])
def test_grown_weights_are_linear_in_the_small_ones(preset, trained):
    operator = operator_of(SMALL, mappable(preset), preset)
    tensors = operator.init(generator(), dtype=torch.float64)
    if trained:
        tensors = {name: t + 0.1 * randn(*t.shape, seed=i) for i, (name, t) in enumerate(tensors.items())}
    X, Y = random_tree(SMALL, seed=1), random_tree(SMALL, seed=2)
    of_sum = operator(tensors, {name: 0.7 * X[name] - 1.9 * Y[name] for name in X})
    grown_X, grown_Y = operator(tensors, X), operator(tensors, Y)
    assert_trees_close(of_sum, {name: 0.7 * grown_X[name] - 1.9 * grown_Y[name] for name in grown_X})
    assert all(not t.any() for t in operator(tensors, {name: torch.zeros_like(t) for name, t in X.items()}).values())


@per_source_and_target
def test_grown_weights_are_quadratic_in_tied_width_maps(tied):
    operator = operator_of(SMALL, MIDDLE, tied)
    tensors, tree, c = random_tensors(operator), random_tree(SMALL), 3.0
    scaled = {name: c * t if name.startswith("width.") else t for name, t in tensors.items()}
    grown, of_scaled = operator(tensors, tree), operator(scaled, tree)
    powers = {}
    for name, spec in operator.large.items():
        powers[name] = sum(bool(dim.axes) for dim in spec.parsed)
        assert_close(of_scaled[name], c ** powers[name] * grown[name])
    assert powers["vit.layers.0.attention.o_proj.weight"] == 2
    assert powers["vit.layers.0.mlp.fc1.bias"] == powers["vit.layers.0.layernorm_before.weight"] == 1
    assert powers["vit.embeddings.position_embeddings"] == powers["classifier.weight"] == 1
    assert powers["classifier.bias"] == 0


def test_grown_weights_are_linear_in_a_map_that_is_only_written_or_only_read_with():
    operator = operator_of(SMALL, MIDDLE, dataclasses.replace(PAPER, own_read=True))
    tensors, tree, c = random_tensors(operator), random_tree(SMALL), 3.0
    grown = operator(tensors, tree)
    written = operator(tensors | {"width.embed": c * tensors["width.embed"]}, tree)
    read = operator(tensors | {"width.embed.read": c * tensors["width.embed.read"]}, tree)
    for name, spec in operator.large.items():
        modes = [dim.mode for dim in spec.parsed if dim.group == "embed"]
        assert_close(written[name], (c if set(modes) & {"write", "gain", "shift"} else 1.0) * grown[name])
        assert_close(read[name], (c if "read" in modes else 1.0) * grown[name])


def test_grown_weights_are_linear_in_the_depth_tables():
    operator = operator_of(SMALL, MIDDLE)
    tensors, tree = random_tensors(operator), random_tree(SMALL)
    doubled = {name: 2 * t if name.startswith("depth.") else t for name, t in tensors.items()}
    grown, of_doubled = operator(tensors, tree), operator(doubled, tree)
    for name, spec in operator.large.items():
        assert_close(of_doubled[name], (1 if spec.layer is None else 2) * grown[name])


# names, state, files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("large", [SMALL, MIDDLE, LARGE], ids=str)
def test_grown_tree_has_the_names_order_and_shapes_of_the_large_module(preset, large):
    large = mappable(preset, large)
    operator = operator_of(SMALL, large, preset)
    grown = operator(operator.init(generator(), dtype=torch.float64), random_tree(SMALL))
    assert list(grown) == list(operator.large)
    assert {name: tensor.shape for name, tensor in grown.items()} == shapes_of(large)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_growing_keeps_no_state_and_writes_into_nothing(preset):
    operator = operator_of(SMALL, mappable(preset), preset)
    tensors, tree = random_tensors(operator), random_tree(SMALL)
    before = [{name: t.clone() for name, t in part.items()} for part in (tensors, tree)]
    first = operator(tensors, tree)
    assert_trees_equal(operator(tensors, tree), first)
    assert_trees_equal(operator.grow(tensors, operator.stack(tree)), first)
    assert_trees_equal(tensors, before[0])
    assert_trees_equal(tree, before[1])


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saved_operator_and_small_model_give_the_grown_model_again(preset, dtype, tmp_path):
    operator = operator_of(SMALL, mappable(preset), preset)
    tensors = operator.init(generator(), dtype=dtype)
    small = {name: t.to(dtype) for name, t in random_tree(SMALL).items()}
    loaded = []
    for name, tree in {"operator": tensors, "small": small}.items():
        Versions(tmp_path, name).save(0, tree)
        found = Versions(tmp_path, name).load(1)
        assert found
        loaded.append(found[1])
    again = operator_of(SMALL, mappable(preset), preset)(*loaded)
    grown = operator(tensors, small)
    assert all(t.dtype == dtype for t in grown.values())
    assert_trees_equal(again, grown)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_start_is_a_function_of_the_generator_alone(preset):
    operator = operator_of(SMALL, mappable(preset), preset)
    global_stream = torch.get_rng_state()
    first, again, other = (operator.init(generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), global_stream)
    assert {name: tuple(t.shape) for name, t in first.items()} == operator.shapes
    assert_trees_equal(first, again)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    widths = {name for name in first if name.startswith("width.")}
    random = {"paper": widths, "paper-untied": widths, "paper-chunked": widths, "ligo": first.keys()}
    assert drawn == random.get(preset.name, set())


@pytest.mark.parametrize("wrong", ["missing", "extra", "deeper"])
def test_a_tree_of_another_form_is_refused_by_name(wrong):
    operator, tree = operator_of(SMALL, MIDDLE), random_tree(SMALL)
    if wrong == "missing":
        del tree["classifier.bias"]
        name = "classifier.bias"
    elif wrong == "extra":
        tree["qkv.weight"] = randn(3)
        name = "qkv.weight"
    else:
        tree = random_tree(SMALL_DEEP)
        name = "vit.layers.2"
    with pytest.raises(ValueError, match=f"small form.*{name}"):
        operator.stack(tree)
