"""The starts of a LiGO operator: what `preserving` keeps and what each of its parts is for; what `paper` does not."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.testing import assert_close

from fedgrow_algo.blocks import in_their_places, interlaced_blocks, stacked_blocks, stacked_from_top
from fedgrow_algo.dual_ligo import grown, operator_between
from fedgrow_algo.ligo import Operator
from fedgrow_algo.presets import (
    PRESETS,
    by_name,
    equal_shares,
    unequal_shares,
)
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form, Inputs, get_family


pytestmark = pytest.mark.usefixtures("one_thread")

VIT = get_family("vit")
INPUTS = Inputs("image", 10, image_size=8, channels=1, patch_size=2)
PAPER, PRESERVING = by_name("paper"), by_name("preserving")
COPYING = [preset for preset in PRESETS if preset not in ("paper", "paper-untied", "paper-chunked", "ligo")]
EXACT, BROKEN = 1e-9, 1e-3

assert_close = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def size(width=8, depth=2, heads=2, head_dim=4, mlp=8):
    """A ViT whose axes are all free: one can grow alone. Nothing is added to variances: rounding is the only error."""
    return Form(width, depth, heads, mlp, head_dim=head_dim, norm_eps=0.0)


@functools.cache
def module(form):
    return VIT.build(form, INPUTS).double().requires_grad_(False).eval()


SMALL = size()
ALL_LARGER = size(width=12, depth=5, heads=5, head_dim=7, mlp=21)
BLOCK = "vit.layers.{}.{}".format


def operator_of(small, large, preset=PRESERVING):
    return Operator(preset, VIT.specs(small, INPUTS), VIT.specs(large, INPUTS), small.axes, large.axes)


def larger(**axes):
    return dataclasses.replace(SMALL, **axes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def random_tree(form, seed=0):
    """Weights of ordinary size, and biases, gains and shifts that are neither 0 nor 1."""
    tree = {}
    for i, (name, parameter) in enumerate(module(form).named_parameters()):
        gain = "norm" in name and name.endswith("weight")
        tree[name] = float(gain) + 0.3 * randn(*parameter.shape, seed=seed * 1000 + i)
    return tree


def start(operator, seed=0):
    return operator.init(generator(seed), dtype=torch.float64)


def moved(operator, by=0.1):
    return {name: t + by * randn(*t.shape, seed=i) for i, (name, t) in enumerate(start(operator).items())}


PIXELS, LABELS = randn(5, 1, 8, 8), torch.arange(5)


def run(form, tree, pixels=PIXELS, **options):
    return functional_call(module(form), tree, kwargs={"pixel_values": pixels} | options)


def gap(small, large, preset=PRESERVING, change=lambda tensors: tensors):
    """Largest difference between the logits of a random small model and of the model grown from it."""
    operator, tree = operator_of(small, large, preset), random_tree(small)
    grown_tree = operator(change(start(operator)), tree)
    return float((run(large, grown_tree).logits - run(small, tree).logits).abs().max())


NET2NET = dataclasses.replace(PRESERVING, share=equal_shares)
TIED_COPIES = dataclasses.replace(PRESERVING, scale=lambda operator, dim: None)
TIED_RESIDUAL = dataclasses.replace(PRESERVING, own_read=False)

GROWTH = {
    "depth": dict(depth=5),
    "depth x2": dict(depth=4),
    "heads": dict(heads=3),
    "heads x3": dict(heads=6),
    "head size": dict(head_dim=6),
    "head size x2": dict(head_dim=8),
    "mlp": dict(mlp=13),
    "mlp x4": dict(mlp=32),
    "residual": dict(width=12),
    "residual by one": dict(width=9),
    "residual x3": dict(width=24),
    "everything": dict(width=12, depth=5, heads=5, head_dim=7, mlp=21),
}


# preserving: function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", GROWTH.values(), ids=GROWTH)
def test_preserving_growth_along_each_axis_leaves_the_logits(axes):
    assert gap(SMALL, larger(**axes)) < EXACT


FORMS = {
    "wider, larger heads": (Form(8, 2, heads=2), Form(12, 2, heads=2)),
    "wider, more heads": (Form(8, 2, heads=2), Form(12, 2, heads=3)),
    "deeper": (Form(8, 2, heads=2), Form(8, 3, heads=2)),
    "larger mlp": (Form(8, 2, heads=2), Form(8, 2, heads=2, mlp=20)),
    "all": (Form(8, 2, heads=2), Form(18, 5, heads=3, mlp=31)),
    "no small multiple": (Form(10, 3, heads=2, mlp=7), Form(21, 4, heads=3, mlp=11)),
}


@pytest.mark.parametrize(("small", "large"), FORMS.values(), ids=FORMS)
def test_preserving_growth_between_forms_leaves_the_logits_of_the_hugging_face_modules(small, large):
    task = Task(TaskConfig())
    assert task.inputs == INPUTS
    operator = operator_between("preserving", task, small, large)
    tree = {
        name: t.double() + 0.2 * randn(*t.shape, seed=i) for i, (name, t) in enumerate(task.fresh(small, 0).items())
    }
    grown_module = task.module(large, grown(operator, start(operator), operator.stack(tree)))
    assert_close(grown_module(PIXELS).logits, task.module(small, tree)(PIXELS).logits, rtol=0, atol=EXACT)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*(st.tuples(st.integers(1, least), st.integers(0, 2 * least)) for least in (6, 3, 3, 4, 6))),
    seed=st.integers(0, 2**20),
)
def test_preserving_growth_leaves_the_logits_whatever_the_sizes(sizes, seed):
    (width, *rest), (more_width, *more_rest) = zip(*sizes, strict=True)
    small = size(width + 2, *rest)  # layer norm over two or more coordinates; over one it is constant
    large = size(width + 2 + more_width, *map(sum, zip(rest, more_rest, strict=True)))
    operator, tree = operator_of(small, large), random_tree(small, seed)
    assert_close(run(large, operator(start(operator), tree)).logits, run(small, tree).logits, rtol=EXACT, atol=EXACT)


def test_preserving_growth_leaves_every_position_of_every_block():
    large = larger(width=12, heads=3, head_dim=6, mlp=13)
    operator, tree = operator_of(SMALL, large), random_tree(SMALL)
    small_states = run(SMALL, tree, output_hidden_states=True).hidden_states
    large_states = run(large, operator(start(operator), tree), output_hidden_states=True).hidden_states
    for of_small, of_large in zip(small_states, large_states, strict=True):
        assert_close(of_large[..., :8], of_small, rtol=0, atol=EXACT)
        mean = of_small.mean(-1, keepdim=True).expand(*of_small.shape[:-1], 4)
        assert_close(of_large[..., 8:], mean, rtol=0, atol=EXACT)


def test_preserving_depth_inserts_blocks_that_add_nothing():
    large = larger(depth=5)
    operator, tree = operator_of(SMALL, large), random_tree(SMALL)
    grown_tree = operator(start(operator), tree)
    for k, (source, new) in enumerate([(0, False), (0, True), (0, True), (1, False), (1, True)]):
        for role in ("attention.q_proj.weight", "mlp.fc1.bias", "layernorm_after.weight"):
            assert torch.equal(grown_tree[BLOCK(k, role)], tree[BLOCK(source, role)])
        for role in ("attention.o_proj", "mlp.fc2"):
            for part in ("weight", "bias"):
                before = tree[BLOCK(source, f"{role}.{part}")]
                assert torch.equal(grown_tree[BLOCK(k, f"{role}.{part}")], 0 * before if new else before)
    aligned = {name: t.clone() for name, t in grown_tree.items()}  # alike in memory, so alike in rounding
    assert torch.equal(run(large, aligned).logits, run(SMALL, tree).logits)


# preserving: every part of it is needed -------------------------------------------------------------------------------


def without(part):
    """`preserving` with the row factors of some uses left out."""

    def scale(operator, dim):
        factors = PRESERVING.scale(operator, dim)
        unread = dim.mode == "write" and dim.group not in operator.read
        if part == "temperature" and unread:
            heads = operator.large_axes["head"], operator.small_axes["head"]
            old, new = operator.sizes(dim.group)
            return factors / ((new / heads[0]) / (old / heads[1])) ** 0.25
        return None if part in (dim.mode, "all") or (part == "shares of queries and keys" and unread) else factors

    return dataclasses.replace(PRESERVING, scale=scale)


def residual_rows(value):
    def change(tensors):
        written = tensors["width.embed"].clone()
        written[8:] = 0.0 if value == "zero" else torch.eye(8).double()[: len(written) - 8]
        return tensors | {"width.embed": written}

    return change


def stacked(tensors):
    """New blocks whose output projections are copies like the rest: plain stacking."""
    return tensors | {name: tensors["depth.mlp.fc1"] for name in tensors if name.startswith("depth.")}


@pytest.mark.parametrize(
    ("growth", "preset"),
    [
        ("everything", without("all")),
        ("mlp", without("read")),
        ("heads", without("read")),
        ("head size", without("shares of queries and keys")),
        ("head size x2", without("temperature")),
        ("residual", without("gain")),
        ("residual", without("shift")),
    ],
    ids=["all factors", "mlp", "heads", "q k", "temperature", "gain", "shift"],
)
def test_without_any_one_of_its_factors_growth_is_not_preserving(growth, preset):
    large = larger(**GROWTH[growth])
    assert gap(SMALL, large) < EXACT
    assert gap(SMALL, large, preset) > BROKEN


@pytest.mark.parametrize(
    ("growth", "change"),
    [("residual", residual_rows("copy")), ("residual", residual_rows("zero")), ("depth", stacked)],
    ids=["residual copies of unequal counts", "residual zeros", "stacked blocks"],
)
def test_other_starts_of_the_residual_axis_and_of_new_blocks_are_not_preserving(growth, change):
    assert gap(SMALL, larger(**GROWTH[growth]), change=change) > BROKEN


@pytest.mark.parametrize("axes", GROWTH.values(), ids=GROWTH)
def test_equal_shares_are_preserving_too(axes):
    assert gap(SMALL, larger(**axes), NET2NET) < EXACT


@pytest.mark.parametrize("axes", [{}, *GROWTH.values()], ids=["same size", *GROWTH])
def test_paper_start_is_not_preserving(axes):
    assert gap(SMALL, larger(**axes), PAPER) > 1e-2


def test_paper_starts_from_xavier_normal_maps_and_the_mean_of_the_blocks():
    small = size(width=64, depth=3, heads=2, head_dim=32, mlp=80)
    operator = operator_of(small, size(width=96, depth=4, heads=3, head_dim=32, mlp=112), PAPER)
    for name, tensor in start(operator).items():
        if name.startswith("depth."):
            assert_close(tensor, torch.full_like(tensor, 1 / 3), rtol=1e-7, atol=0)
        else:
            fan_out, fan_in = tensor.shape[-2:]
            xavier = (2 / (fan_in + fan_out)) ** 0.5
            for of_block in tensor.view(-1, fan_out, fan_in):
                assert abs(of_block.mean()) < 0.05 * xavier
                assert abs(of_block.std() / xavier - 1) < 0.05


def test_ligo_starts_from_averages_and_noisy_stacking():
    operator = operator_of(size(depth=3), size(width=24, depth=5, mlp=24), by_name("ligo"))
    for name, tensor in start(operator).items():
        assert_close(tensor.sum(-1), torch.ones(tensor.shape[:-1]).double(), rtol=1e-6, atol=0)
        if name.startswith("width."):
            assert tensor.shape[-2:] == ({"query": 0, "key": 0, "value": 0}.get(name.split(".")[1], 16), 8)
            assert not tensor.numel() or (tensor.min() >= 0 and tensor.max() < 0.5)
        else:
            assert tensor.argmax(1).tolist() == [0, 1, 2, 0, 1]
            others = tensor[torch.arange(3) != torch.tensor([0, 1, 2, 0, 1])[:, None]]
            assert others.min() > 0 and others.max() < 0.03 and others.std() > 0.003


# depth and shares, by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "old", "new", "blocks"),
    [
        (stacked_blocks, 2, 5, [0, 1, 0, 1, 0]),
        (stacked_blocks, 3, 6, [0, 1, 2, 0, 1, 2]),
        (stacked_from_top, 2, 5, [0, 1, 0, 1, 1]),
        (stacked_from_top, 3, 8, [0, 1, 2, 0, 1, 2, 1, 2]),
        (stacked_from_top, 3, 6, [0, 1, 2, 0, 1, 2]),
        (interlaced_blocks, 2, 4, [0, 0, 1, 1]),
        (interlaced_blocks, 2, 5, [0, 0, 0, 1, 1]),
        (interlaced_blocks, 3, 4, [0, 0, 1, 2]),
    ],
)
def test_which_block_each_block_copies(rule, old, new, blocks):
    assert rule(old, new) == blocks
    assert rule(old, old) == list(range(old))


@pytest.mark.parametrize(
    ("small", "large", "blocks"),
    [
        ("gllg", "gllgl", [0, 1, 2, 3, 3]),  # interlacing would have a local block where a global one stands
        ("gl", "gll", [0, 0, 1]),
        ("gllg", "gllgll", [0, 1, 2, 3, 3, 3]),
        ("gll", "gllgll", [0, 0, 1, 1, 2, 2]),
        ("g", "gll", [0, 0, 0]),
        ("012", "01234", [0, 1, 2, 2, 2]),  # no block is as another
    ],
)
def test_blocks_are_placed_where_blocks_of_their_kind_stand(small, large, blocks):
    assert in_their_places(small, large) == blocks


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 4))
def test_blocks_of_a_pattern_always_have_a_place_and_interlace_where_all_are_alike(old, more, every):
    kinds = ["g" if k % every == 0 else "l" for k in range(old + more)]
    source = in_their_places(kinds[:old], kinds)
    first = [source.index(block) for block in range(old)]
    assert source == sorted(source) and [kinds[k] for k in first] == kinds[:old]
    if every == 1:
        assert source == interlaced_blocks(old, old + more)


@pytest.mark.parametrize(
    ("preset", "blocks", "silent"),
    [
        ("net2net", [0, 1, 0, 1, 1], []),
        ("aki", [0, 1, 0, 1, 1], []),
        ("stacking", [0, 1, 0, 1, 0], []),
        ("interlacing", [0, 0, 0, 1, 1], []),
        ("zero-block", [0, 0, 0, 1, 1], [1, 2, 4]),
        ("hypercloning", [0, 0, 0, 1, 1], [1, 2, 4]),
        ("preserving", [0, 0, 0, 1, 1], [1, 2, 4]),
    ],
)
def test_depth_tables_copy_blocks_and_silence_what_writes_the_residual_axis(preset, blocks, silent):
    tensors = start(operator_of(SMALL, larger(depth=5), by_name(preset)))
    tables = {name.removeprefix("depth."): t for name, t in tensors.items() if name.startswith("depth.")}
    assert len(tables) == 8
    for name, table in tables.items():
        expected = torch.eye(2).double()[blocks]
        if name in ("attention.o_proj", "mlp.fc2"):
            expected[silent] = 0.0
        assert torch.equal(table, expected), name


def test_shares_of_the_copies_of_a_unit_add_up_to_one():
    assert equal_shares(2, 5).tolist() == [1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3]
    assert_close(unequal_shares(2, 5), torch.tensor([1 / 6, 1 / 3, 2 / 6, 2 / 3, 3 / 6], dtype=torch.float64))
    assert equal_shares(3, 3).tolist() == unequal_shares(3, 3).tolist() == [1, 1, 1]


def test_aki_by_hand():
    """Rows of a grown block's projection: its own block's, then the block above's; the last block has none above."""
    small, large = size(mlp=2), size(mlp=3)
    operator, tree = operator_of(small, large, by_name("aki")), random_tree(small)
    for k, rows in enumerate(([[1, 2], [3, 4]], [[5, 6], [7, 8]])):
        tree[BLOCK(k, "mlp.fc1.weight")] = torch.tensor(rows).double().repeat(1, 4)
        tree[BLOCK(k, "mlp.fc1.bias")] = 10.0 * torch.tensor(rows)[:, 0].double()
        tree[BLOCK(k, "mlp.fc2.weight")] = torch.tensor(rows).double().repeat(4, 1)
    grown_tree = operator(start(operator), tree)
    assert grown_tree[BLOCK(0, "mlp.fc1.weight")][:, :2].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert grown_tree[BLOCK(1, "mlp.fc1.weight")][:, :2].tolist() == [[5, 6], [7, 8], [5, 6]]
    assert grown_tree[BLOCK(0, "mlp.fc1.bias")].tolist() == [10, 30, 50]
    assert grown_tree[BLOCK(1, "mlp.fc1.bias")].tolist() == [50, 70, 50]
    # unit 0 is there twice, and read in halves; the residual axis did not grow
    assert grown_tree[BLOCK(0, "mlp.fc2.weight")][:2].tolist() == [[0.5, 2, 0.5], [1.5, 4, 1.5]]
    assert grown_tree[BLOCK(1, "mlp.fc2.weight")][:2].tolist() == [[2.5, 6, 2.5], [3.5, 8, 3.5]]
