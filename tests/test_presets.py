"""The starts of a LiGO operator: what `preserving` keeps and what each of its parts is for; what `paper` does not."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from fedgrow_algo.dual_ligo import grown, grown_forward, operator_between
from fedgrow_algo.ligo import Operator
from fedgrow_algo.presets import (
    PRESETS,
    by_name,
    copied_units,
    equal_shares,
    interlaced_blocks,
    stacked_blocks,
    stacked_from_top,
    unequal_shares,
)
from fedsim.models import Form, Inputs, get_family
from fedsim.task import Task, TaskConfig
from tests import growing


pytestmark = pytest.mark.usefixtures("one_thread")

VIT = get_family("vit")
INPUTS = Inputs("image", 10, image_size=8, channels=1, patch_size=2)
PAPER, PRESERVING = by_name("paper"), by_name("preserving")
COPYING = [preset for preset in PRESETS if preset not in ("paper", "paper-chunked", "ligo")]
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
            assert tensor.shape[-1] == 8 and tensor.min() >= 0 and tensor.max() < 0.5
            assert tensor.shape[-2] == 0 if name.split(".")[1] in ("query", "key", "value") else tensor.shape[-2] == 16
        else:
            assert tensor.argmax(1).tolist() == [0, 1, 2, 0, 1]
            others = tensor[torch.arange(3) != torch.tensor([0, 1, 2, 0, 1])[:, None]]
            assert 0 < others.min() and others.max() < 0.03 and others.std() > 0.003


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
    assert_close(unequal_shares(2, 5), torch.tensor([1 / 6, 1 / 3, 2 / 6, 2 / 3, 3 / 6]).double())
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


# copies, shares, heads -----------------------------------------------------------------------------------------------


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
        yield read.group, read, operator.matrix(tensors, operator.groups[read.group]), operator.matrix(tensors, read)


UNDOES = {  # which axes are read back, beside the residual one
    "vit": {"value", "mlp"},
    "gpt2-lm": {"value", "mlp"},
    "llama-tied": {"value", "mlp"},
    "bert-text": {"value", "mlp", "pooled:embed", "pooled"},
    "bert-mlm": {"value", "mlp", "transform"},
}


@pytest.mark.parametrize("growth", ["all x2", "all", "mlp"])
@pytest.mark.parametrize("model", UNDOES)
@pytest.mark.parametrize("preset", COPYING)
def test_readers_undo_writers(preset, model, growth):
    if not growing.accepted(model, growth, preset):
        return
    old, new = growing.small(model), growing.large(model, growth, preset)
    operator = growing.operator_between(preset, model, old, new)
    seen = set()
    for group, read, B, A in written_and_read(operator, start(operator)):
        undone = A.mT @ B
        if preset == "preserving" and group in operator.residual and not (operator.post_norm and growth != "all"):
            continue  # added coordinates are 0 once normalised: what is read there is free
        if preset == "preserving" and group == "transform" and growth == "all":
            assert_close(undone, torch.eye(8).double(), msg=f"{model} {group}")
        if group == "value" and "group" in read.axes:
            G_old, G = operator.small_axes["group"], operator.large_axes["group"]
            assert_close(sum(equal_shares(G_old, G)), torch.tensor(float(G_old)).double())
        assert_close(
            undone, torch.eye(B.shape[-1]).double().expand_as(undone), msg=lambda m, group=group: f"{group}: {m}"
        )
        seen.add(group)
    assert seen >= {"value", "mlp"}


@pytest.mark.parametrize("preset", COPYING)
@pytest.mark.parametrize("head_dim", [4, 6, 8])
def test_queries_and_keys_of_a_copied_head_meet_as_before_at_the_temperature_of_its_size(preset, head_dim):
    if preset == "hypercloning" and head_dim > 4:
        return
    operator = operator_of(SMALL, larger(heads=4, head_dim=head_dim), by_name(preset))
    tensors = start(operator)
    B_query, B_key = (operator.matrix(tensors, operator.groups[group])[0] for group in ("query", "key"))
    for head in range(4):
        q, k = (B.unflatten(0, (4, head_dim))[head].unflatten(1, (2, 4)) for B in (B_query, B_key))
        met = torch.einsum("jha,jib->haib", q, k)
        expected = torch.zeros_like(met)
        expected[head % 2, :, head % 2] = torch.eye(4).double() * (head_dim / 4) ** 0.5
        assert_close(met, expected)


def test_tied_readers_do_not_undo_writers():
    operator = operator_of(SMALL, larger(heads=3, mlp=13), PAPER)
    tensors = start(operator)
    for group, _, B, A in written_and_read(operator, tensors):
        assert torch.equal(A, B), group


def test_tied_readers_of_an_identity_on_top_read_the_added_rows_as_well():
    operator = operator_of(SMALL, larger(heads=3, mlp=13), by_name("ligo"))
    tensors = start(operator)
    for group, _, B, A in written_and_read(operator, tensors):
        assert torch.equal(A, B), group
        C = tensors[f"width.{group}"]
        on_top = torch.cat([torch.eye(8).double().expand(*C.shape[:-2], 8, 8), C], -2)
        assert_close(on_top.mT @ on_top, torch.eye(8).double() + C.mT @ C)
        if group != "embed":
            unit = torch.zeros(2, 8, 1).double()
            unit[:, 3] = 1
            grown_unit = operator._with_top(unit, B, 1)  # noqa: SLF001, the only place where the identity is
            assert torch.equal(grown_unit, on_top[..., 3:4])


def test_tied_copies_count_a_copied_unit_twice():
    operator = operator_of(SMALL, larger(heads=3, mlp=13), TIED_COPIES)
    twice = {"mlp": [2.0] * 5 + [1.0] * 3, "value": [2.0] * 4 + [1.0] * 4}
    for group, _, B, A in written_and_read(operator, start(operator)):
        if group != "embed":
            assert (A.mT @ B)[0].diagonal().tolist() == twice.pop(group)
    assert not twice


@pytest.mark.parametrize("axes", [dict(heads=4), dict(heads=5), dict(head_dim=7), dict(heads=5, head_dim=7)], ids=str)
@pytest.mark.parametrize("preset", COPYING)
def test_no_head_is_mapped_into_a_head_that_is_not_its_copy(preset, axes):
    large = larger(**axes)
    if preset == "hypercloning" and axes != dict(heads=4):
        return
    operator = operator_of(SMALL, large, by_name(preset))
    tensors = start(operator)
    for group in ("query", "key", "value"):
        matrix = tensors[f"width.{group}"] + tensors.get(f"width.{group}.next", 0)
        B = matrix.unflatten(2, (2, 4)).unflatten(1, (large.heads, large.head_size))
        used = B.abs().amax((0, 2, 4)) > 0  # (new heads, old heads)
        assert used.tolist() == [[new % 2 == old for old in range(2)] for new in range(large.heads)]
        copied = [new % 2 * 4 + j % 4 for new in range(large.heads) for j in range(large.head_size)]
        assert matrix[0].argmax(1).tolist() == copied == copied_units(operator, group).tolist()


def test_order_of_small_mlp_units_does_not_matter():
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    large, tree = larger(mlp=13, width=12), random_tree(SMALL)
    permuted = dict(tree)
    for k in range(2):
        for role in ("mlp.fc1.weight", "mlp.fc1.bias"):
            permuted[BLOCK(k, role)] = tree[BLOCK(k, role)][order]
        permuted[BLOCK(k, "mlp.fc2.weight")] = tree[BLOCK(k, "mlp.fc2.weight")][:, order]
    operator = operator_of(SMALL, large)

    # at the start: the same function, from other copies
    grown_tree, of_permuted = (operator(start(operator), t) for t in (tree, permuted))
    assert_close(run(large, of_permuted).logits, run(large, grown_tree).logits, rtol=0, atol=EXACT)
    assert (of_permuted[BLOCK(0, "mlp.fc1.bias")][8:] - grown_tree[BLOCK(0, "mlp.fc1.bias")][8:]).abs().max() > 0.1

    # anywhere: the same weights, once the map follows the permutation
    tensors = moved(operator)
    follows = tensors | {"width.mlp": tensors["width.mlp"][:, :, order]}
    grown_tree, of_permuted = operator(tensors, tree), operator(follows, permuted)
    for name in grown_tree:
        assert_close(of_permuted[name], grown_tree[name])


# training -------------------------------------------------------------------------------------------------------------


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
    operator = growing.operator_between(preset, model, old, new)
    tree = growing.random_tree(model, old)
    stack = operator.stack(tree)

    def loss(tensors):
        out = growing.logits(model, new, operator.grow(tensors, stack))
        return F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])

    tensors = {name: t.requires_grad_() for name, t in growing.moved(operator, by=0.05).items()}
    loss(tensors).backward()

    step = 1e-5
    with torch.no_grad():
        for kind in ("width", "depth", ""):
            along = {n: randn(*t.shape, seed=i) * n.startswith(kind) for i, (n, t) in enumerate(tensors.items())}
            ahead, behind = (loss({n: t + s * along[n] for n, t in tensors.items()}) for s in (step, -step))
            slope = sum((tensors[name].grad * along[name]).sum() for name in tensors)
            assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=1e-8)
    assert all(t.grad.abs().max() > 0 for t in tensors.values())
    assert all(t.grad is None and not t.requires_grad for t in tree.values())
    assert all(p.grad is None and not p.requires_grad for p in growing.module(model, new).parameters())


@pytest.mark.parametrize("preset", ["paper", "ligo", "preserving"])
def test_gradient_in_each_tensor_of_the_operator_is_its_finite_difference(preset):
    task, small, large = Task(TaskConfig(patch_size=4)), Form(8, 2, heads=2), Form(12, 3, heads=3, mlp=14)
    operator = operator_between(preset, task, small, large)
    tree = {
        name: t.double() + 0.2 * randn(*t.shape, seed=i) for i, (name, t) in enumerate(task.fresh(small, 0).items())
    }
    forward, batch = (
        grown_forward(task, operator, operator.stack(tree), large),
        {"pixel_values": PIXELS, "labels": LABELS},
    )

    def loss(tensors):
        return task.loss(forward(tensors, batch), batch)

    tensors = {name: t.requires_grad_() for name, t in moved(operator, by=0.05).items()}
    loss(tensors).backward()

    step = 1e-5
    with torch.no_grad():
        for name, tensor in tensors.items():
            entry, one = torch.randint(tensor.numel(), (), generator=generator()), torch.zeros_like(tensor)
            one.view(-1)[entry] = step
            ahead, behind = loss(tensors | {name: tensor + one}), loss(tensors | {name: tensor - one})
            assert_close((ahead - behind) / (2 * step), tensor.grad.view(-1)[entry], rtol=1e-6, atol=1e-8)
    assert all(p.grad is None and not p.requires_grad for p in task.skeleton(large).parameters())


def trained(large, preset, steps=4, lr=0.05):
    """The tree grown from a random small model by an operator that took a few steps of SGD."""
    operator, tree = operator_of(SMALL, large, preset), random_tree(SMALL)
    tensors, stack = start(operator), operator.stack(tree)
    for _ in range(steps):
        tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        loss = F.cross_entropy(run(large, operator.grow(tensors, stack)).logits, LABELS)
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


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "large", "text"),
    [
        (Form(12, 2, heads=2), Form(8, 2, heads=2), "'embed' would go from 12 to 8"),
        (Form(8, 2, heads=2, mlp=9), Form(8, 2, heads=2, mlp=7), "'mlp' would go from 9 to 7"),
    ],
    ids=["width", "mlp"],
)
def test_paper_refuses_to_shrink_naming_axis_and_sizes(small, large, text):
    with pytest.raises(ValueError, match=text):
        operator_between("paper", Task(TaskConfig()), small, large)


def test_paper_maps_any_heads_and_any_depth_into_any_other():
    operator = operator_of(size(heads=4, head_dim=2, depth=4), size(heads=2, head_dim=6, depth=2), PAPER)
    assert operator.shapes["width.value"] == (4, 12, 8)
    assert operator.shapes["depth.mlp.fc1"] == (2, 4)


def test_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"preset='exact'.*paper.*preserving"):
        by_name("exact")
