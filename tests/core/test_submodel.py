"""Sub-models: what is taken out of a model, and the mean that goes back into it."""

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.submodel import Cut, ParamSpec, ScatterMean, join_fused, split_fused, split_specs
from fedsim.core.tree import Tree, numel, sha256
from fedsim.learning.rates import cut_at, cut_axes, kept_of, rate_of, sub_form, window
from fedsim.learning.task import Task
from fedsim.models import Form, get_family
from tests.support.cutting import Kept, assert_aligned, coordinates, kept_by, shapes_of
from tests.support.family_rows import ROWS, TIED, batch_of, model_inputs, random_tree


RATES = (1.0, 0.7, 1 / 2, 1 / 3, 1 / 4, 1 / 8, 1 / 16)
BUILDABLE = (1 / 2, 1 / 4)  # in every family, of its row's largest form


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> None:
    """Models this small only lose time to a second thread."""


AT_RATES = [
    pytest.param(row.task, form, rate, id=f"{name}-{form}-{rate:.3g}")
    for name, row in ROWS.items()
    for form in (row.larger, row.wider)
    for rate in RATES
]


def exists(task: Task, form: Form, rate: float) -> bool:
    """Whether the family has a model that is `rate` as wide, by arithmetic."""
    width, heads = math.ceil(rate * form.width - 1e-9), form.heads
    if "rotary" not in {axis for spec in task.specs(form).values() for dim in spec.parsed_parts for axis in dim.axes}:
        return task.config.family == "vit" or heads * math.ceil(rate * form.head_size - 1e-9) == width
    queries = math.ceil(rate * form.axes["kv_head"] - 1e-9) * form.axes["group"]
    return width % queries == 0 if task.config.family == "llama" else queries * form.head_size == width


# what is taken out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, target, rate", AT_RATES)
def test_a_sub_model_has_the_shapes_of_a_model_built_at_its_rate(task: Task, target: Form, rate: float) -> None:
    """Of every family, for sizes that the rate does not divide too: what slices and what builds round alike."""
    if not exists(task, target, rate):
        with pytest.raises(ValueError, match=rf"^the sub-model at rate {rate:g} of the target {target}: form\."):
            sub_form(task, target, rate)
        return
    form, cut = sub_form(task, target, rate), cut_at(task, target, rate)
    sliced = cut.extract({name: torch.zeros(shape) for name, shape in shapes_of(task, target).items()})
    assert {name: tensor.shape for name, tensor in sliced.items()} == shapes_of(task, form)
    used = {axis for spec in task.specs(target).values() for dim in spec.parsed_parts for axis in dim.axes}
    assert {axis: cut.small_axes[axis] for axis in used} == {axis: form.axes[axis] for axis in used}
    assert form.width == math.ceil(rate * target.width - 1e-9)
    assert form.inner == math.ceil(rate * target.inner - 1e-9)


def test_every_family_has_a_sub_model_and_some_have_none_at_some_rates() -> None:
    """Else the test above says little."""
    found = {(name, exists(row.task, row.larger, rate)) for name, row in ROWS.items() for rate in RATES}
    assert {name for name, there in found if there} == {*ROWS}
    assert {name for name, there in found if not there} >= {*ROWS} - {"vit"}
    assert all(exists(row.task, row.larger, rate) for row in ROWS.values() for rate in BUILDABLE)


@pytest.mark.parametrize("size, rate, kept", [(100, 0.55, 55), (10, 0.3, 3), (10, 1 / 3, 4), (7, 0.5, 4), (3, 1e-3, 1)])
def test_a_rate_keeps_the_ceiling(size: int, rate: float, kept: int) -> None:
    """`0.55 * 100` is 55.00000000000001 in floating point."""
    assert kept_of(size, rate) == kept


@pytest.mark.parametrize("rate", BUILDABLE)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("first", [0, 1, 5, 47])
def test_what_meets_in_a_sub_model_is_one_coordinate_of_the_model(row, rate: float, first: int) -> None:
    task, target = row.task, row.larger
    moved = {axis: first % target.axes[axis] for axis in cut_axes(task.specs(target))}
    small, cut = sub_form(task, target, rate), cut_at(task, target, rate, moved)
    kept = kept_by(task, target, small, cut.extract)
    assert_aligned(task, target, small, kept)
    stream = {tuple(c) for (name, d), c in kept.items() if split_specs(cut.specs)[name].parsed[d].axes == ("embed",)}
    size = small.width
    assert stream == {tuple((first + place) % target.width for place in range(size))}


def flattened(task: Task, target: Form, small: Form, kept: Kept, first: int) -> Kept:
    """The same sizes, but dimensions that are products of axes are cut as if they were one axis."""
    specs, careless = split_specs(task.specs(target)), dict(kept)
    for name, dimension in kept:
        dim = specs[name].parsed[dimension]
        if len(dim.axes) > 1:
            whole, part = dim.size(target.axes), dim.size(small.axes)
            assert whole and part
            careless[name, dimension] = window(whole, part, first).tolist()
    return careless


def of_their_own(task: Task, target: Form, small: Form, kept: Kept, axes: tuple[str, ...]) -> Kept:
    """The same sizes, but dimensions of one axis draw a list for each parameter."""
    specs, careless, draw = split_specs(task.specs(target)), dict(kept), torch.Generator().manual_seed(0)
    for name, dimension in kept:
        if specs[name].parsed[dimension].axes == axes:
            drawn = torch.randperm(math.prod(target.axes[axis] for axis in axes), generator=draw)
            careless[name, dimension] = drawn[: len(kept[name, dimension])].sort().values.tolist()
    return careless


def moved_on(task: Task, target: Form, kept: Kept, group: str, by: int) -> Kept:
    """The same, but one group of dimensions keeps coordinates further on."""
    specs = split_specs(task.specs(target))
    return {
        (name, d): [c + by for c in v] if specs[name].parsed[d].group == group else v for (name, d), v in kept.items()
    }


@pytest.mark.parametrize("row", ["vit", "gpt2-lm", "bert-mlm", "llama-lm"])
def test_careless_extractions_are_told_from_aligned_ones(row: str) -> None:
    """What published code does: cut the axis of all heads as one, or draw a list for each tensor."""
    task, target = ROWS[row].task, ROWS[row].larger
    small = sub_form(task, target, 1 / 2)
    kept = kept_by(task, target, small, cut_at(task, target, 1 / 2).extract)
    assert_aligned(task, target, small, kept)

    def refused(careless: Kept, why: str) -> None:
        with pytest.raises(AssertionError, match=why):
            assert_aligned(task, target, small, careless)

    refused(flattened(task, target, small, kept, 1), "a local head is made of several")
    for axes in (("embed",), ("mlp",)):
        refused(of_their_own(task, target, small, kept, axes), "one axis, several lists")
    if row == "llama-lm":  # whose heads stay whole
        head, group = target.axes["rotary"], target.axes["group"]
        refused(moved_on(task, target, kept, "query", head), "queries read keys that are not theirs")
        refused(moved_on(task, target, kept, "query", head * group), "queries meet keys of other coordinates")
        refused(moved_on(task, target, kept, "key", 1), "a local head is made of several")
    else:
        refused(flattened(task, target, small, kept, 0), "two local heads are of one")
        refused(moved_on(task, target, kept, "query", 1), "queries meet keys of other coordinates")
        refused(moved_on(task, target, kept, "value", target.axes["head_dim"]), "weighs values of another")
    if row == "bert-mlm":
        refused(moved_on(task, target, kept, "transform", 1), "a tied head is misread")


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_at_rate_1_the_logits_are_those_of_the_model_bit_by_bit(row) -> None:
    task, target = row.task, row.small
    tree, batch = random_tree(task, target), batch_of(row.task)
    form = sub_form(task, target, 1.0)
    taken = cut_at(task, target, 1.0).extract(tree)
    assert taken.keys() == tree.keys()
    assert sha256(taken) == sha256(tree)
    whole, part = task.forward(target, tree, batch), task.forward(form, taken, batch)
    assert torch.equal(whole, part)
    training = task.module(form, taken).train()(**model_inputs(batch)).logits
    assert torch.equal(training, whole), "in training mode too"


def test_lists_of_one_block_and_of_one_group_come_before_those_of_the_axis() -> None:
    specs = {
        "0.w": ParamSpec(("mlp", "<embed"), 0, "w"),
        "1.w": ParamSpec(("mlp", "<embed"), 1, "w"),
        "pool": ParamSpec(("pooled:embed", "<embed"), None, "pool"),
        "head": ParamSpec(("=class", "<pooled:embed"), None, "head"),
    }
    lists = {"embed": [2, 0], "mlp.0": [1], "mlp.1": [2], "pooled:embed": [1, 0]}
    cut = Cut(specs, {"embed": 3, "mlp": 3}, {key: torch.tensor(kept) for key, kept in lists.items()})
    numbers = torch.arange(9.0).reshape(3, 3)
    taken = cut.extract({"0.w": numbers, "1.w": numbers, "pool": numbers, "head": numbers[:2]})
    assert taken["0.w"].tolist() == [[5.0, 3.0]]
    assert taken["1.w"].tolist() == [[8.0, 6.0]]
    assert taken["pool"].tolist() == [[5.0, 3.0], [2.0, 0.0]]
    assert taken["head"].tolist() == [[1.0, 0.0], [4.0, 3.0]]
    assert cut.small_axes == {"embed": 2, "mlp": 1}


def test_heads_are_cut_inside_and_fused_parts_apart() -> None:
    """Two heads of three coordinates, queries beside values; the second and third coordinate of each head are kept."""
    specs = {"qv": ParamSpec(("<embed", "query:head head_dim + value:head head_dim"), 0, "qv")}
    cut = Cut(specs, {"embed": 1, "head": 2, "head_dim": 3}, {"head_dim": torch.tensor([1, 2])})
    assert cut.extract({"qv": torch.arange(12.0)[None]})["qv"].tolist() == [[1.0, 2, 4, 5, 7, 8, 10, 11]]


def test_windows_are_rings() -> None:
    assert window(5, 3, 0).tolist() == [0, 1, 2]
    assert window(5, 3, 4).tolist() == [4, 0, 1]
    assert window(5, 5, 2).tolist() == [2, 3, 4, 0, 1]


def test_gradients_reach_what_is_kept_and_nothing_else() -> None:
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    tree = {name: tensor.requires_grad_() for name, tensor in random_tree(task, target).items()}
    cut = cut_at(task, target, 1 / 2, {"embed": 40})
    sum(tensor.sum() for tensor in cut.extract(tree).values()).backward()  # type: ignore[union-attr]
    covered = covered_by(cut, tree)
    for name, tensor in tree.items():
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, covered[name].double()), name


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_no_parameter_escapes_and_tied_ones_are_there_once(row) -> None:
    task, target = row.task, row.small
    module = task.module(target, task.fresh(target, 0))
    cut = cut_at(task, target, 1 / 2)
    assert {*cut.extract(task.fresh(target, 0))} == {name for name, _ in module.named_parameters()} == {*cut.specs}
    assert not [
        name for name, buffer in module.named_buffers() if buffer.is_floating_point() and "inv_freq" not in name
    ]
    tied = [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in cut.specs]
    heads = {tied.head for name, tied in TIED.items() if row is ROWS[name] and tied.head}
    assert bool(tied) == bool(heads) and heads <= {*tied}
    loaded = task.module(sub_form(task, target, 1 / 2), cut.extract(task.fresh(target, 1)))
    twins = dict(loaded.named_parameters(remove_duplicate=False))
    assert len({id(parameter) for parameter in twins.values()}) == len(cut.specs), "still tied"


# rates and forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_participant_has_the_largest_sub_model_that_is_no_larger_than_its_own_model(row) -> None:
    task, target, rates = row.task, row.larger, (1.0, 1 / 2, 1 / 4)
    for rate in rates:
        assert rate_of(task, target, sub_form(task, target, rate), rates) == rate
    narrower = dataclasses.replace(sub_form(task, target, 1 / 2), mlp=target.inner // 2 - 1)
    assert rate_of(task, target, narrower, rates) == 1 / 4, "one unit short of the sub-model at 1/2"
    assert rate_of(task, target, dataclasses.replace(target, depth=target.depth + 1), rates) == 1.0
    assert rate_of(task, target, sub_form(task, target, 1 / 4), rates[:2]) == 1 / 2, "the smallest there is"


def test_a_sub_model_normalises_with_the_epsilon_of_the_model() -> None:
    """Families that choose one for each width would choose another."""
    task, target = ROWS["llama-lm"].task, ROWS["llama-lm"].larger
    small = sub_form(task, target, 1 / 2)
    assert small.norm_eps == sub_form(task, target, 1.0).norm_eps
    plain = dataclasses.replace(small, norm_eps=None)
    llama = get_family("llama")
    assert llama.form(llama.config(plain, task.inputs)).norm_eps == 2 * (small.norm_eps or 0)


# what goes back -------------------------------------------------------------------------------------------------------


def covered_by(cut: Cut, tree: Mapping[str, Tensor]) -> Tree:
    """Which coordinates a sub-model has."""
    mean = ScatterMean(tree, cut.specs, cut.axes)
    mean.add(cut, cut.extract(tree), 1.0)
    return mean.covered()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_is_taken_out_goes_back_where_it_was(row, dtype: torch.dtype) -> None:
    task, target = row.task, row.larger
    whole = {name: tensor.to(dtype) for name, tensor in random_tree(task, target).items()}
    first = {axis: 3 % target.axes[axis] for axis in cut_axes(task.specs(target))}
    cut = cut_at(task, target, 1 / 2, first)
    same = ScatterMean(whole, cut.specs, cut.axes)
    same.add(cut, cut.extract(whole), 4.0)
    assert sha256(same.mean()) == sha256(whole)

    learned = {name: tensor + 1 for name, tensor in cut.extract(whole).items()}
    mean = ScatterMean(whole, cut.specs, cut.axes)
    mean.add(cut, learned, 4.0)
    after, covered = mean.mean(), mean.covered()
    assert sha256(cut.extract(after)) == sha256(learned)
    assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(whole, dtype)
    for name in whole:
        assert torch.equal(after[name][~covered[name]], whole[name][~covered[name]]), name
    assert sum(int(mask.sum()) for mask in covered.values()) == numel(learned)


GOLDEN = {"w": ParamSpec(("embed", "<mlp"), None, "w")}
THETA = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
TWO = {"embed": 2, "mlp": 2}
WHOLE = Cut(GOLDEN, TWO, {})
FIRST = Cut(GOLDEN, TWO, {"embed": torch.tensor([0]), "mlp": torch.tensor([0])})
LAST_ROW = Cut(GOLDEN, TWO, {"embed": torch.tensor([1])})
TWOS, FOUR, EIGHTS = torch.full((2, 2), 2.0), torch.tensor([[4.0]]), torch.tensor([[8.0, 8.0]])


@pytest.mark.parametrize(
    "updates, expected, covered",
    [
        ([(WHOLE, TWOS, 1), (FIRST, FOUR, 1)], [[3.0, 2.0], [2.0, 2.0]], [[1, 1], [1, 1]]),
        ([(WHOLE, TWOS, 1), (FIRST, FOUR, 3)], [[3.5, 2.0], [2.0, 2.0]], [[1, 1], [1, 1]]),
        ([(FIRST, FOUR, 1)], [[4.0, 2.0], [3.0, 4.0]], [[1, 0], [0, 0]]),
        ([(FIRST, FOUR, 1), (LAST_ROW, EIGHTS, 5)], [[4.0, 2.0], [8.0, 8.0]], [[1, 0], [1, 1]]),
        ([(WHOLE, TWOS, 1), (FIRST, FOUR, 1), (LAST_ROW, EIGHTS, 2)], [[3.0, 2.0], [6.0, 6.0]], [[1, 1], [1, 1]]),
        ([(FIRST, FOUR, 0)], [[1.0, 2.0], [3.0, 4.0]], [[0, 0], [0, 0]]),
        ([], [[1.0, 2.0], [3.0, 4.0]], [[0, 0], [0, 0]]),
    ],
    ids=["alike", "by examples", "the small one alone", "apart", "three", "of no weight", "nobody"],
)
def test_a_mean_that_a_person_can_check(updates: list, expected: list, covered: list) -> None:
    mean = ScatterMean(THETA, GOLDEN, TWO)
    for cut, tensor, weight in updates:
        mean.add(cut, {"w": tensor}, weight)
    assert mean.mean()["w"].tolist() == expected
    assert mean.covered()["w"].int().tolist() == covered
    assert THETA["w"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_rows_that_nobody_vouches_for_stay() -> None:
    """Three classes, two clients: class 0 both have, class 1 one has, class 2 nobody; so for weights and for biases."""
    specs = {"w": ParamSpec(("=class", "<embed"), None, "w"), "b": ParamSpec(("=class",), None, "b")}
    whole = {"w": torch.zeros(3, 2), "b": torch.full((3,), 9.0)}
    cut = Cut(specs, {"embed": 2}, {})
    mean = ScatterMean(whole, specs, {"embed": 2})
    ones, threes = ({"w": torch.full((3, 2), value), "b": torch.full((3,), value)} for value in (1.0, 3.0))
    mean.add(cut, ones, 1, {"class": torch.tensor([True, True, False]), "token": torch.zeros(5, dtype=torch.bool)})
    mean.add(cut, threes, 1, {"class": torch.tensor([True, False, False])})
    assert mean.mean()["w"].tolist() == [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]
    assert mean.mean()["b"].tolist() == [2.0, 1.0, 9.0]
    assert mean.covered()["b"].tolist() == [True, True, False]


SPECS = {
    "in": ParamSpec(("=token", "embed"), None, "in"),
    "qv": ParamSpec(("<embed", "query:head head_dim + value:head head_dim"), 0, "qv"),
    "out": ParamSpec(("embed", "<value:head head_dim"), 0, "out"),
    "norm": ParamSpec(("*embed",), None, "norm"),
    "fixed": ParamSpec(("",), None, "fixed"),
}
AXES = {"embed": 3, "head": 2, "head_dim": 2}
SHAPES = {"in": (2, 3), "qv": (3, 8), "out": (3, 4), "norm": (3,), "fixed": (2,)}


@st.composite
def sub_models(draw) -> list[tuple[Cut, Tree, int]]:
    """Up to four clients: any lists in any order, weights 1 to 5, any numbers."""
    clients = []
    for seed in draw(st.lists(st.integers(0, 10**6), max_size=4)):
        lists = {
            axis: torch.tensor(draw(st.permutations(range(AXES[axis])))[: draw(st.integers(1, AXES[axis]))])
            for axis in ("embed", "head_dim")
        }
        cut = Cut(SPECS, AXES, lists)
        generator = torch.Generator().manual_seed(seed)
        numbers = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
        clients.append((cut, cut.extract(numbers), draw(st.integers(1, 5))))
    return clients


START = {name: torch.arange(math.prod(shape)).reshape(shape) / 8 - 2.0 for name, shape in SHAPES.items()}
START = {name: tensor.double() for name, tensor in START.items()}


def mean_of(clients: list[tuple[Cut, Tree, int]], weight=lambda n: float(n), start: Tree = START) -> Tree:
    mean = ScatterMean(start, SPECS, AXES)
    for cut, tree, n in clients:
        mean.add(cut, tree, weight(n))
    return mean.mean()


def by_hand(clients: list[tuple[Cut, Tree, int]]) -> Tree:
    """Coordinate by coordinate, in plain Python: collect what each client says of it, then take the weighted mean."""
    heard: dict[tuple, list[tuple[float, int]]] = {}
    parts = split_specs(SPECS)
    for cut, tree, n in clients:
        for name, tensor in split_fused(tree, SPECS, cut.small_axes).items():
            for place in torch.cartesian_prod(*map(torch.arange, tensor.shape)).reshape(-1, tensor.ndim).tolist():
                whole = []
                for dim, local in zip(parts[name].parsed, place, strict=True):
                    if dim.axes == ("embed",):
                        local = int(cut.lists["embed"][local])
                    elif dim.axes:
                        head, inside = divmod(local, len(cut.lists["head_dim"]))
                        local = 2 * head + int(cut.lists["head_dim"][inside])
                    whole.append(local)
                heard.setdefault((name, *whole), []).append((float(tensor[tuple(place)]), n))
    after = {name: tensor.clone() for name, tensor in split_fused(START, SPECS, AXES).items()}
    for (name, *place), said in heard.items():
        after[name][tuple(place)] = sum(n * value for value, n in said) / sum(n for _, n in said)
    return join_fused(after, SPECS)


def close(left: Tree, right: Tree, tolerance: float = 1e-12) -> bool:
    return all(torch.allclose(left[name], right[name], rtol=tolerance, atol=tolerance) for name in SHAPES)


@settings(max_examples=40, deadline=None)
@given(sub_models())
def test_two_sums_are_the_mean_of_each_coordinate(clients: list) -> None:
    assert close(mean_of(clients), by_hand(clients))


@settings(max_examples=40, deadline=None)
@given(sub_models(), st.integers(2, 9))
def test_what_a_weighted_mean_must_obey(clients: list, factor: int) -> None:
    mean = mean_of(clients)
    assert close(mean_of(clients[::-1]), mean), "the order of clients"
    assert close(mean_of(clients, lambda n: factor * n), mean), "the scale of weights"
    split = [(cut, tree, n) for cut, tree, n in clients for _ in range(2)]
    assert close(mean_of(split, lambda n: n / 2), mean), "one client as two"
    moved = [(cut, {name: factor * t + 1 for name, t in tree.items()}, n) for cut, tree, n in clients]
    start = {name: factor * tensor + 1 for name, tensor in START.items()}
    assert close(mean_of(moved, start=start), {name: factor * t + 1 for name, t in mean.items()}), "affine maps"
    for name in SHAPES:
        reached = [START[name].expand_as(mean[name])]
        for cut, tree, _ in clients:
            alone = mean_of([(cut, tree, 1)])
            reached.append(alone[name])
        low, high = torch.stack(reached).amin(0), torch.stack(reached).amax(0)
        assert ((low - 1e-12 <= mean[name]) & (mean[name] <= high + 1e-12)).all(), "between the least and the most"


@settings(max_examples=25, deadline=None)
@given(sub_models())
def test_equal_values_in_give_them_out_bit_by_bit(clients: list) -> None:
    whole = {name: tensor.float() for name, tensor in START.items()}
    mean = ScatterMean(whole, SPECS, AXES)
    for cut, _, n in clients:
        mean.add(cut, cut.extract(whole), n)
    assert sha256(mean.mean()) == sha256(whole)


def test_coordinates_are_what_they_are_called() -> None:
    """The instrument of these tests: a fused weight of GPT-2 counts each part from 0."""
    task, form = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].small
    fused = coordinates(task, form, 1)["transformer.h.0.attn.c_attn.weight"]
    assert fused[5].tolist() == [*range(16)] * 3
    assert coordinates(task, form, 0)["transformer.h.0.attn.c_attn.weight"][:, 7].tolist() == [*range(16)]
