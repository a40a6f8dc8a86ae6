"""What a growth operator refuses, in which words."""

import dataclasses

import pytest

from fedgrow_algo.dual_ligo import operator_between as operator_of_task
from fedgrow_algo.presets import PRESETS, by_name
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support.growing import SMALL, large, operator_between, small


WORKS_WITH_ROTARY = "preserving, net2net, aki, stacking, interlacing, zero-block, hypercloning"


@pytest.mark.parametrize("preset", ["paper", "paper-untied", "paper-chunked", "ligo"])
def test_rotary_heads_refuse_presets_that_mix_coordinates_and_name_those_that_do_not(preset):
    with pytest.raises(
        ValueError, match=f"^preset '{preset}' mixes the coordinates of heads.*: choose one of {WORKS_WITH_ROTARY}$"
    ):
        operator_between(preset, "llama-lm", small("llama-lm"), large("llama-lm", "all x2", preset))
    for works in WORKS_WITH_ROTARY.split(", "):
        operator_between(works, "llama-lm", small("llama-lm"), large("llama-lm", "all x2", works))


@pytest.mark.parametrize("preset", PRESETS)
def test_rotary_heads_cannot_grow_under_any_preset(preset):
    new = dataclasses.replace(small("llama-lm"), head_dim=6)
    with pytest.raises(
        ValueError, match=r"^form\.head_dim: rotary .* from 4 to 6 coordinates; give both forms one head_dim"
    ):
        operator_between(preset, "llama-lm", small("llama-lm"), new)


COPYING = [preset for preset in PRESETS if preset not in ("paper", "paper-untied", "paper-chunked", "ligo")]


@pytest.mark.parametrize("preset", COPYING)
@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (Form(8, 2, heads=4), Form(16, 2, heads=2), "axis 'head' cannot go from 4 to 2"),
        (Form(8, 2, heads=2), Form(16, 2, heads=8), "axis 'head_dim' cannot go from 4 to 2"),
        (Form(8, 3, heads=2), Form(16, 2, heads=4), "cannot drop blocks: depth would go from 3 to 2"),
        (Form(12, 2, heads=2), Form(8, 2, heads=2, mlp=12), "cannot shrink: axis 'embed' would go from 12 to 8"),
        (Form(8, 2, heads=2, mlp=9), Form(8, 2, heads=2, mlp=7), "cannot shrink: axis 'mlp' would go from 9 to 7"),
    ],
    ids=["heads", "head size", "depth", "width", "mlp"],
)
def test_copies_refuse_to_shrink_naming_preset_axis_and_sizes(preset, old, new, text):
    with pytest.raises(ValueError, match=text) as refusal:
        operator_between(preset, "vit", old, new)
    assert repr(preset) in str(refusal.value) or "cannot shrink" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 12}, "axis 'embed' goes from 8 to 12, not a multiple"),
        ({"heads": 3}, "axis 'head' goes from 2 to 3, not a multiple"),
        ({"mlp": 20}, "axis 'mlp' goes from 16 to 20, not a multiple"),
        ({"head_dim": 8}, "axis 'head_dim' goes from 4 to 8, not the same"),
    ],
    ids=str,
)
def test_tiling_refuses_ratios_that_are_not_whole(changes, text):
    with pytest.raises(ValueError, match=f"^preset 'hypercloning' tiles: {text}$"):
        operator_between("hypercloning", "vit", SMALL["vit"], dataclasses.replace(SMALL["vit"], **changes))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (Form(8, 2, heads=2, mlp=12), Form(16, 2, heads=2, mlp=24), "they are 12/8 and 24/16"),
        (Form(8, 2, heads=2, mlp=16), Form(16, 2, heads=2, mlp=16), "they are 16/8 and 16/16"),
    ],
    ids=["not whole", "not kept"],
)
def test_chunks_refuse_ratios_that_are_not_whole_or_not_kept(old, new, text):
    with pytest.raises(
        ValueError, match=rf"^form\.mlp: preset 'paper-chunked' needs one whole ratio to form\.width.*{text}$"
    ):
        operator_between("paper-chunked", "vit", old, new)
    assert operator_between("paper", "vit", old, new)


@pytest.mark.parametrize("preset", ["paper", "ligo"])
@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (Form(12, 2, heads=2), Form(8, 2, heads=2), "'embed' would go from 12 to 8"),
        (Form(8, 2, heads=2, mlp=9), Form(8, 2, heads=2, mlp=7), "'mlp' would go from 9 to 7"),
    ],
    ids=["width", "mlp"],
)
def test_full_matrices_refuse_to_shrink_naming_axis_and_sizes(preset, old, new, text):
    with pytest.raises(ValueError, match=text):
        operator_between(preset, "vit", old, new)


def test_refusals_name_both_forms():
    old, new = Form(8, 3, heads=2), Form(12, 2, heads=2)
    with pytest.raises(ValueError, match=r"^growing 8x3 into 12x2: preset 'preserving' cannot drop blocks"):
        operator_of_task("preserving", Task(TaskConfig()), old, new)


def test_paper_maps_any_heads_and_any_depth_into_any_other():
    old, new = Form(8, 4, heads=4, mlp=8), Form(12, 2, heads=2, mlp=12)
    operator = operator_between("paper", "vit", old, new)
    assert operator.shapes["width.value"] == (4, 12, 8)
    assert operator.shapes["depth.mlp.fc1"] == (2, 4)


def test_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=rf"preset='exact': must be one of {', '.join(PRESETS)}$"):
        by_name("exact")
