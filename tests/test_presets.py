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
from fedgrow_algo.presets import PRESETS, by_name
from fedsim.models import Form, Inputs, get_family
from fedsim.task import Task, TaskConfig


pytestmark = pytest.mark.usefixtures("one_thread")

VIT = get_family("vit")
INPUTS = Inputs("image", 10, image_size=8, channels=1, patch_size=2)
PAPER, PRESERVING = by_name("paper"), by_name("preserving")
EXACT, BROKEN = 1e-9, 1e-3

assert_close = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Size:
    """A ViT whose axes are all free, `heads * head_dim` included: one axis can grow alone.

    `eps` is added to the variance by its normalisations; 0 leaves rounding as the only error.
    """

    width: int = 8
    depth: int = 2
    heads: int = 2
    head_dim: int = 4
    mlp: int = 8
    eps: float = 0.0

    @property
    def axes(self):
        return {"embed": self.width, "head": self.heads, "head_dim": self.head_dim, "mlp": self.mlp}

    @property
    def specs(self):
        return VIT.specs(Form(self.width, self.depth, heads=1, mlp=self.mlp), INPUTS)

    @property
    def module(self):
        return _module(self)


@functools.cache
def _module(size):
    module = VIT.build(Form(size.width, size.depth, heads=1, mlp=size.mlp), INPUTS)
    config = module.config
    config.num_attention_heads, config.head_dim, config.layer_norm_eps = size.heads, size.head_dim, size.eps
    return type(module)(config).double().requires_grad_(False).eval()


SMALL = Size()
ALL_LARGER = Size(width=12, depth=5, heads=5, head_dim=7, mlp=21)
BLOCK = "vit.layers.{}.{}".format


def operator_of(small, large, preset=PRESERVING):
    return Operator(preset, small.specs, large.specs, small.axes, large.axes)


def larger(**axes):
    return dataclasses.replace(SMALL, **axes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def random_tree(size, seed=0):
    """Weights of ordinary size, and biases, gains and shifts that are neither 0 nor 1."""
    tree = {}
    for i, (name, parameter) in enumerate(size.module.named_parameters()):
        gain = "norm" in name and name.endswith("weight")
        tree[name] = float(gain) + 0.3 * randn(*parameter.shape, seed=seed * 1000 + i)
    return tree


def start(operator, seed=0):
    return operator.init(generator(seed), dtype=torch.float64)


def moved(operator, by=0.1):
    return {name: t + by * randn(*t.shape, seed=i) for i, (name, t) in enumerate(start(operator).items())}


PIXELS, LABELS = randn(5, 1, 8, 8), torch.arange(5)


def run(size, tree, pixels=PIXELS, **options):
    return functional_call(size.module, tree, kwargs={"pixel_values": pixels} | options)


def gap(small, large, preset=PRESERVING, change=lambda tensors: tensors):
    """Largest difference between the logits of a random small model and of the model grown from it."""
    operator, tree = operator_of(small, large, preset), random_tree(small)
    grown_tree = operator(change(start(operator)), tree)
    return float((run(large, grown_tree).logits - run(small, tree).logits).abs().max())


def copied(dim, small_axes, large_axes):
    """Which old coordinate each new one copies: whole heads in turn, and within each head its coordinates in turn."""
    index = [0]
    for axis in dim.axes:
        old = small_axes[axis]
        index = [i * old + j % old for i in index for j in range(large_axes[axis])]
    return index


def equal_shares(operator, dim):
    """As `preserving`, but all copies of a unit are read alike: plain Net2Net."""
    if dim.mode != "read" or dim.group in operator.residual:
        return PRESERVING.scale(operator, dim)
    index = torch.tensor(copied(dim, operator.small_axes, operator.large_axes))
    return 1.0 / torch.bincount(index)[index].double()


NET2NET = dataclasses.replace(PRESERVING, scale=equal_shares)
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
    module = task.module(large, grown(operator, start(operator), tree))
    assert_close(module(PIXELS).logits, task.module(small, tree)(PIXELS).logits, rtol=0, atol=EXACT)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*(st.tuples(st.integers(1, least), st.integers(0, 2 * least)) for least in (6, 3, 3, 4, 6))),
    seed=st.integers(0, 2**20),
)
def test_preserving_growth_leaves_the_logits_whatever_the_sizes(sizes, seed):
    (width, *rest), (more_width, *more_rest) = zip(*sizes, strict=True)
    small = Size(width + 2, *rest)  # layer norm over two or more coordinates; over one it is constant
    large = Size(width + 2 + more_width, *map(sum, zip(rest, more_rest, strict=True)))
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


def test_what_remains_of_a_wider_residual_axis_is_the_eps_of_its_normalisations():
    small = larger(eps=1e-4)
    assert gap(small, larger(width=12, eps=1e-4 * 8 / 12)) < EXACT
    assert EXACT < gap(small, larger(width=12, eps=1e-4)) < 1e-2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_preserving_growth_leaves_the_loss_and_its_gradient_in_the_input(training):
    operator, tree = operator_of(SMALL, ALL_LARGER), random_tree(SMALL)
    losses, gradients = [], []
    for size, weights in ((SMALL, tree), (ALL_LARGER, operator(start(operator), tree))):
        pixels = PIXELS.clone().requires_grad_()
        size.module.train(training)
        loss = F.cross_entropy(run(size, weights, pixels).logits, LABELS)
        size.module.eval()
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, pixels)[0])
    assert_close(*losses, rtol=0, atol=EXACT)
    assert_close(*gradients, rtol=0, atol=EXACT)
    assert gradients[0].abs().max() > BROKEN


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


def test_preserving_growth_to_the_same_size_is_the_identity():
    operator, tree = operator_of(SMALL, SMALL), random_tree(SMALL)
    grown_tree = operator(start(operator), tree)
    assert grown_tree.keys() == tree.keys()
    assert all(torch.equal(grown_tree[name], tree[name]) for name in tree)


def test_what_new_residual_coordinates_are_read_with_is_free():
    def anything(tensors):
        read = tensors["width.embed.read"].clone()
        read[8:] = randn(4, 8)
        return tensors | {"width.embed.read": read}

    assert gap(SMALL, larger(width=12), change=anything) < EXACT


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
    small = Size(width=64, depth=3, heads=2, head_dim=32, mlp=80)
    operator = operator_of(small, Size(width=96, depth=4, heads=3, head_dim=32, mlp=112), PAPER)
    for name, tensor in start(operator).items():
        if name.startswith("depth."):
            assert_close(tensor, torch.full_like(tensor, 1 / 3), rtol=1e-7, atol=0)
        else:
            fan_out, fan_in = tensor.shape[-2:]
            xavier = (2 / (fan_in + fan_out)) ** 0.5
            for of_block in tensor.view(-1, fan_out, fan_in):
                assert abs(of_block.mean()) < 0.05 * xavier
                assert abs(of_block.std() / xavier - 1) < 0.05


# preserving: copies, shares, heads ------------------------------------------------------------------------------------


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
    """`(group, B, A)` of every axis that lives inside a block and is read back there."""
    dims = [dim for spec in operator.small.values() for dim in spec.parsed if dim.group not in operator.residual]
    for read in {dim for dim in dims if dim.mode == "read"}:
        written = next(dim for dim in dims if dim.group == read.group and dim.mode == "write")
        yield read.group, operator.matrix(tensors, written), operator.matrix(tensors, read)


@pytest.mark.parametrize("axes", GROWTH.values(), ids=GROWTH)
def test_preserving_readers_undo_writers(axes):
    operator = operator_of(SMALL, larger(**axes))
    checked = {}
    for group, B, A in written_and_read(operator, start(operator)):
        checked[group] = (A.mT @ B).diagonal(dim1=-2, dim2=-1)
        assert_close(A.mT @ B, torch.eye(8).double().expand(*A.shape[:-2], 8, 8))
    assert checked.keys() == {"value", "mlp"}


def test_tied_readers_do_not_undo_writers():
    operator = operator_of(SMALL, larger(heads=3, mlp=13), PAPER)
    tensors = start(operator)
    for group, B, A in written_and_read(operator, tensors):
        assert torch.equal(A, B), group
    on_top = {
        name: torch.cat([torch.eye(8).double().expand(2, 8, 8), t[:, 8:]], 1) if t.ndim == 3 else t
        for name, t in tensors.items()
    }
    for group, B, A in written_and_read(operator, on_top):
        C = on_top[f"width.{group}"][:, 8:]
        assert_close(A.mT @ B, torch.eye(8).double() + C.mT @ C)
        assert C.abs().max() > 0.1


def test_tied_copies_count_a_copied_unit_twice():
    operator = operator_of(SMALL, larger(heads=3, mlp=13), TIED_COPIES)
    twice = {"mlp": [2.0] * 5 + [1.0] * 3, "value": [2.0] * 4 + [1.0] * 4}
    for group, B, A in written_and_read(operator, start(operator)):
        assert (A.mT @ B)[0].diagonal().tolist() == twice.pop(group)
    assert not twice


@pytest.mark.parametrize("axes", [dict(heads=5), dict(head_dim=7), dict(heads=5, head_dim=7)], ids=str)
def test_preserving_maps_no_head_into_a_head_that_is_not_its_copy(axes):
    large = larger(**axes)
    operator = operator_of(SMALL, large)
    tensors = start(operator)
    for group in ("query", "key", "value"):
        B = tensors[f"width.{group}"].unflatten(2, (2, 4)).unflatten(1, (large.heads, large.head_dim))
        used = B.abs().amax((0, 2, 4)) > 0  # (new heads, old heads)
        assert used.tolist() == [[new % 2 == old for old in range(2)] for new in range(large.heads)]
        dim = operator.groups[group]
        assert tensors[f"width.{group}"][0].argmax(1).tolist() == copied(dim, SMALL.axes, large.axes)


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


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_of_the_task_loss_in_the_operator_is_the_finite_difference(preset):
    task, small, large = Task(TaskConfig()), Form(8, 2, heads=2), Form(12, 3, heads=3, mlp=14)
    operator = operator_between(preset, task, small, large)
    tree = {
        name: t.double() + 0.2 * randn(*t.shape, seed=i) for i, (name, t) in enumerate(task.fresh(small, 0).items())
    }
    forward, batch = grown_forward(task, operator, tree, large), {"pixel_values": PIXELS, "labels": LABELS}

    def loss(tensors):
        return task.loss(forward(tensors, batch), batch)

    tensors = {name: t.requires_grad_() for name, t in moved(operator, by=0.05).items()}
    loss(tensors).backward()

    step = 1e-5
    with torch.no_grad():
        along = {name: randn(*t.shape, seed=i) for i, (name, t) in enumerate(tensors.items())}
        ahead, behind = (loss({n: t + s * along[n] for n, t in tensors.items()}) for s in (step, -step))
        slope = sum((tensors[name].grad * along[name]).sum() for name in tensors)
        assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=1e-8)
        for name, tensor in tensors.items():
            for entry in torch.randint(tensor.numel(), (3,), generator=generator()).tolist():
                one = torch.zeros_like(tensor)
                one.view(-1)[entry] = step
                ahead, behind = loss(tensors | {name: tensor + one}), loss(tensors | {name: tensor - one})
                assert_close((ahead - behind) / (2 * step), tensor.grad.view(-1)[entry], rtol=1e-6, atol=1e-8)
    assert all(t.grad.abs().max() > 0 for t in tensors.values())
    assert all(t.grad is None and not t.requires_grad for t in tree.values())
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
        (Form(8, 2, heads=4), Form(12, 2, heads=2), "'head' cannot go from 4 to 2"),
        (Form(8, 2, heads=2), Form(12, 2, heads=6), "'head_dim' cannot go from 4 to 2"),
        (Form(8, 3, heads=2), Form(12, 2, heads=2), "depth would go from 3 to 2"),
        (Form(12, 2, heads=2), Form(8, 2, heads=2), "'embed' would go from 12 to 8"),
        (Form(8, 2, heads=2, mlp=9), Form(8, 2, heads=2, mlp=7), "'mlp' would go from 9 to 7"),
    ],
    ids=["heads", "head size", "depth", "width", "mlp"],
)
def test_preserving_refuses_to_shrink_naming_axis_and_sizes(small, large, text):
    with pytest.raises(ValueError, match=text) as refusal:
        operator_between("preserving", Task(TaskConfig()), small, large)
    assert str(refusal.value).startswith(f"growing {small} into {large}: ")


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
    operator = operator_of(Size(heads=4, head_dim=2, depth=4), Size(heads=2, head_dim=6, depth=2), PAPER)
    assert operator.shapes["width.value"] == (4, 12, 8)
    assert operator.shapes["depth.mlp.fc1"] == (2, 4)


def test_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"preset='exact'.*paper.*preserving"):
        by_name("exact")
