"""Maps of low rank: the algebra of their terms, for every preset and family, against the operator of full maps."""

import dataclasses
import itertools

import pytest
import torch
from torch.testing import assert_close

from fedgrow_algo.dual_ligo import GrownLoss, of_rank
from fedgrow_algo.low_rank import LowRank
from fedgrow_algo.presets import PRESETS
from fedsim.core.tree import Tree, mapped
from fedsim.data.config import digits, pydoc
from fedsim.learning.task import TaskConfig, load_task
from fedsim.models import Form
from tests.support.growing import (
    MAIN,
    accepted,
    exact,
    large,
    multiplied_out,
    operator_between,
    random,
    random_tree,
    small,
    start,
)


pytestmark = pytest.mark.usefixtures("one_thread")

GROWTHS = ("deeper", "all x2", "all")
CASES = [
    (model, growth, preset)
    for model, growth, preset in itertools.product(MAIN, GROWTHS, PRESETS)
    if accepted(model, growth, preset)
]
every_case = pytest.mark.parametrize(("model", "growth", "preset"), CASES, ids=["-".join(case) for case in CASES])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def case_of(model: str, growth: str, preset: str, rank: int) -> tuple[LowRank, Tree, Tree]:
    """The operator, the small model and a U and depth tables that are anywhere."""
    full = operator_between(preset, model, small(model), large(model, growth, preset))
    low = LowRank(full, rank)
    trained = {name: 0.1 * random(*shape, seed=i) for i, (name, shape) in enumerate(low.shapes.items())}
    return low, random_tree(model, small(model)), trained


def full_tensors(low: LowRank, trained: Tree) -> Tree:
    return multiplied_out(low, trained, low.drawn(generator(), torch.float64))


@every_case
def test_it_grows_what_the_products_grow(model: str, growth: str, preset: str) -> None:
    low, tree, trained = case_of(model, growth, preset, 2)
    prepared = low.prepared(low.stack(tree), low.drawn(generator(), torch.float64))
    expected = low.full(full_tensors(low, trained), tree)
    grown = low.grow(trained, prepared)
    assert grown.keys() == expected.keys()
    for name in expected:
        assert_close(grown[name], expected[name], rtol=1e-10, atol=1e-10)
    untouched = low.grow(low.init(generator(), torch.float64), prepared)
    assert any(not torch.allclose(untouched[name], grown[name]) for name in grown)


@every_case
def test_with_the_rank_of_the_small_sizes_it_is_the_operator_of_full_maps(model: str, growth: str, preset: str) -> None:
    low, tree, _ = case_of(model, growth, preset, 10**6)
    assert low.shapes == low.full.shapes
    anywhere = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(low.shapes.items())}
    begun = full_tensors(low, mapped(torch.zeros_like, anywhere))
    U = {name: t - begun[name] if name.startswith("width.") else t for name, t in anywhere.items()}
    grown = low.grow(U, low.prepared(low.stack(tree), low.drawn(generator(), torch.float64)))
    for name, expected in low.full(anywhere, tree).items():
        assert_close(grown[name], expected, rtol=1e-9, atol=1e-9)


@every_case
def test_it_starts_where_the_preset_does(model: str, growth: str, preset: str) -> None:
    low, tree, _ = case_of(model, growth, preset, 2)
    begun = low.grow(
        low.init(generator(), torch.float64), low.prepared(low.stack(tree), low.drawn(generator(), torch.float64))
    )
    from_preset = low.full(start(low.full), tree)
    same = all(torch.allclose(begun[name], from_preset[name], rtol=1e-12, atol=1e-12) for name in begun)
    assert same or (preset == "ligo" and not exact(model, growth, preset)), "of ligo's starts, the first block's is all"


def test_by_hand() -> None:
    """Of a token (3, 0, ...), B0 makes two copies of 3, and U V^T adds 3 v U, where v is the first entry of V."""
    low = LowRank(operator_between("net2net", "vit", small("vit"), large("vit", "all x2", "net2net")), 1)
    assert low.shapes["width.embed"] == (16, 1) and low.full.shapes["width.embed"] == (16, 8)
    tree = {name: torch.zeros_like(tensor) for name, tensor in random_tree("vit", small("vit")).items()}
    name = "vit.embeddings.cls_token"
    tree[name][..., 0] = 3.0
    U = {
        n: torch.zeros_like(t) if n.startswith("width.") else t for n, t in low.init(generator(), torch.float64).items()
    }
    U["width.embed"][0], U["width.embed"][8] = 0.5, -1.0
    v = low.drawn(generator(), torch.float64)["columns"]["embed"][0, 0]
    grown = low.grow(U, low.prepared(low.stack(tree), low.drawn(generator(), torch.float64)))[name].flatten()
    assert_close(grown[[0, 8, 1]], torch.stack([3 * (1 + 0.5 * v), 3 * (1 - v), torch.zeros(()).double()]))


def test_the_mean_of_operators_is_that_of_their_maps() -> None:
    """Growing is linear in the maps of one side: with P = 0, and so is the mean over clients, to rounding."""
    low, tree, one = case_of("vit", "all", "preserving", 3)
    prepared = low.prepared(low.stack(tree), low.drawn(generator(), torch.float64))
    other = {name: 0.1 * random(*t.shape, seed=50 + i) for i, (name, t) in enumerate(one.items())}
    mean = {name: 0.25 * one[name] + 0.75 * other[name] for name in one}
    maps, both = full_tensors(low, mean), [full_tensors(low, each) for each in (one, other)]
    for name in maps:
        assert_close(maps[name], 0.25 * both[0][name] + 0.75 * both[1][name], rtol=1e-12, atol=1e-12)
    for name, expected in low.full(maps, tree).items():
        assert_close(low.grow(mean, prepared)[name], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_in_bf16_the_model_is_what_is_half_and_growth_is_not(family: str) -> None:
    """LayerNorm takes no parameters of two precisions, and fp32 parameters are what training in bf16 has."""
    small_form, large_form = Form(8, 1, heads=2), Form(16, 2, heads=4)  # heads of 4: rotary ones may not grow
    data = digits(limit=8) if family == "vit" else pydoc(limit=8, max_length=12)
    if family == "bert":
        data = dataclasses.replace(data, objective="masked_token")
    task = load_task(TaskConfig(data, family, patch_size=4), None)
    assert task.dataset is not None
    loss = GrownLoss(task, "preserving", small_form, large_form, rank=2)
    operator = of_rank(2, "preserving", task, small_form, large_form)
    prepared = operator.prepared(operator.stack(task.fresh(small_form, 0)), operator.drawn(generator()))
    batch = task.batch(task.dataset.train, torch.arange(8), torch.device("cpu"), generator(), None)
    found = []
    for half in (False, True):
        tensors = {name: tensor.requires_grad_() for name, tensor in operator.init(generator()).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(tensors, {"small": prepared}, batch)
        value.backward()
        assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors.values())
        found.append(float(value.detach()))
    assert found[0] != found[1] == pytest.approx(found[0], rel=2e-2)
