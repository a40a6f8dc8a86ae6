"""Attention of every family: models that `torch.func.vmap` runs together, blocks of two kinds, relative positions."""

import dataclasses

import pytest
import torch
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedgrow_algo.presets import PRESETS
from fedsim.core.tree import Tree
from fedsim.learning.skeleton import masked_attention
from fedsim.learning.task import Task
from fedsim.models import Form
from tests.support.family_rows import ROWS, batch_of, examples, model_inputs, random_tree, real


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ROWS)
def test_two_models_run_together_as_they_do_alone(name: str) -> None:
    """Of two clients, one has no padding: alone, a model would do without a mask there."""
    row, task = ROWS[name], ROWS[name].task
    trees = [random_tree(task, row.small), {n: 0.9 * t for n, t in random_tree(task, row.small).items()}]
    whole = batch_of(task, examples(task, 8))
    batches = [{n: t[:4] for n, t in whole.items()}, {n: t[4:] for n, t in whole.items()}]
    if "attention_mask" in whole:
        hidden = batches[1]["attention_mask"] == 0
        batches[1]["input_ids"] = batches[1]["input_ids"].masked_fill(hidden, 5)
        batches[1]["attention_mask"] = torch.ones_like(batches[1]["attention_mask"])

    def loss(tree: Tree, batch: Tree) -> torch.Tensor:
        return task.loss(task.forward(row.small, tree, batch), batch)

    together = [{n: torch.stack([one[n], other[n]]) for n in one} for one, other in (trees, batches)]
    leaves = {n: t.requires_grad_() for n, t in together[0].items()}
    with masked_attention(), sdpa_kernel(SDPBackend.MATH):  # as clients are batched
        task.skeleton(row.small)  # built outside, where its values may be drawn
        losses = vmap(loss)(leaves, together[1])
    found = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))
    for number, (tree, batch) in enumerate(zip(trees, batches, strict=True)):
        alone = {n: t.requires_grad_() for n, t in tree.items()}
        loss_alone = loss(alone, batch)
        torch.testing.assert_close(losses[number], loss_alone, rtol=0, atol=1e-5 if row.rotary else 1e-10)
        expected = dict(zip(alone, torch.autograd.grad(loss_alone, list(alone.values())), strict=True))
        size = max(float(each.abs().max()) for each in expected.values())
        for n in tree:
            difference = float((found[n][number] - expected[n]).abs().max())
            assert difference < (1e-4 if row.rotary else 1e-9) * size, n


# blocks of two kinds --------------------------------------------------------------------------------------------------


def logits_without(task: Task, form: Form, tree: Tree, of: int, changed: int, blocks: set[int]) -> float:
    """How much the token at `of` is moved by another token at `changed`, if only these blocks attend to anything."""
    silent = {
        n: t * 0 if spec.layer is not None and spec.layer not in blocks and "embed" in spec.dims else t
        for (n, t), spec in zip(tree.items(), (task.specs(form)[n] for n in tree), strict=True)
    }
    ids = torch.full((1, 12), 5)
    other = ids.clone()
    other[0, changed] = 9
    mask = torch.ones_like(ids)
    before, after = (task.forward(form, silent, {"input_ids": i, "attention_mask": mask}) for i in (ids, other))
    return float((after - before)[0, of].abs().max())


def test_every_third_block_of_modernbert_sees_the_whole_text_and_others_the_neighbourhood() -> None:
    row, task = ROWS["modernbert-tokens"], ROWS["modernbert-tokens"].task
    tree = random_tree(task, row.deeper)
    for block in range(row.deeper.depth):
        near, far = (logits_without(task, row.deeper, tree, 4, at, {block}) for at in (6, 7))
        assert near > 1e-3
        assert far > 1e-3 if block % 3 == 0 else far == 0.0, block


@pytest.mark.parametrize("local_theta", [10_000.0, 3.0])
def test_the_two_kinds_of_blocks_turn_at_speeds_of_their_own(local_theta: float) -> None:
    row = ROWS["modernbert-tokens"]
    settings = (*row.config.settings, ("local_rope_theta", local_theta))
    other = dataclasses.replace(row, config=dataclasses.replace(row.config, settings=settings))
    tree, batch = random_tree(row.task, row.small), model_inputs(batch_of(row.task))
    before, after = (real(each.task.forward(row.small, tree, batch), batch) for each in (row, other))
    assert (local_theta == 10_000.0) == torch.equal(before, after)


# positions of DeBERTa -------------------------------------------------------------------------------------------------


def test_deberta_knows_positions_by_their_distance_alone() -> None:
    """A text and the same text further on: nothing but distances tells its tokens apart."""
    row, task = ROWS["deberta-tokens"], ROWS["deberta-tokens"].task
    tree = random_tree(task, row.small)
    ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0]])
    moved = ids.roll(3, 1)
    masks = [(each > 0).long() for each in (ids, moved)]
    first, second = (
        task.forward(row.small, tree, {"input_ids": each, "attention_mask": mask})[mask == 1]
        for each, mask in zip((ids, moved), masks, strict=True)
    )
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    name = "deberta.encoder.rel_embeddings.weight"
    without = task.forward(row.small, tree | {name: tree[name] * 0}, {"input_ids": ids, "attention_mask": masks[0]})
    assert (without[masks[0] == 1] - first).abs().max() > 1e-3


def test_every_preset_grows_deberta_and_those_that_mix_heads_refuse_modernbert() -> None:
    from fedgrow_algo.dual_ligo import operator_between

    large = {"deberta": Form(32, 4, heads=4, mlp=48), "modernbert": Form(32, 4, heads=8, mlp=48)}
    refused = {"deberta": set(), "modernbert": set()}
    for family, form in large.items():
        row = ROWS[f"{family}-text"]
        for preset in PRESETS:
            try:
                operator_between(preset, row.task, row.small, form)
            except ValueError as error:
                refused[family].add(preset)
                assert "rotary" in str(error) or "form.mlp" in str(error)
    # a ratio of the MLP to the stream that is no whole number has no chunks
    assert refused == {"deberta": {"paper-chunked"}, "modernbert": {"paper", "paper-untied", "paper-chunked", "ligo"}}
