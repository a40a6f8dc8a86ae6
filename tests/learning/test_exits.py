"""Where a model may be left: its exits, what comes after its blocks, and what is computed on the way."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsim.core.tree import Tree
from fedsim.learning.exits import ends_at, exit_logits, shallower, tail, up_to
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support.family_rows import NEXT_TOKEN, ROWS, Row, batch_of, random_tree, real


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

# A row more: what a block does depends on its number.
EXITED = ROWS | {
    "gpt2-by-number": Row(TaskConfig(NEXT_TOKEN, "gpt2", settings=(("scale_attn_by_inverse_layer_idx", True),)))
}
DEPTHS = (1, 3, 5)  # of the rows' `deeper`; between them lie one block, two, and two


@pytest.mark.parametrize(
    "depth, exits, expected",
    [
        (8, 4, (2, 4, 6, 8)),
        (4, 4, (1, 2, 3, 4)),
        (3, 4, (1, 2, 3)),
        (1, 4, (1,)),
        (6, 1, (6,)),
        (12, 5, (2, 5, 7, 10, 12)),
    ],
)
def test_where_exits_lie(depth: int, exits: int, expected: tuple[int, ...]) -> None:
    assert ends_at(depth, exits) == expected


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_last_exit_is_the_end(depth: int, exits: int) -> None:
    ends = ends_at(depth, exits)
    assert list(ends) == sorted({*ends}) and ends[0] >= 1 and ends[-1] == depth
    assert len(ends) <= min(depth, exits)
    if depth >= exits:
        parts = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
        assert len(ends) == exits and max(parts) - min(parts) <= 1


@pytest.mark.parametrize("name", EXITED)
def test_what_comes_after_the_blocks_is_what_no_block_depends_on(name: str) -> None:
    """Every other parameter has a gradient in what the last block says, and all have one in the logits."""
    task, form = EXITED[name].task, EXITED[name].deeper
    leaves = {n: t.requires_grad_() for n, t in random_tree(task, form).items()}
    end, module = tail(task, form), task.skeleton(form)
    assert end and len(end) == len({*end})

    said: list[Any] = []
    last = next(n.removesuffix(f".{s.role}") for n, s in task.specs(form).items() if s.layer == form.depth - 1)
    hook = module.get_submodule(last).register_forward_hook(
        lambda block, arguments, returned: said.append(returned[0] if isinstance(returned, tuple) else returned)
    )
    try:
        batch = batch_of(task)
        logits = task.forward(form, leaves, batch)
    finally:
        hook.remove()
    for result, without in ((said[0].tanh(), {*end}), (real(logits, batch).tanh(), set())):
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=result.dtype)
        found = torch.autograd.grad(
            (weights * result).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        assert {n for n, gradient in zip(leaves, found, strict=True) if gradient is None} == without


def test_a_family_that_names_nothing_after_its_blocks_has_no_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    task, form = ROWS["vit"].task, ROWS["vit"].small
    silent = {name: dataclasses.replace(spec, after=False) for name, spec in task.specs(form).items()}
    monkeypatch.setattr(Task, "specs", lambda self, form: silent)
    with pytest.raises(ValueError, match=r"task\.family='vit': must be a family that says which parameters"):
        tail(task, form)


@pytest.mark.parametrize("name", EXITED)
def test_what_comes_after_the_blocks_and_what_before(name: str) -> None:
    task, form = EXITED[name].task, EXITED[name].deeper
    end = tail(task, form)
    for depth in range(1, form.depth + 1):
        assert {*tail(task, shallower(form, depth))} == {*end}
        assert up_to(task, form, depth) == {*task.specs(shallower(form, depth))} - {*end}


@functools.cache
def exited(name: str) -> tuple[Task, Form, Tree, list[Tree], Tree]:
    """A task, its deep form, the model's body in double precision, a tail for each exit, and a batch."""
    task, form = EXITED[name].task, EXITED[name].deeper
    model, end = random_tree(task, form), tail(task, form)
    generator = torch.Generator().manual_seed(7)
    tails = [
        {n: model[n] + 0.3 * torch.randn(model[n].shape, generator=generator, dtype=torch.float64) for n in end}
        for _ in DEPTHS
    ]
    return task, form, {n: t for n, t in model.items() if n not in end}, tails, batch_of(task)


def one_by_one(task: Task, form: Form, body: Mapping[str, Tensor], tails: list[Tree], batch: Tree) -> list[Tensor]:
    """Logits of the shallower models, each built and run on its own."""
    logits = []
    for depth, end in zip(DEPTHS, tails, strict=True):
        kept = up_to(task, form, depth)
        tree = {n: t for n, t in body.items() if n in kept} | end
        logits.append(task.forward(shallower(form, depth), tree, batch))
    return logits


@pytest.mark.parametrize("name", EXITED)
def test_logits_at_exits_are_those_of_shallower_models(name: str) -> None:
    task, form, body, tails, batch = exited(name)
    found, expected = exit_logits(task, form, body, tails, DEPTHS, batch), one_by_one(task, form, body, tails, batch)
    for logits, others in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, others, rtol=0, atol=1e-12)
    assert (found[0] - found[1]).abs().max() > 1e-3 < (found[1] - found[2]).abs().max()
    swapped = exit_logits(task, form, body, [tails[1], tails[0], tails[2]], DEPTHS, batch)
    assert (swapped[0] - expected[0]).abs().max() > 1e-3, "each exit has a tail of its own"
    torch.testing.assert_close(swapped[2], expected[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXITED)
def test_gradients_through_exits_are_those_of_shallower_models(name: str) -> None:
    task, form, body, tails, batch = exited(name)
    gradients = []
    for at_once in (True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in body.items()}
        ends = [{n: t.clone().requires_grad_() for n, t in end.items()} for end in tails]
        if at_once:
            logits = exit_logits(task, form, leaves, ends, DEPTHS, batch)
        else:
            logits = one_by_one(task, form, leaves, ends, batch)
        torch.stack([weight * each.tanh().sum() for weight, each in enumerate(logits, start=1)]).sum().backward()
        gradients.append([leaf.grad for tree in (leaves, *ends) for leaf in tree.values()])
    rotary = EXITED[name].rotary  # then some of it computes in single precision
    for found, expected in zip(*gradients, strict=True):
        assert found is not None and expected is not None
        scale = float(expected.abs().max()) + 1e-3
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4 if rotary else 1e-10)


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", EXITED)
def test_every_block_runs_once(name: str) -> None:
    """A model of d blocks costs what d blocks cost and what is around them: so blocks can be counted."""
    task, form, body, tails, batch = exited(name)
    alone = {}
    for depth in (1, 2, 3, 5):
        tree = {n: t for n, t in (body | tails[0]).items() if n in task.specs(shallower(form, depth))}
        alone[depth] = flops(lambda tree=tree, depth=depth: task.forward(shallower(form, depth), tree, batch))
    block = alone[2] - alone[1]
    around = alone[1] - block
    assert alone[5] == 5 * block + around
    assert flops(lambda: exit_logits(task, form, body, tails, DEPTHS, batch)) == 5 * block + 3 * around
    if name == "gpt2-text":  # the rows' vocabularies are as large as their blocks, but for this one
        assert 3 * around < 0.05 * alone[5]


@pytest.mark.parametrize("name", EXITED)
def test_a_skeleton_is_as_it_was(name: str) -> None:
    task, form, body, tails, batch = exited(name)
    skeleton = task.skeleton(shallower(form, DEPTHS[-1]))
    whole = body | tails[2]
    before = task.forward(form, whole, batch)
    exit_logits(task, form, body, tails, DEPTHS, batch)
    broken = [tails[0], {n: t[..., :2] for n, t in tails[1].items()}, tails[2]]
    with pytest.raises(RuntimeError):
        exit_logits(task, form, body, broken, DEPTHS, batch)
    for module in skeleton.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    assert torch.equal(task.forward(form, whole, batch), before)
