"""Published sizes and savings, counted from the parameters of real modules and the tensors of real operators."""

import math
from statistics import mean

import pytest
import torch

from fedgrow_algo.ligo import Operator
from fedgrow_algo.presets import by_name
from fedsim.models import Form, Inputs, get_family
from fedsim.tree import nbytes, numel


VIT = get_family("vit")
MB = 10**6


def inputs(classes):
    return Inputs("image", classes, image_size=224, channels=3, patch_size=16)


def model(form, classes):
    """Every parameter of the Hugging Face module, without memory."""
    with torch.device("meta"):
        return dict(VIT.build(form, inputs(classes)).named_parameters())


def paper(small, large, preset="paper"):
    specs = VIT.specs(small, inputs(10)), VIT.specs(large, inputs(10))
    return Operator(by_name(preset), specs[0], specs[1], small.axes, large.axes)


def trained(operator):
    """The tensors an optimizer would be given."""
    return operator.init(torch.Generator().manual_seed(0))


def size(operator):
    """As `numel(trained(operator))`, without the memory."""
    return sum(math.prod(shape) for shape in operator.shapes.values())


def percent(saved):
    return f"{100 * saved:.2f}"


def ladder(width, depth, heads=8):
    return Form(width, depth, heads=heads)


SMALLS = [ladder(256, depth) for depth in (2, 3, 4)]
MIDDLE, TARGET = ladder(320, 4), ladder(384, 6)

UPPER_SMALLS = [ladder(320, depth) for depth in (2, 3, 4)]
UPPER_MIDDLE, UPPER_TARGET = ladder(384, 4), ladder(480, 8)


# the family -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "classes", "parameters"),
    [
        (Form(192, 12, heads=3, mlp=768), 1000, 5_717_416),  # DeiT-Ti
        (Form(384, 12, heads=6, mlp=1536), 1000, 22_050_664),  # ViT-S/16
        (Form(768, 12, heads=12, mlp=3072), 1000, 86_567_656),  # ViT-B/16
        (Form(384, 12, heads=6, mlp=1536), 100, 21_704_164),
        (Form(768, 12, heads=12, mlp=3072), 100, 85_875_556),
        (TARGET, 10, 5_707_402),
        (TARGET, 100, 5_742_052),
        (TARGET, 102, 5_742_822),
        (UPPER_TARGET, 100, 11_610_820),
        (UPPER_TARGET, 102, 11_611_782),
        (ladder(816, 8), 100, 32_898_772),
    ],
    ids=lambda value: f"{value}",
)
def test_hugging_face_vits_have_the_published_number_of_parameters(form, classes, parameters):
    assert numel(model(form, classes)) == parameters


# the released ladder: 256 x {2, 3, 4} -> 320 x 4 -> 384 x 6, FFN ratio 1 ----------------------------------------------


def test_global_of_the_released_ladder_is_what_is_trained_and_sent():
    sent = trained(paper(MIDDLE, TARGET))
    assert numel(sent) == 2_089_152
    assert f"{nbytes(sent) / MB:.2f}" == "8.36"
    assert f"{nbytes(model(TARGET, 100)) / MB:.2f}" == "22.97"


def test_locals_of_the_released_ladder():
    counts = [numel(trained(paper(small, MIDDLE))) for small in SMALLS]
    assert counts == [737_344, 1_065_056, 1_392_768]
    assert mean(counts) == 1_065_056


@pytest.mark.parametrize(
    ("classes", "communication", "trainable"),
    [(10, "63.40", "44.73"), (100, "63.62", "45.07"), (102, "63.62", "45.08")],
    ids=["CIFAR-10", "CIFAR-100", "Flowers-102"],
)
def test_savings_of_the_released_ladder(classes, communication, trainable):
    target, shared = numel(model(TARGET, classes)), numel(trained(paper(MIDDLE, TARGET)))
    own = mean(numel(trained(paper(small, MIDDLE))) for small in SMALLS)
    assert percent(1 - shared / target) == communication
    assert percent(1 - (shared + own) / target) == trainable


def test_traffic_of_two_hundred_rounds_of_the_released_ladder():
    up_and_down = 2 * 200
    fedavg, fedgrow = nbytes(model(TARGET, 100)), nbytes(trained(paper(MIDDLE, TARGET)))
    assert [f"{up_and_down * sent / 10**9:.3f}" for sent in (fedavg, fedgrow)] == ["9.187", "3.343"]


# the ladder one step up: 320 x {2, 3, 4} -> 384 x 4 -> 480 x 8 --------------------------------------------------------


@pytest.mark.parametrize("classes", [100, 102])
def test_savings_of_the_ladder_one_step_up(classes):
    target, shared = numel(model(UPPER_TARGET, classes)), numel(trained(paper(UPPER_MIDDLE, UPPER_TARGET)))
    own = mean(numel(trained(paper(small, UPPER_MIDDLE))) for small in UPPER_SMALLS)
    assert percent(1 - shared / target) == "73.01"
    assert percent(1 - (shared + own) / target) == "59.25"


# FFN ratio 4: one rectangular map for the whole inner width -----------------------------------------------------------


def deit(width, depth):
    return Form(width, depth, heads=width // 64, mlp=4 * width)


TO_S = [deit(128, 6), deit(192, 6), deit(192, 12)], deit(384, 12)
TO_B = [deit(192, 12), deit(384, 6), deit(384, 12)], deit(768, 12)


@pytest.mark.parametrize(
    ("ends", "middle", "shared_m", "own_m", "communication", "trainable"),
    [
        (TO_S, (192, 3), "4.28", "5.17", "80.30", "56.48"),
        (TO_S, (192, 4), "5.68", "5.17", "73.84", "50.02"),
        (TO_S, (256, 3), "5.70", "6.89", "73.73", "41.97"),
        (TO_S, (256, 6), "11.31", "6.89", "47.91", "16.15"),
        (TO_S, (320, 6), "14.13", "8.62", "34.89", "-4.81"),
        (TO_B, (384, 3), "17.11", "22.54", "80.08", "53.84"),
        (TO_B, (384, 4), "22.71", "22.54", "73.56", "47.31"),
        (TO_B, (512, 4), "30.28", "30.05", "64.74", "29.75"),
        (TO_B, (640, 6), "56.53", "37.56", "34.18", "-9.56"),
    ],
    ids=str,
)
def test_savings_with_a_rectangular_ffn_map(ends, middle, shared_m, own_m, communication, trainable):
    smalls, target_form = ends
    middle = deit(*middle)
    target, shared = numel(model(target_form, 100)), size(paper(middle, target_form))
    own = mean(size(paper(small, middle)) for small in smalls)
    assert [f"{count / 10**6:.2f}" for count in (shared, own)] == [shared_m, own_m]
    assert [percent(1 - shared / target), percent(1 - (shared + own) / target)] == [communication, trainable]


# closed forms, and nothing left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("small", "large"), [(SMALLS[0], MIDDLE), (MIDDLE, TARGET), (deit(128, 6), deit(192, 4))])
def test_counts_are_the_closed_forms(small, large):
    D1, D2, F1, F2, L1, L2 = small.width, large.width, small.inner, large.inner, small.depth, large.depth
    tables = 8 * L1 * L2
    assert size(paper(small, large)) == (1 + 3 * L1) * D1 * D2 + L1 * F1 * F2 + tables
    if (L2, large.heads) >= (L1, small.heads):
        assert size(paper(small, large, "preserving")) == (2 + 3 * L2) * D1 * D2 + L2 * F1 * F2 + tables


def test_sizes_of_shapes_are_sizes_of_tensors():
    operator = paper(ladder(32, 2), ladder(48, 3))
    assert size(operator) == numel(trained(operator))


def test_global_grows_every_parameter_of_the_target():
    operator = paper(MIDDLE, TARGET)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in operator.shapes.items()}
    grown, target = operator(tensors, model(MIDDLE, 10)), model(TARGET, 10)
    assert {name: t.shape for name, t in grown.items()} == {name: p.shape for name, p in target.items()}
    assert numel(grown) == 5_707_402
