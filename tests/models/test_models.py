"""Models of every family: growth of all that they hold, losses and scores on every kind of data, saving, training."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fedgrow_algo.dual_ligo import GrownLoss, operator_between
from fedgrow_algo.ligo import Operator
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.core.submodel import Dim, ParamSpec, join_fused, split_fused, split_specs
from fedsim.core.tree import Tree, numel
from fedsim.data.text import BYTE_MASK
from fedsim.learning.meter import Meter
from fedsim.learning.objectives import TaskLoss
from fedsim.models import get_family
from tests.support.clients import local_train
from tests.support.family_rows import LENGTH, ROWS, Row, batch_of, examples, model_inputs, random_tree, real


pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = {
    "image": AutoModelForImageClassification,
    "lm": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "text": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}
PRE_NORM = [name for name, row in ROWS.items() if not get_family(row.config.family).post_norm]
ROTARY = [name for name, row in ROWS.items() if row.rotary]


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture(params=[name for name in ROWS if name != "vit"])
def text_row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def _operator(row: Row, preset: str) -> tuple[Operator, Tree]:
    operator = operator_between(preset, row.task, row.small, row.larger)
    return operator, operator.init(torch.Generator().manual_seed(2), torch.float64)


# fused dimensions -----------------------------------------------------------------------------------------------------


def test_fused_parts_may_differ_in_size_and_come_back_in_order():
    specs = {"h.0.both.weight": ParamSpec(("<embed", "many:head head_dim + few:head_dim"), 0, "both.weight")}
    tree = {"h.0.both.weight": torch.arange(30.0).reshape(3, 10).requires_grad_()}
    axes = {"embed": 3, "head": 4, "head_dim": 2}

    parts = split_fused(tree, specs, axes)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "h.0.both/many.weight": (3, 8),
        "h.0.both/few.weight": (3, 2),
    }
    described = split_specs(specs)
    assert [spec.module for spec in described.values()] == ["both/many", "both/few"]
    assert described["h.0.both/few.weight"] == ParamSpec(("<embed", "few:head_dim"), 0, "both/few.weight")
    assert described["h.0.both/few.weight"].parsed == (Dim("read", "embed", ("embed",)), Dim.parse("few:head_dim"))

    joined = join_fused(parts, specs)
    assert torch.equal(joined["h.0.both.weight"], tree["h.0.both.weight"])
    (gradient,) = torch.autograd.grad(joined["h.0.both.weight"].sum(), tree["h.0.both.weight"])
    assert torch.equal(gradient, torch.ones(3, 10))


def test_a_model_without_fused_dimensions_is_left_as_it_is():
    row = ROWS["vit"]
    tree, specs, axes = row.task.fresh(row.small, 0), row.task.specs(row.small), row.small.axes
    assert split_specs(specs) == specs
    assert all(split_fused(tree, specs, axes)[name] is tree[name] for name in tree)
    assert all(join_fused(tree, specs)[name] is tree[name] for name in tree)


@pytest.mark.parametrize("name", ["gpt2-lm", "gpt2-text"])
def test_query_key_and_value_are_projections_of_their_own(name: str):
    operator, _ = _operator(ROWS[name], "paper")
    vit, _ = _operator(ROWS["vit"], "paper")
    assert sorted(operator.groups) == sorted(vit.groups) == ["embed", "key", "mlp", "query", "value"]
    assert len([name for name in operator.shapes if name.startswith("depth.")]) == 8
    assert operator.shapes["width.key"] == (2, 48, 16)
    assert operator.shapes["depth.attn.c_attn/key"] == (3, 2)
    assert numel(operator.init(torch.Generator())) == numel(vit.init(torch.Generator()))


def test_each_part_of_a_fused_projection_is_grown_by_its_own_map():
    row = ROWS["gpt2-lm"]
    operator, tensors = _operator(row, "paper")
    small = random_tree(row.task, row.small)
    before = operator(tensors, small)
    changed = tensors | {"width.key": tensors["width.key"] + 1.0}
    after = operator(changed, small)
    for ending in ("weight", "bias"):
        name = f"transformer.h.1.attn.c_attn.{ending}"
        same = [torch.equal(a, b) for a, b in zip(before[name].chunk(3, -1), after[name].chunk(3, -1), strict=True)]
        assert same == [True, False, True]


# growth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["deeper", "wider", "larger"])
@pytest.mark.parametrize("name", PRE_NORM)
def test_preserving_growth_computes_the_same(name: str, form: str):
    row, large = ROWS[name], getattr(ROWS[name], form)
    task, batch = row.task, batch_of(row.task)
    small, operator = random_tree(task, row.small), operator_between("preserving", task, row.small, large)
    grown = operator(operator.init(torch.Generator().manual_seed(2), torch.float64), small)
    assert {name: tensor.shape for name, tensor in grown.items()} == {
        name: parameter.shape for name, parameter in task.skeleton(large).named_parameters()
    }
    before, after = task.forward(row.small, small, batch), task.forward(large, grown, batch)
    assert before.std() > 0.1  # a model that says nothing would prove nothing
    rounding = 1e-4 if name in ROTARY else 1e-9  # RMSNorm and rotation compute in single precision
    torch.testing.assert_close(real(after, batch), real(before, batch), rtol=0, atol=rounding)
    torch.testing.assert_close(task.loss(after, batch), task.loss(before, batch), rtol=0, atol=rounding)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ROTARY])
def test_growth_as_in_the_paper_starts_elsewhere(name: str):
    row = ROWS[name]
    operator, tensors = _operator(row, "paper")
    task, small, batch = row.task, random_tree(row.task, row.small), batch_of(row.task)
    grown = operator(tensors, small)
    assert {name: tensor.shape for name, tensor in grown.items()} == {
        name: parameter.shape for name, parameter in task.skeleton(row.larger).named_parameters()
    }
    assert (task.forward(row.larger, grown, batch) - task.forward(row.small, small, batch)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ROTARY)
def test_growth_as_in_the_paper_is_refused_for_rotary_positions(name: str):
    with pytest.raises(ValueError, match="preserving"):
        _operator(ROWS[name], "paper")


@pytest.mark.parametrize("preset", ["paper", "preserving"])
def test_gradients_reach_every_tensor_of_the_operator(row: Row, preset: str):
    if preset == "paper" and row.rotary:
        preset = "net2net"  # `paper` is refused
    operator, tensors = _operator(row, preset)
    task, batch = row.task, batch_of(row.task)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    grown = operator(leaves, random_tree(task, row.small))
    task.loss(task.forward(row.larger, grown, batch), batch).backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.any()] == []


# loss, score, padding -------------------------------------------------------------------------------------------------


def test_loss_is_what_the_hugging_face_class_computes(row: Row):
    task, tree, batch = row.task, random_tree(row.task, row.small), batch_of(row.task)
    ours = task.loss(task.forward(row.small, tree, batch), batch)
    theirs = task.module(row.small, tree)(**batch).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)  # theirs may be computed in single precision


def test_score_is_independent_of_the_batch_size(row: Row):
    task, tree, split = row.task, random_tree(row.task, row.small), examples(row.task)
    module = task.module(row.small, {name: tensor.float() for name, tensor in tree.items()})
    whole, parts = task.score(module, split), task.score(module, split, batch_size=2)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert (whole.correct == parts.correct).all() and (whole.count == parts.count).all()
    batch = task.batch(split, torch.arange(len(split)))
    _, labels = task.aligned(torch.zeros(*batch["labels"].shape, 1), batch)
    assert whole.count.sum() == (labels >= 0).sum() >= len(split) - 1

    loss = task.loss(module(**model_inputs(batch)).logits, batch)
    assert whole.loss == pytest.approx(float(loss), rel=1e-5)


def test_loss_is_independent_of_padding(text_row: Row):
    task, tree = text_row.task, random_tree(text_row.task, text_row.small)
    whole, losses = batch_of(task), []
    for size in (6, LENGTH):
        batch = {name: tensor[:3, :size] if tensor.ndim == 2 else tensor[:3] for name, tensor in whole.items()}
        assert (batch["attention_mask"].sum(1) < 6).any() and batch["attention_mask"].sum(1).max() <= 6
        losses.append(task.loss(task.forward(text_row.small, tree, batch), batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6 if text_row.rotary else 1e-12)


LAST_TOKEN_READ = ("gpt2-text", "llama-text")  # these find it as the last id that is not the padding's


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("vit", *LAST_TOKEN_READ)])
def test_nobody_looks_at_padding(name: str):
    row, task = ROWS[name], ROWS[name].task
    tree, batch = random_tree(task, row.small), batch_of(task)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    before, after = task.forward(row.small, tree, batch), task.forward(row.small, tree, other)
    assert torch.equal(real(before, batch), real(after, other))
    assert torch.equal(task.loss(before, batch), task.loss(after, other))


@pytest.mark.parametrize("name", ["bert-text", "gpt2-text", "llama-text"])
def test_a_text_is_classified_alike_alone_and_among_longer_ones(name: str):
    """BERT's by its first token, the others' by the last one that is not padding."""
    row, task = ROWS[name], ROWS[name].task
    tree, batch = random_tree(task, row.small), batch_of(task)
    together = task.forward(row.small, tree, batch)
    for index, length in enumerate(batch["attention_mask"].sum(1)):
        alone = {key: batch[key][index : index + 1, :length] for key in ("input_ids", "attention_mask")}
        logits = task.forward(row.small, tree, alone)[0]
        torch.testing.assert_close(logits, together[index], rtol=0, atol=1e-6 if row.rotary else 1e-12)


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm", "bert-mlm"])
def test_only_a_finder_of_masked_tokens_looks_ahead(name: str):
    row, task = ROWS[name], ROWS[name].task
    tree, batch = random_tree(task, row.small), batch_of(task)
    longest = {key: batch[key][-1:] for key in ("input_ids", "attention_mask")}
    changed = longest | {"input_ids": torch.cat([longest["input_ids"][:, :-1], torch.tensor([[BYTE_MASK - 2]])], 1)}
    before, after = task.forward(row.small, tree, longest), task.forward(row.small, tree, changed)
    gap = (before - after)[:, :-1].abs().max()
    assert gap > 1e-3 if name == "bert-mlm" else gap == 0


# modules of our own ---------------------------------------------------------------------------------------------------


def test_a_module_does_not_share_with_the_skeleton(row: Row):
    task, form = row.task, row.small
    before = {name: parameter.clone() for name, parameter in task.skeleton(form).named_parameters()}
    task.forward(form, random_tree(task, form), batch_of(task))
    with torch.no_grad():
        for parameter in task.module(form, task.fresh(form, 1)).parameters():
            parameter.add_(1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in task.skeleton(form).named_parameters())


def test_fresh_models_depend_on_the_seed_alone(row: Row):
    first, other = row.task.fresh(row.small, 3), row.task.fresh(row.small, 4)
    torch.rand(1)
    again = row.task.fresh(row.small, 3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_saved_model_loads_with_plain_transformers(row: Row, tmp_path):
    task, batch = row.task, batch_of(row.task)
    tree = {name: tensor.float() for name, tensor in random_tree(task, row.small).items()}
    module: Any = task.module(row.small, tree)
    module.save_pretrained(tmp_path)
    loaded: Any = AUTO[task.inputs.kind].from_pretrained(tmp_path)
    assert type(loaded) is type(task.skeleton(row.small))
    inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    with torch.no_grad():
        assert torch.equal(loaded(**model_inputs(inputs)).logits, module(**model_inputs(inputs)).logits)


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm"])
def test_a_saved_language_model_generates(name: str, tmp_path):
    row = ROWS[name]
    module: Any = row.task.module(row.small, row.task.fresh(row.small, 0))
    module.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    start = {"input_ids": torch.tensor([[72, 101]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    cached, plain = (loaded.generate(**start, max_length=LENGTH, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] > 2


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("vit", None),
        ("bert-tokens", None),
        ("bert-mlm", None),
        ("llama-text", None),
        ("gpt2-lm", "paper"),
        ("fifth-lm", "preserving"),
    ],
)
def test_training_is_counted_and_lowers_the_loss(name: str, preset: str | None):
    row, task = ROWS[name], ROWS[name].task
    split, large = examples(task, 4), row.wider
    info = ClientInfo(0, "", row.small, len(split))
    meter = Meter({})
    ctx = ClientContext(0, 0, task, row.small, large, info, split, torch.device("cpu"), meter)
    small = task.fresh(row.small, 0)
    if preset is None:
        objective, start, frozen = TaskLoss(task, row.small), small, {}
    else:
        operator = operator_between(preset, task, row.small, large)
        start, frozen = operator.init(torch.Generator().manual_seed(0)), {"small": operator.stack(small)}
        objective = GrownLoss(task, preset, row.small, large)
    for _ in range(2):
        start = local_train(ctx, objective, start, frozen, purpose="own", lr=0.01, epochs=3, batch_size=4)
    first, second = meter.work
    assert second.loss < first.loss
    assert first.flops > 0 and first.activation_bytes > 0 and first.trainable == numel(start)
