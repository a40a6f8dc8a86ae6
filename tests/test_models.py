"""Model families: named axes that are true, growth that computes the same, losses and scores on every kind of data."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from fedgrow_algo.dual_ligo import operator_between
from fedgrow_algo.ligo import Operator
from fedgrow_algo.presets import by_name
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.data.config import DataConfig, Split, digits, pydoc
from fedsim.data.text import BYTE_END, padded
from fedsim.models import Form, Inputs, families, get_family
from fedsim.submodel import Dim, ParamSpec, join_fused, split_fused, split_specs
from fedsim.task import Batch, Task, TaskConfig
from fedsim.training import Meter, local_train
from fedsim.tree import Tree, numel


LENGTH = 12
TASKS = {
    "vit": Task(TaskConfig(digits(), "vit")),
    "gpt2-lm": Task(TaskConfig(pydoc(max_length=LENGTH), "gpt2")),
    "gpt2-text": Task(
        TaskConfig(DataConfig("notes.csv", text=("note",), label="kind", num_classes=3, max_length=LENGTH), "gpt2")
    ),
}
AUTO = {
    "image": AutoModelForImageClassification,
    "lm": AutoModelForCausalLM,
    "text": AutoModelForSequenceClassification,
}
SMALL = Form(16, 2, heads=2, mlp=24)
GROWN = {
    "deeper": Form(16, 5, heads=2, mlp=24),
    "wider heads": Form(20, 2, heads=2, mlp=24),
    "more heads": Form(40, 2, heads=5, mlp=24),
    "all of it": Form(48, 3, heads=4, mlp=52),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


@pytest.fixture(params=[name for name in TASKS if name != "vit"])
def text_task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def _random_tree(task: Task, form: Form) -> Tree:
    """Parameters none of which is what it starts as: biases are not 0, gains of norms are not 1."""
    generator = torch.Generator().manual_seed(0)
    tree = {}
    for name, tensor in task.fresh(form, 0).items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tree[name] = 0.5 + 0.5 * drawn if tensor.ndim == 1 else 0.3 * drawn
    return tree


def _split(task: Task, size: int = 7) -> Split:
    """Random examples; texts of every length from 2 tokens to no padding at all."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(size) % (1 if task.inputs.kind == "lm" else task.inputs.num_classes)
    if task.inputs.kind == "image":
        pixels = torch.randint(0, 256, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
        return Split({"pixel_values": pixels}, labels)
    lengths = torch.linspace(2, LENGTH, size).long()
    texts = [torch.randint(0, 256, (int(length),), generator=generator) for length in lengths]
    for text in texts:
        text[-1] = BYTE_END
    return Split(padded([text.numpy() for text in texts], LENGTH), labels)


def _batch(task: Task) -> Batch:
    """All examples, images in double precision."""
    split = _split(task)
    batch = task.batch(split, torch.arange(len(split)))
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def _operator(task: Task, preset: str, large: Form) -> tuple[Operator, Tree]:
    operator = operator_between(preset, task, SMALL, large)
    return operator, operator.init(torch.Generator().manual_seed(2), torch.float64)


def _model_inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _real(logits: Tensor, batch: Batch, task: Task) -> Tensor:
    """Logits without those at padding, which nobody reads."""
    return logits[batch["attention_mask"] == 1] if task.inputs.kind == "lm" else logits


# named axes -----------------------------------------------------------------------------------------------------------


def test_families_are_files():
    assert {"vit", "gpt2"} <= set(families())


@pytest.mark.parametrize("form", [SMALL, *GROWN.values()], ids=str)
def test_named_axes_are_the_sizes_of_the_module(task: Task, form: Form):
    module = get_family(task.config.family).build(form, task.inputs)
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    specs = task.specs(form)
    assert tensors.keys() == specs.keys()
    assert all(len(specs[name].dims) == tensor.ndim for name, tensor in tensors.items())
    assert all(tensor.is_floating_point() for tensor in tensors.values())

    parts = split_fused(tensors, specs, form.axes)  # fails where the parts do not add up to the tensor
    assert parts.keys() == split_specs(specs).keys()
    for name, spec in split_specs(specs).items():
        named = [dim.size(form.axes) for dim in spec.parsed]
        assert list(parts[name].shape) == [size or own for size, own in zip(named, parts[name].shape, strict=True)]

    layers = [spec.layer for spec in specs.values() if spec.layer is not None]
    assert {*layers} == {*range(form.depth)} and len(layers) == form.depth * layers.count(0)
    assert all(str(spec.layer) in name for name, spec in specs.items() if spec.layer is not None)


def test_families_refuse_data_they_cannot_read():
    with pytest.raises(ValueError, match="'gpt2': reads texts, but the data are of kind 'image'"):
        get_family("gpt2").build(SMALL, TASKS["vit"].inputs)
    with pytest.raises(ValueError, match="'vit': reads images, but the data are of kind 'lm'"):
        get_family("vit").build(SMALL, TASKS["gpt2-lm"].inputs)


def test_special_tokens_are_in_the_vocabulary():
    config = get_family("gpt2").build(Form(2, 1, heads=1), TASKS["gpt2-lm"].inputs).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (256, 257, 257)
    other = Inputs("lm", 1, vocab_size=300, max_length=4, padding_id=7, end_id=299)
    config = get_family("gpt2").build(Form(2, 1, heads=1), other).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (7, 299, 299)


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
    task = TASKS["vit"]
    tree, specs = task.fresh(SMALL, 0), task.specs(SMALL)
    assert split_specs(specs) == specs
    assert all(split_fused(tree, specs, SMALL.axes)[name] is tree[name] for name in tree)
    assert all(join_fused(tree, specs)[name] is tree[name] for name in tree)


def test_query_key_and_value_are_projections_of_their_own(text_task: Task):
    operator, _ = _operator(text_task, "paper", GROWN["all of it"])
    vit, _ = _operator(TASKS["vit"], "paper", GROWN["all of it"])
    assert sorted(operator.groups) == sorted(vit.groups) == ["embed", "key", "mlp", "query", "value"]
    assert len(operator.modules) == len(vit.modules) == 8
    assert list(operator.modules.values()) == [False, False, False, False, True, False, False, True]
    assert operator.shapes["width.key"] == (2, 48, 16)
    assert operator.shapes["depth.attn.c_attn/key"] == (3, 2)
    assert numel(operator.init(torch.Generator())) == numel(vit.init(torch.Generator()))


def test_each_part_of_a_fused_projection_is_grown_by_its_own_map():
    task, large = TASKS["gpt2-lm"], GROWN["all of it"]
    operator, tensors = _operator(task, "paper", large)
    small = _random_tree(task, SMALL)
    before = operator(tensors, small)
    changed = tensors | {"width.key": tensors["width.key"] + 1.0}
    after = operator(changed, small)
    for ending in ("weight", "bias"):
        name = f"transformer.h.1.attn.c_attn.{ending}"
        same = [torch.equal(a, b) for a, b in zip(before[name].chunk(3, -1), after[name].chunk(3, -1), strict=True)]
        assert same == [True, False, True]


def test_operator_of_the_released_vit_ladder_has_the_published_size():
    inputs = Inputs("image", 100, image_size=224, channels=3, patch_size=16)
    family, small, large = get_family("vit"), Form(320, 4, heads=8), Form(384, 6, heads=8)
    specs = family.specs(small, inputs), family.specs(large, inputs)
    operator = Operator(by_name("paper"), *specs, small.axes, large.axes)
    assert sum(torch.Size(shape).numel() for shape in operator.shapes.values()) == 2_089_152


# growth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", GROWN.values(), ids=list(GROWN))
def test_preserving_growth_computes_the_same(task: Task, large: Form):
    operator, tensors = _operator(task, "preserving", large)
    small, batch = _random_tree(task, SMALL), _batch(task)
    grown = operator(tensors, small)
    assert {name: tensor.shape for name, tensor in grown.items()} == {
        name: parameter.shape for name, parameter in task.skeleton(large).named_parameters()
    }
    before, after = task.forward(SMALL, small, batch), task.forward(large, grown, batch)
    assert before.std() > 0.1  # a model that says nothing would prove nothing
    torch.testing.assert_close(_real(after, batch, task), _real(before, batch, task), rtol=0, atol=1e-9)
    torch.testing.assert_close(task.loss(after, batch), task.loss(before, batch), rtol=0, atol=1e-9)


def test_growth_as_in_the_paper_starts_elsewhere(task: Task):
    large = GROWN["all of it"]
    operator, tensors = _operator(task, "paper", large)
    small, batch = _random_tree(task, SMALL), _batch(task)
    grown = operator(tensors, small)
    assert {name: tensor.shape for name, tensor in grown.items()} == {
        name: parameter.shape for name, parameter in task.skeleton(large).named_parameters()
    }
    assert (task.forward(large, grown, batch) - task.forward(SMALL, small, batch)).abs().max() > 1e-2


@pytest.mark.parametrize("preset", ["paper", "preserving"])
def test_gradients_reach_every_tensor_of_the_operator(task: Task, preset: str):
    operator, tensors = _operator(task, preset, GROWN["all of it"])
    batch = _batch(task)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    task.loss(task.forward(GROWN["all of it"], operator(leaves, _random_tree(task, SMALL)), batch), batch).backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.any()] == []


# loss, score, padding -------------------------------------------------------------------------------------------------


def test_loss_is_what_the_hugging_face_class_computes(task: Task):
    tree, batch = _random_tree(task, SMALL), _batch(task)
    ours = task.loss(task.forward(SMALL, tree, batch), batch)
    theirs = task.module(SMALL, tree)(**batch).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)  # theirs may be computed in single precision


def test_score_is_independent_of_the_batch_size(task: Task):
    tree, split = _random_tree(task, SMALL), _split(task)
    module = task.module(SMALL, {name: tensor.float() for name, tensor in tree.items()})
    whole, parts = task.score(module, split), task.score(module, split, batch_size=2)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert (whole.correct == parts.correct).all() and (whole.count == parts.count).all()
    tokens = int(split.inputs["attention_mask"].sum()) if "attention_mask" in split.inputs else 0
    assert whole.count.sum() == (tokens - len(split) if task.inputs.kind == "lm" else len(split))

    batch = task.batch(split, torch.arange(len(split)))
    loss = task.loss(module(**_model_inputs(batch)).logits, batch)
    assert whole.loss == pytest.approx(float(loss), rel=1e-5)


def test_loss_is_independent_of_padding(text_task: Task):
    tree, split = _random_tree(text_task, SMALL), _split(text_task)
    losses = []
    for size in (6, LENGTH):
        cut = Split({name: tensor[:3, :size] for name, tensor in split.inputs.items()}, split.labels[:3])
        batch = text_task.batch(cut, torch.arange(3))
        assert (batch["attention_mask"].sum(1) < 6).any() and batch["attention_mask"].sum(1).max() <= 6
        losses.append(text_task.loss(text_task.forward(SMALL, tree, batch), batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)


def test_a_language_model_does_not_look_at_padding():
    task = TASKS["gpt2-lm"]
    tree, split = _random_tree(task, SMALL), _split(task)
    ids, mask = split.inputs["input_ids"], split.inputs["attention_mask"]
    other = Split({"input_ids": ids.masked_fill(mask == 0, 5), "attention_mask": mask}, split.labels)
    losses = []
    for some in (split, other):
        batch = task.batch(some, torch.arange(len(some)))
        losses.append(task.loss(task.forward(SMALL, tree, batch), batch))
    assert torch.equal(losses[0], losses[1])


def test_a_text_is_classified_by_its_last_token():
    task = TASKS["gpt2-text"]
    tree, split = _random_tree(task, SMALL), _split(task)
    batch = task.batch(split, torch.arange(len(split)))
    together = task.forward(SMALL, tree, batch)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(task.forward(SMALL, tree, alone)[0], together[row], rtol=0, atol=1e-12)


# modules of our own ---------------------------------------------------------------------------------------------------


def test_the_tied_head_follows_the_token_embedding():
    task, name = TASKS["gpt2-lm"], "transformer.wte.weight"
    tree, batch = _random_tree(task, SMALL), _batch(task)
    assert "lm_head.weight" not in tree and "lm_head.weight" not in task.specs(SMALL)
    module: Any = task.module(SMALL, tree)
    assert module.lm_head.weight is module.transformer.wte.weight
    assert torch.equal(module.lm_head.weight, tree[name])

    leaf = tree[name].clone().requires_grad_()
    logits = task.forward(SMALL, tree | {name: leaf}, batch)
    hidden = module.transformer(**_model_inputs(batch)).last_hidden_state
    torch.testing.assert_close(logits, F.linear(hidden, tree[name]), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(**_model_inputs(batch)).logits, logits, rtol=0, atol=1e-12)

    task.loss(logits, batch).backward()
    unread = torch.ones(258, dtype=torch.bool)
    unread[batch["input_ids"].flatten()] = False
    assert leaf.grad is not None and leaf.grad[unread].any(1).all()  # such a token gets its gradient from the head


def test_a_module_does_not_share_with_the_skeleton(task: Task):
    before = {name: parameter.clone() for name, parameter in task.skeleton(SMALL).named_parameters()}
    task.forward(SMALL, _random_tree(task, SMALL), _batch(task))
    with torch.no_grad():
        for parameter in task.module(SMALL, task.fresh(SMALL, 1)).parameters():
            parameter.add_(1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in task.skeleton(SMALL).named_parameters())


def test_fresh_models_depend_on_the_seed_alone(task: Task):
    first, other = task.fresh(SMALL, 3), task.fresh(SMALL, 4)
    torch.rand(1)
    again = task.fresh(SMALL, 3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_saved_model_loads_with_plain_transformers(task: Task, tmp_path):
    tree = {name: tensor.float() for name, tensor in _random_tree(task, SMALL).items()}
    module: Any = task.module(SMALL, tree)
    module.save_pretrained(tmp_path)
    loaded: Any = AUTO[task.inputs.kind].from_pretrained(tmp_path)
    assert type(loaded) is type(task.skeleton(SMALL))
    inputs = _model_inputs(task.batch(_split(task), torch.arange(7)))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, module(**inputs).logits)


def test_a_saved_language_model_generates(tmp_path):
    task = TASKS["gpt2-lm"]
    module: Any = task.module(SMALL, task.fresh(SMALL, 0))
    module.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.use_cache
    start = {"input_ids": torch.tensor([[72, 101]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    cached, plain = (loaded.generate(**start, max_length=LENGTH, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("preset", [None, "paper"])
def test_training_is_counted_and_lowers_the_loss(task: Task, preset: str | None):
    split, large = _split(task), GROWN["all of it"]
    info = ClientInfo(0, "", SMALL, len(split))
    meter = Meter("test", {})
    ctx = ClientContext(0, 0, task, SMALL, large, info, split, torch.device("cpu"), meter)
    small = task.fresh(SMALL, 0)
    if preset is None:
        start, forward = small, lambda tree, batch: task.forward(SMALL, tree, batch)
    else:
        operator = operator_between(preset, task, SMALL, large)
        stacked, start = operator.stack(small), operator.init(torch.Generator().manual_seed(0))

        def forward(tree, batch):
            return task.forward(large, operator.grow(tree, stacked), batch)

    for _ in range(2):
        start = local_train(ctx, forward, start, purpose="own", lr=0.01, epochs=5, batch_size=4)
    first, second = meter.work
    assert second.loss < first.loss
    assert first.flops > 0 and first.activation_bytes > 0 and first.trainable == numel(start)
