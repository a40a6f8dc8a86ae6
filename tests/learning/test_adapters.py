"""Low-rank adapters: which matrices have them, what they compute beside and within a model, and how they are cut."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from baselines.flora import HEAD, FLoRA
from baselines.lora import fedit, ffa_lora, hetlora
from fedsim.core.tree import State, Tree, flat, mapped, sha256
from fedsim.learning.adapters import A, B, adapted, applied, check_rank, fresh, logits_beside, norm, products, resized
from fedsim.learning.task import Batch, Task
from fedsim.models import Form
from tests.support.family_rows import ROWS, batch_of, random_tree, real
from tests.support.small_federation import Federation, assert_same_bits


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

SCALE = 1.5


@functools.cache
def model_of(row: str) -> tuple[Task, Form, Tree, dict[str, int], Batch]:
    """A task, a form, a model in double precision, its adapted matrices, and a batch."""
    task, form = ROWS[row].task, ROWS[row].small
    return task, form, random_tree(task, form), adapted(task, form), batch_of(task)


def moved(base: Tree, writes: Mapping[str, int], rank: int = 3) -> State:
    """Adapters that change something, in double precision."""
    generator = torch.Generator().manual_seed(5)
    state = fresh(base, writes, rank, generator)
    return mapped(lambda t: 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64), state)


def _in_block(task: Task, form: Form, name: str) -> nn.Module:
    """The module of this name in the last block: some lack what others have."""
    last = next(n.removesuffix(f".{s.role}") for n, s in task.specs(form).items() if s.layer == form.depth - 1)
    return task.skeleton(form).get_submodule(f"{last}.{name}")


@pytest.mark.parametrize("row", ROWS)
def test_which_matrices_have_adapters(row: str) -> None:
    task, form, base, writes, _ = model_of(row)
    modules = {spec.module.partition("/")[0] for spec in task.specs(form).values() if spec.layer is not None}
    projections = {name for name in modules if isinstance(_in_block(task, form, name), nn.Linear | Conv1D)}
    assert len(writes) == form.depth * len(projections)  # a fused matrix has one
    specs = task.specs(form)
    assert {specs[name].layer for name in writes} == {*range(form.depth)}
    matrices = {n for n, s in specs.items() if s.layer is not None and base[n].ndim == 2}
    assert {*writes} == matrices, "every matrix of a block, and no norm, bias, embedding or head"
    assert {*writes.values()} == ({1} if row.startswith("gpt2") else {0})


@pytest.mark.parametrize("row", ROWS)
def test_a_fresh_adapter_changes_nothing(row: str) -> None:
    task, form, base, writes, batch = model_of(row)
    tree = mapped(Tensor.double, fresh(base, writes, 3, torch.Generator().manual_seed(0)))
    assert_same_bits(applied(base, tree, writes, SCALE), base)
    assert torch.equal(logits_beside(task, form, base, tree, SCALE, batch), task.forward(form, base, batch))
    for name, position in writes.items():
        out, in_ = base[name].shape[position], base[name].shape[1 - position]
        assert tree[A][name].shape == (3, in_) and tree[B][name].shape == (out, 3)
        assert not tree[B][name].any()
        assert 0.7 / math.sqrt(in_) < tree[A][name].abs().max() <= 1 / math.sqrt(in_)


@pytest.mark.parametrize("row", ROWS)
def test_adapters_beside_their_matrices_are_adapters_merged_into_them(row: str) -> None:
    task, form, base, writes, batch = model_of(row)
    single = ROWS[row].rotary  # then some of it computes in single precision
    tree = moved(base, writes)
    gradients, logits = [], []
    for beside in (True, False):
        leaves = mapped(lambda t: t.clone().requires_grad_(), tree)
        if beside:
            said = logits_beside(task, form, base, leaves, SCALE, batch)
        else:
            said = task.forward(form, applied(base, leaves, writes, SCALE), batch)
        logits.append(real(said, batch))
        logits[-1].tanh().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in flat(leaves).items()})
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4 if single else 1e-10)
    assert (logits[0] - real(task.forward(form, base, batch), batch)).abs().max() > 0.01
    for name, found in gradients[0].items():
        expected = gradients[1][name]
        assert found is not None and expected is not None
        scale = float(expected.abs().max()) + 1e-3
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-3 if single else 1e-8)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in base.values())
    skeleton = task.skeleton(form)
    assert all(parameter.grad is None for parameter in skeleton.parameters())
    assert not any(module._forward_hooks for module in skeleton.modules())


def test_hooks_are_gone_after_an_error() -> None:
    task, form, base, writes, batch = model_of("vit")
    broken = mapped(lambda tensor: tensor[..., :1], moved(base, writes))
    with pytest.raises(RuntimeError):
        logits_beside(task, form, base, broken, SCALE, batch)
    assert not any(module._forward_hooks for module in task.skeleton(form).modules())


def test_a_fused_transposed_matrix_by_hand() -> None:
    """GPT-2 computes x W of queries, keys and values: W' = W + s (B A)^T, of which B's last rows are the values'."""
    _, form, base, writes, _ = model_of("gpt2-lm")
    name, width = "transformer.h.1.attn.c_attn.weight", form.width
    tree = moved(base, writes)
    grown = applied(base, tree, writes, 0.5)
    a, b, x = tree[A][name], tree[B][name], torch.arange(float(width), dtype=torch.float64)
    assert a.shape == (3, width) and b.shape == (3 * width, 3)
    torch.testing.assert_close(x @ grown[name], x @ base[name] + 0.5 * b @ (a @ x))
    values = grown[name][:, 2 * width :] - base[name][:, 2 * width :]
    torch.testing.assert_close(values, 0.5 * (b[2 * width :] @ a).T)
    last = torch.cat([torch.zeros(2 * width, 3, dtype=torch.float64), b[2 * width :]])
    only = {A: tree[A], B: tree[B] | {name: last}}
    after = applied(base, only, writes, 0.5)[name]
    assert torch.equal(after[:, : 2 * width], base[name][:, : 2 * width]) and not torch.equal(after, base[name])


def test_an_adapter_on_paper() -> None:
    """B A = [[1], [2]] [[3, 4, 5]] = [[3, 4, 5], [6, 8, 10]], of norm sqrt(250); transposed where columns write."""
    tree = {A: {"w": torch.tensor([[3.0, 4.0, 5.0]])}, B: {"w": torch.tensor([[1.0], [2.0]])}}
    change = torch.tensor([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]])
    assert torch.equal(products(tree, {"w": 0})["w"], change)
    assert torch.equal(products(tree, {"w": 1})["w"], change.T)
    assert norm(tree, {"w": 0}) == norm(tree, {"w": 1}) == math.sqrt(250)
    both = {part: {"w": tree[part]["w"], "v": tree[part]["w"]} for part in (A, B)}
    assert norm(both, {"w": 0, "v": 0}) == pytest.approx(math.sqrt(500))
    assert torch.equal(applied({"w": torch.ones(2, 3), "n": torch.ones(3)}, tree, {"w": 0}, 0.5)["w"], 1 + change / 2)


def test_factors_are_cut_to_their_first_ranks_and_padded_with_zeros() -> None:
    tree = {
        A: {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        B: {"w": torch.tensor([[5.0, 6.0]])},
        HEAD: {"x": torch.ones(3)},
    }
    cut, padded = resized(tree, 1), resized(tree, 3)
    assert cut[A]["w"].tolist() == [[1, 2]] and cut[B]["w"].tolist() == [[5]]
    assert padded[A]["w"].tolist() == [[1, 2], [3, 4], [0, 0]] and padded[B]["w"].tolist() == [[5, 6, 0]]
    assert torch.equal(padded[B]["w"] @ padded[A]["w"], tree[B]["w"] @ tree[A]["w"])
    assert_same_bits(resized(padded, 2), tree)
    assert cut[HEAD] is padded[HEAD] is tree[HEAD]


def test_a_draw_is_the_seeds_and_not_the_orders() -> None:
    _, _, base, writes, _ = model_of("bert-text")
    backwards = dict(reversed(writes.items()))
    trees = [fresh(base, w, 2, torch.Generator().manual_seed(s)) for w, s in ((writes, 0), (backwards, 0), (writes, 1))]
    assert_same_bits(trees[0], trees[1])
    assert sha256(trees[0]) != sha256(trees[2])


def test_a_rank_that_a_matrix_does_not_have_is_refused() -> None:
    task, form = ROWS["llama-lm"].task, ROWS["llama-lm"].small  # 16 wide; keys and values: two heads of 4
    check_rank(task, form, 8)
    with pytest.raises(ValueError, match=r"algorithm\.rank=9: must be at most 8, the rank of .*k_proj.* target 16x2"):
        check_rank(task, form, 9)
    for make in (fedit, ffa_lora, hetlora, FLoRA):
        with pytest.raises(ValueError, match=r"algorithm\.rank=17: must be at most 16"):
            Federation(make(rank=17))


def test_a_step_forms_no_gradient_of_a_matrix_of_the_model() -> None:
    """Training all of a model takes three passes' products, training adapters two and a little."""
    task, form = ROWS["bert-text"].task, Form(64, 3, heads=4)
    base, writes, batch = task.fresh(form, 0), adapted(task, form), task.example(4)
    tree = fresh(base, writes, 2, torch.Generator())

    def flops(leaves: State, logits: Any) -> int:
        leaves = mapped(lambda t: t.clone().requires_grad_(), leaves)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits(leaves).sum().backward()
        return counter.get_total_flops()

    whole = flops(base, lambda leaves: task.forward(form, leaves, batch))
    beside = flops(tree, lambda leaves: logits_beside(task, form, base, leaves, 1.0, batch))
    merged = flops(tree, lambda leaves: task.forward(form, applied(base, leaves, writes, 1.0), batch))
    assert 0.6 * whole < beside < 0.8 * whole < 0.95 * whole < merged
