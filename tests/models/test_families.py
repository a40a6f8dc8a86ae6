"""Model families: named axes that are true, configs that come back as forms, and requests no model can meet."""

import dataclasses
import json
from collections.abc import Set

import pytest
import torch
from transformers import AutoConfig

from fedsim.core.submodel import join_fused, split_fused, split_specs
from fedsim.core.tree import Tree
from fedsim.learning.task import Task
from fedsim.models import Family, Form, Inputs, families, get_family
from fedsim.models.declare import stacked
from tests.support.family_rows import FAMILIES, ROWS, TIED, Row, batch_of, random_tree, real


pytestmark = pytest.mark.usefixtures("one_thread")


def _with(name: str, small: Form | None = None, **settings: str | int | float | bool) -> Row:
    """A row with another small form or other settings of the Hugging Face config."""
    row = ROWS[name]
    config = dataclasses.replace(row.config, settings=row.config.settings + tuple(settings.items()))
    return dataclasses.replace(row, config=config, small=small or row.small)


VARIANTS = {
    "vit without biases": _with("vit", qkv_bias=False),
    "vit with a head size": _with("vit", Form(20, 2, heads=3, head_dim=4, mlp=24)),
    "bert-mlm untied": _with("bert-mlm", tie_word_embeddings=False),
    "bert-text of a long text": _with("bert-text", max_position_embeddings=20, vocab_size=300, type_vocab_size=3),
    "gpt2-lm untied": _with("gpt2-lm", tie_word_embeddings=False),
    "gpt2-text of a long text": _with("gpt2-text", n_positions=20, vocab_size=300),
    "llama-lm with biases": _with("llama-lm", attention_bias=True, mlp_bias=True),
    "llama-lm with a head size": _with("llama-lm", Form(16, 2, heads=4, kv_heads=1, head_dim=6, mlp=24)),
    "llama-lm with its own rotation": _with("llama-lm", rope_theta=500, rope_type="linear", factor=2.0),
    "deberta-text with positions": _with("deberta-text", position_biased_input=True, type_vocab_size=2),
    "deberta-tokens of few buckets": _with("deberta-tokens", position_buckets=4),
    "modernbert-text by its mean": _with("modernbert-text", classifier_pooling="mean"),
    "modernbert-tokens with its own rotation": _with("modernbert-tokens", global_rope_theta=50, local_rope_theta=7.0),
    "modernbert-mlm untied": _with("modernbert-mlm", tie_word_embeddings=False),
    "llama-text without groups": _with("llama-text", Form(16, 2, heads=2, mlp=24), tie_word_embeddings=True),
}


@pytest.fixture(params=ROWS | VARIANTS)
def row(request: pytest.FixtureRequest) -> Row:
    return (ROWS | VARIANTS)[request.param]


@pytest.fixture(params=ROWS)
def plain_row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def _family(row: Row) -> Family:
    return get_family(row.config.family)


# named axes -----------------------------------------------------------------------------------------------------------


def test_families_are_files_and_each_has_a_row():
    assert families() == sorted(name for name, described in FAMILIES.items() if not described.module)
    with pytest.raises(ValueError, match=f"task.family='declare': must be one of {', '.join(families())}, or"):
        get_family("declare")


def test_named_axes_are_the_sizes_of_the_module(row: Row):
    task = row.task
    for form in row.forms:
        module = _family(row).build(form, task.inputs)
        assert type(module) is _family(row).model_class(task.inputs)
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

        blocks = [{spec.role for spec in specs.values() if spec.layer == layer} for layer in range(form.depth)]
        assert {spec.layer for spec in specs.values()} == {None, *range(form.depth)}
        for block in blocks:  # they are alike but for a normalisation that one of them may lack
            lacking = {spec.role: spec for spec in specs.values() if spec.role in {*set().union(*blocks)} - block}
            assert all(dim.mode in ("gain", "shift") for spec in lacking.values() for dim in spec.parsed)
        assert all(f".{spec.layer}.{spec.role}" in name for name, spec in specs.items() if spec.layer is not None)


EVERY_MODE = frozenset({"write", "read", "gain", "shift"})


def _reordered(
    task: Task, form: Form, tree: Tree, axis: str, modes: Set[str] = EVERY_MODE, group: str | None = None
) -> Tree:
    """The tree with the units of an axis in reverse order, in every dimension that follows it in one of the modes.

    `group`: only in dimensions of this group.
    """
    specs, axes = task.specs(form), form.axes
    parts = split_fused(tree, specs, axes)
    for name, spec in split_specs(specs).items():
        for position, dim in enumerate(spec.parsed):
            if axis in dim.axes and dim.mode in modes and group in (None, dim.group):
                grid = torch.arange(parts[name].shape[position]).reshape([axes[factor] for factor in dim.axes])
                parts[name] = parts[name].index_select(position, grid.flip(dim.axes.index(axis)).flatten())
    return join_fused(parts, specs)


def test_units_of_an_axis_may_be_reordered_where_all_follow(row: Row):
    """Tells `kv_head group` from `group kv_head`, which no size can, and finds a dimension on a wrong axis."""
    task, form = row.task, row.small
    tree, batch = random_tree(task, form), batch_of(task)
    before = real(task.forward(form, tree, batch), batch)
    assert before.std() > 0.1  # a model that says nothing would prove nothing
    present = {axis for spec in split_specs(task.specs(form)).values() for dim in spec.parsed for axis in dim.axes}
    for axis in sorted(axis for axis in present if form.axes[axis] > 1):
        everywhere = _reordered(task, form, tree, axis)
        after = real(task.forward(form, everywhere, batch), batch)
        if axis == "rotary":  # each coordinate is turned at a speed of its own
            assert (after - before).abs().max() > 1e-3
            continue
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # RMSNorm computes in single precision
        for modes in ({"write"}, {"read"}):
            partly = _reordered(task, form, tree, axis, modes)
            assert (real(task.forward(form, partly, batch), batch) - before).abs().max() > 1e-2, (axis, modes)


def test_groups_of_one_axis_may_be_reordered_alone_unless_a_tied_matrix_links_them(row: Row):
    """A pooler's output is as wide as the residual stream, and another axis all the same."""
    task, form = row.task, row.small
    tree, batch = random_tree(task, form), batch_of(task)
    dims = [dim for spec in split_specs(task.specs(form)).values() for dim in spec.parsed]
    before = real(task.forward(form, tree, batch), batch)
    groups = {dim.group for dim in dims if dim.axes == ("embed",)}
    apart = row.described.apart.get(task.inputs.kind)
    assert groups == ({"embed", apart} if apart else {"embed"})
    linked = len(groups) > 1 and any(dim.tied for dim in dims)
    for group in groups:
        after = real(task.forward(form, _reordered(task, form, tree, "embed", group=group), batch), batch)
        if linked:
            assert (after - before).abs().max() > 1e-2
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_modules_of_a_block(plain_row: Row):
    """A depth table has one row for each: eight, and nine where the MLP has a gate."""
    specs = split_specs(plain_row.task.specs(plain_row.deeper)).values()
    modules = dict.fromkeys(spec.module for spec in specs if spec.layer is not None)
    assert [*modules] == plain_row.described.block.split()


def test_a_silent_block_is_an_identity_unless_it_normalises_its_output(plain_row: Row):
    task, form = plain_row.task, plain_row.small
    tree, specs, batch = random_tree(task, form), task.specs(form), batch_of(task)
    silent = {
        name: tensor * 0 if specs[name].layer == 1 and any(dim in ("embed",) for dim in specs[name].dims) else tensor
        for name, tensor in tree.items()
    }
    shorter = dataclasses.replace(form, depth=1)
    first = {name: tensor for name, tensor in tree.items() if specs[name].layer != 1}
    gap = (task.forward(form, silent, batch) - task.forward(shorter, first, batch)).abs().max()
    assert gap > 1e-3 if _family(plain_row).post_norm else gap < 1e-9


UNTIED = {
    "bert-mlm untied": "bert-mlm",
    "gpt2-lm untied": "gpt2-lm",
    "llama-lm": "llama-lm-tied",
    "modernbert-mlm untied": "modernbert-mlm",
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_the_token_embedding_and_counted_once(name: str):
    task, form, tied = ROWS[name].task, ROWS[name].small, TIED[name]
    tree, batch, embedding = random_tree(task, form), batch_of(task), tied.embedding
    if tied.head:
        module = task.module(form, tree)
        assert tied.head not in tree and tied.head not in task.specs(form)
        assert module.get_parameter(tied.head) is module.get_parameter(embedding)
    parts = split_specs(task.specs(form)).values()
    assert {spec.module for spec in parts if any(dim.tied for dim in spec.parsed)} == {tied.norm}

    leaf = tree[embedding].clone().requires_grad_()
    task.loss(task.forward(form, tree | {embedding: leaf}, batch), batch).backward()
    unread = torch.ones(len(leaf), dtype=torch.bool)
    unread[batch["input_ids"].flatten()] = False
    assert leaf.grad is not None and leaf.grad[unread].any(1).all()  # such a token gets its gradient from the head


@pytest.mark.parametrize("name", UNTIED)
def test_an_untied_head_reads_what_the_last_norm_writes(name: str):
    task, form = (ROWS | VARIANTS)[name].task, ROWS[UNTIED[name]].small
    embedding, head = TIED[UNTIED[name]].embedding, TIED[UNTIED[name]].head
    assert head
    axis = "<transform:embed" if "bert" in name else "<embed"
    assert task.specs(form)[embedding].dims == ("=token", "embed") and task.specs(form)[head].dims == ("=token", axis)
    assert not any(dim.tied for spec in split_specs(task.specs(form)).values() for dim in spec.parsed)
    module = task.module(form, task.fresh(form, 0))
    assert not torch.equal(module.get_parameter(head), module.get_parameter(embedding))


# configs and forms ----------------------------------------------------------------------------------------------------


def _filled(form: Form, epsilon: float) -> Form:
    """The same form with every field given."""
    return dataclasses.replace(
        form, mlp=form.inner, kv_heads=form.axes["kv_head"], head_dim=form.head_size, norm_eps=epsilon
    )


def test_a_form_survives_the_config_and_the_disk(row: Row, tmp_path):
    family, inputs = _family(row), row.task.inputs
    for form in (dataclasses.replace(row.small, norm_eps=0.25), dataclasses.replace(row.larger, norm_eps=0)):
        config = family.config(form, inputs)
        assert family.form(config) == _filled(form, float(form.norm_eps or 0))
        config.save_pretrained(tmp_path)
        assert family.form(AutoConfig.from_pretrained(tmp_path)) == _filled(form, float(form.norm_eps or 0))
        family.check(family.form(config), inputs)
        assert family.config(family.form(config), inputs).to_dict() == config.to_dict()


def test_epsilons(plain_row: Row):
    for form in (plain_row.small, plain_row.larger):
        epsilon = plain_row.described.epsilon(form.width)
        given = dataclasses.replace(form, norm_eps=0.125)
        assert _family(plain_row).form(_family(plain_row).config(form, plain_row.task.inputs)) == _filled(form, epsilon)
        for asked, found in ((form, epsilon), (given, 0.125)):
            norms = [m for m in plain_row.task.skeleton(asked).modules() if "Norm" in type(m).__name__]
            assert len(norms) >= 2 * asked.depth
            assert {getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) for norm in norms} == {found}


def test_what_grown_models_must_share_is_in_the_config(plain_row: Row):
    family, inputs = _family(plain_row), plain_row.task.inputs
    config = family.config(plain_row.small, inputs).to_dict()
    assert family.constants and {*family.constants} <= config.keys()
    larger = family.config(plain_row.larger, inputs).to_dict()
    differing = {name for name in config if config[name] != larger[name]}
    assert differing and not differing & {*family.constants}  # what a form decides is no constant


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_reach_the_config(name: str):
    row = VARIANTS[name]
    config = _family(row).config(row.small, row.task.inputs).to_dict()
    rotary = config.get("rope_parameters", {})
    flat = config | rotary
    for whose, kind in (("global", "full_attention"), ("local", "sliding_attention")):  # of blocks of two kinds
        flat |= {f"{whose}_{field}": value for field, value in rotary.get(kind, {}).items()}
    assert {setting: flat[setting] for setting, _ in row.config.settings} == dict(row.config.settings)


def test_a_whole_number_for_a_float_is_written_as_one():
    row = VARIANTS["llama-lm with its own rotation"]
    written = json.loads(_family(row).config(row.small, row.task.inputs).to_json_string())
    assert {name: repr(value) for name, value in written["rope_parameters"].items()} == {
        "rope_theta": "500.0",
        "rope_type": "'linear'",
        "factor": "2.0",
    }


def test_special_tokens_are_in_the_vocabulary():
    for name in ("gpt2-lm", "gpt2-text", "llama-lm", "llama-text"):
        config = _family(ROWS[name]).config(ROWS[name].small, ROWS[name].task.inputs)
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (256, 257, 257)
        other = Inputs(ROWS[name].task.inputs.kind, 3, vocab_size=300, max_length=4, padding_id=7, end_id=299)
        config = _family(ROWS[name]).config(ROWS[name].small, other)
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (7, 299, 299)
    assert get_family("bert").config(Form(4, 1), ROWS["bert-mlm"].task.inputs).pad_token_id == 256
    assert ROWS["bert-mlm"].task.inputs.vocab_size == 259  # the mask is a token


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "row", "accepted"),
    [
        ("vit", "gpt2-lm", "'image', not 'lm'"),
        ("bert", "vit", "'text' or 'tokens' or 'mlm', not 'image'"),
        ("bert", "gpt2-lm", "'text' or 'tokens' or 'mlm', not 'lm'"),
        ("gpt2", "bert-tokens", "'lm' or 'text', not 'tokens'"),
        ("llama", "bert-mlm", "'lm' or 'text', not 'mlm'"),
    ],
)
def test_families_refuse_data_they_have_no_model_for(family: str, row: str, accepted: str):
    with pytest.raises(ValueError, match=f"task.family='{family}': its models are for data of kind {accepted}"):
        get_family(family).build(Form(16, 1), ROWS[row].task.inputs)


def test_vit_refuses_patches_that_do_not_tile_the_image():
    with pytest.raises(ValueError, match=r"task.patch_size=3: must divide task.data.image_size=8"):
        get_family("vit").build(Form(16, 1), dataclasses.replace(ROWS["vit"].task.inputs, patch_size=3))


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        (
            "vit",
            Form(16, 1, heads=4, kv_heads=2),
            "form.kv_heads=2: must be form.heads=4: 'vit' has no grouped queries",
        ),
        ("bert-text", Form(16, 1, heads=4, kv_heads=1), "form.kv_heads=1: must be form.heads=4"),
        ("gpt2-lm", Form(16, 1, heads=4, kv_heads=2), "form.kv_heads=2: must be form.heads=4"),
        ("bert-mlm", Form(16, 1, heads=4, head_dim=8), "form.head_dim=8: must be form.width / form.heads = 16 / 4"),
        ("gpt2-text", Form(18, 1, heads=4, head_dim=4), "form.head_dim=4: must be form.width / form.heads = 18 / 4"),
        ("llama-lm", Form(12, 1, heads=4), "form.head_dim=3: must be even"),
        ("llama-lm", Form(18, 1, heads=4, head_dim=4), "form.heads=4: must be a divisor of form.width=18"),
    ],
)
def test_families_refuse_forms_they_have_no_model_for(name: str, form: Form, message: str):
    with pytest.raises(ValueError, match=message):
        _family(ROWS[name]).check(form, ROWS[name].task.inputs)
    filled = _filled(Form(16, 1, heads=4), 0.0)
    _family(ROWS[name]).check(filled, ROWS[name].task.inputs)


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        (
            "vit",
            "hidden_size",
            32,
            "task.settings='hidden_size': must be among hidden_act, initializer_range, qkv_bias",
        ),
        ("vit", "nonsense", 1, "task.settings='nonsense': must be among"),
        ("vit", "hidden_act", "prelu", "task.settings.hidden_act='prelu': must be one of gelu, "),
        ("bert-text", "layer_norm_eps", 1e-5, "task.settings='layer_norm_eps': must be among"),
        (
            "bert-mlm",
            "type_vocab_size",
            1,
            "task.settings.type_vocab_size=1: must be a whole number, and at least the 2",
        ),
        ("gpt2-lm", "vocab_size", 257, "task.settings.vocab_size=257: must be a whole number, and at least the 258"),
        ("gpt2-lm", "n_positions", True, "task.settings.n_positions=True: must be a whole number"),
        ("gpt2-lm", "n_positions", 12.5, "task.settings.n_positions=12.5: must be a whole number"),
        ("gpt2-lm", "scale_attn_weights", 1, "task.settings.scale_attn_weights=1: must be true or false"),
        ("llama-lm", "rope_theta", "far", "task.settings.rope_theta='far': must be a number"),
        (
            "llama-lm",
            "rope_type",
            "dynamic",
            "task.settings.rope_type='dynamic': must be one of default, linear, llama3",
        ),
        ("llama-lm", "rope_type", "llama3", "task.settings: Missing required keys .*llama3"),
        ("llama-lm", "max_position_embeddings", 11, "max_position_embeddings=11: .* at least the 12 of the data"),
    ],
)
def test_families_refuse_settings(name: str, setting: str, value: str | float | bool, message: str):
    row = ROWS[name]
    inputs = dataclasses.replace(row.task.inputs, settings=((setting, value),))
    with pytest.raises(ValueError, match=message):
        _family(row).build(row.small, inputs)


@pytest.mark.parametrize("name", ["vit", "bert-text", "gpt2-lm", "llama-lm", "fifth-lm"])
def test_a_config_of_another_family_has_no_form(name: str):
    config = _family(ROWS[name]).config(ROWS[name].small, ROWS[name].task.inputs)
    for other in ("vit", "bert", "gpt2", "llama"):
        if other != ROWS[name].config.family:
            with pytest.raises(ValueError, match=f"config.model_type='{config.model_type}': must be '{other}'"):
                get_family(other).form(config)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (("norm.weight",), (), r"norm\.weight: outside the stack and within a block"),
        ((), ("norm.weight",), r"norm\.weight: outside the stack and within a block"),
        (("head.weight",), ("head.weight",), r"head\.weight: before the blocks and after them"),
    ],
)
def test_a_name_in_two_places_is_refused(before: tuple[str, ...], after: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stacked(
            Form(8, 2),
            dict.fromkeys(before, ("*embed",)),
            "blocks.",
            {"norm.weight": ("*embed",)},
            dict.fromkeys(after, ("*embed",)),
        )
