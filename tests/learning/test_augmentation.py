"""Augmentation: each part by hand or against Pillow, and that its draws are the generator's alone."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from fedsim.algorithm import ClientContext
from fedsim.core.seeding import generator
from fedsim.data.dataset import Split
from fedsim.experiment import Experiment, with_settings
from fedsim.learning import augmentation
from fedsim.learning.augmentation import Augmentation, augmented, cropped, windows_of
from fedsim.learning.randaugment import (
    OPERATIONS,
    autocontrast,
    brightness,
    color,
    contrast,
    equalize,
    posterize,
    randaugmented,
    rotate,
    sharpness,
    shear_x,
    solarize,
    translate_x,
)
from fedsim.learning.task import Batch, Task, TaskConfig
from tests.support.family_rows import TEXTS
from tests.support.one_participant import CONFIG


pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = Augmentation(crop=(0.3, 1.0), flip=0.5, randaugment=2, erase=0.5, mixup=0.8, cutmix=1.0)


def images(count: int, side: int = 16, channels: int = 3) -> Tensor:
    return torch.randint(256, (count, channels, side, side), generator=generator(0, "images"), dtype=torch.uint8)


def after(asked: Augmentation, pixels: Tensor, purpose: str = "test", classes: int = 4) -> Batch:
    batch = {"pixel_values": pixels, "labels": torch.arange(len(pixels)) % classes}
    return augmented(batch, classes, asked, generator(0, purpose))


# each part ------------------------------------------------------------------------------------------------------------


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    found = after(Augmentation(), images(8))
    assert torch.equal(found["pixel_values"], images(8)) and found["labels"].tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("asked", [Augmentation(flip=1e-9), Augmentation(erase=1e-9), Augmentation(crop=(1 - 1e-9, 1))])
def test_what_practically_never_happens_changes_no_bit(asked: Augmentation) -> None:
    assert torch.equal(after(asked, images(8))["pixel_values"], images(8))


def test_a_flip_is_a_mirror() -> None:
    pixels = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    assert after(Augmentation(flip=1.0), pixels)["pixel_values"].tolist() == [[[[2, 1], [4, 3]]]]
    half = after(Augmentation(flip=0.5), images(400))["pixel_values"]
    mirrored = (half == images(400).flip(-1)).flatten(1).all(1)
    assert ((half == images(400)).flatten(1).all(1) ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_a_crop_is_its_rectangle_resized() -> None:
    pixels = images(20)
    windows, fits = windows_of(pixels, (0.1, 0.9), (3 / 4, 4 / 3), generator(0, "test"))
    assert fits.all() and len(windows.unique(dim=0)) == 20
    found = cropped(pixels, windows)
    for image, (top, left, height, width), crop in zip(pixels, windows.long().tolist(), found, strict=True):
        assert 0 <= top <= 16 - height and 0 <= left <= 16 - width
        cut = image[:, top : top + height, left : left + width].float()
        expected = F.interpolate(cut[None], (16, 16), mode="bilinear", align_corners=False)[0]
        assert (crop.float() - expected).abs().max() <= 0.51, "to rounding"


def test_the_whole_image_is_a_crop_that_changes_no_bit() -> None:
    whole = torch.tensor([0.0, 0.0, 16.0, 16.0]).expand(8, 4)
    assert torch.equal(cropped(images(8), whole), images(8))


def test_rectangles_have_the_areas_and_ratios_that_are_asked_for() -> None:
    windows, fits = windows_of(images(2000, side=64, channels=1), (0.2, 0.5), (0.5, 2.0), generator(0, "test"))
    height, width = windows[:, 2], windows[:, 3]
    areas, ratios = height * width / 64**2, width / height
    assert fits.all() and 0.19 < areas.min() < 0.22 and 0.48 < areas.max() < 0.51
    assert areas.mean() == pytest.approx(0.35, abs=0.01)
    assert 0.48 < ratios.min() < 0.55 and 1.8 < ratios.max() < 2.1
    assert ratios.log().mean() == pytest.approx(0, abs=0.03), "as often wide as high"


def test_a_rectangle_that_never_fits_is_the_whole_image_and_erases_nothing() -> None:
    windows, fits = windows_of(images(4), (1.0, 1.0), (3.0, 3.0), generator(0, "test"))
    assert not fits.any() and windows.tolist() == [[0, 0, 16, 16]] * 4
    flat = Augmentation(erase=1.0, erase_area=(1.0, 1.0), erase_ratio=(3.0, 3.0))
    assert torch.equal(after(flat, images(4))["pixel_values"], images(4))


def test_erasing_makes_one_rectangle_grey() -> None:
    pixels = torch.full((50, 3, 16, 16), 7, dtype=torch.uint8)
    found = after(Augmentation(erase=1.0, erase_area=(0.25, 0.25), erase_ratio=(1.0, 1.0)), pixels)["pixel_values"]
    erased = found == augmentation.GREY
    assert (erased | (found == 7)).all() and (erased.sum((1, 2, 3)) == 3 * 8 * 8).all(), "a quarter of 16 x 16"
    assert (erased.any(3).sum(-1) == 8).all() and (erased.any(2).sum(-1) == 8).all()
    assert len(found.unique(dim=0)) > 10, "each at a place of its own"


# RandAugment ----------------------------------------------------------------------------------------------------------


def pillow(image: Tensor, function: Callable[[Image.Image], Image.Image]) -> Tensor:
    """What Pillow makes of an RGB image `(3, H, W)`."""
    there = function(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.frombuffer(bytearray(there.tobytes()), dtype=torch.uint8).reshape(*image.shape[1:], 3).permute(2, 0, 1)


@pytest.mark.parametrize(
    "ours, strength, theirs, apart",
    [
        (brightness, 0.5, lambda image: ImageEnhance.Brightness(image).enhance(1.45), 1),
        (color, -0.5, lambda image: ImageEnhance.Color(image).enhance(0.55), 1),
        (color, 0.5, lambda image: ImageEnhance.Color(image).enhance(1.45), 2),
        (contrast, -1.0, lambda image: ImageEnhance.Contrast(image).enhance(0.1), 1),
        (contrast, 1.0, lambda image: ImageEnhance.Contrast(image).enhance(1.9), 2),
        (sharpness, 1.0, lambda image: ImageEnhance.Sharpness(image).enhance(1.9), 2),
        (sharpness, -1.0, lambda image: ImageEnhance.Sharpness(image).enhance(0.1), 1),
        (posterize, 0.5, lambda image: ImageOps.posterize(image, 6), 0),
        (solarize, 0.5, lambda image: ImageOps.solarize(image, 128), 0),
        (autocontrast, 1.0, ImageOps.autocontrast, 1),
        (equalize, 1.0, ImageOps.equalize, 0),
    ],
)
def test_colours_are_pillows(ours: Callable[..., Tensor], strength: float, theirs: Callable, apart: int) -> None:
    pixels = images(6, side=32) // 2 + 30  # neither end of the range is there
    found = ours(pixels, torch.full((6,), strength))
    expected = torch.stack([pillow(image, theirs) for image in pixels])
    assert found.dtype == torch.uint8 and not torch.equal(found, pixels)
    assert (found.int() - expected.int()).abs().max() <= apart


def test_images_of_one_colour_stay() -> None:
    flat = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    for operation in (autocontrast, equalize, contrast, color, sharpness):
        assert torch.equal(operation(flat, torch.ones(2)), flat)


def test_moves_by_hand() -> None:
    row = torch.arange(1, 9, dtype=torch.uint8).expand(1, 1, 8, 8)
    one_pixel = torch.tensor([331 / 150 / 8])
    assert translate_x(row, one_pixel)[0, 0, 0].tolist() == [2, 3, 4, 5, 6, 7, 8, 0]
    assert translate_x(row, -one_pixel)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    quarter = rotate(images(1), torch.tensor([3.0]))  # three times 30 degrees
    assert torch.equal(quarter, images(1).rot90(1, (2, 3))) or torch.equal(quarter, images(1).rot90(-1, (2, 3)))
    sheared = shear_x(row, torch.tensor([1.0]))[0, 0]  # 0.3 of 3.5 pixels at the top and at the bottom
    assert sheared[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and sheared[7].tolist() == [2, 3, 4, 5, 6, 7, 8, 0]
    assert sheared[3].tolist() == row[0, 0, 3].tolist(), "the middle stays"


def test_each_image_has_operations_of_its_own() -> None:
    same = images(1).expand(200, -1, -1, -1)
    found = randaugmented(same, 1, 0.3, generator(0, "test"))
    kinds = len(found.unique(dim=0))
    assert len(OPERATIONS) <= kinds <= 2 * len(OPERATIONS), "most in either direction"
    assert torch.equal(same, images(1).expand(200, -1, -1, -1)), "what is given stays"


@pytest.mark.parametrize("channels, side", [(1, 8), (3, 8), (3, 2), (1, 1)])
def test_images_of_any_size_and_colour(channels: int, side: int) -> None:
    found = after(EVERYTHING, images(64, side, channels))
    assert found["pixel_values"].shape == (64, channels, side, side) and found["pixel_values"].dtype == torch.uint8


# mixing ---------------------------------------------------------------------------------------------------------------


def test_mixup_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "_beta", lambda *_: 0.75)
    pixels = torch.tensor([0, 100, 200], dtype=torch.uint8).reshape(3, 1, 1, 1)
    found = after(Augmentation(mixup=1.0), pixels, classes=3)
    assert found["pixel_values"].flatten().tolist() == [50, 75, 175]
    assert found["labels"].tolist() == [[0.75, 0, 0.25], [0.25, 0.75, 0], [0, 0.25, 0.75]]


def test_cutmix_shares_labels_by_area() -> None:
    values = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 16, 16)
    shares = []
    for number in range(30):
        found = after(Augmentation(cutmix=1.0), values, purpose=f"cut {number}")
        for own, image in enumerate(found["pixel_values"]):
            for seen in (own, own - 1):
                area = float((image == seen % 4).float().mean())
                assert found["labels"][own, seen] == pytest.approx(area, abs=1e-6)
        shares.append(float(found["labels"][0, 0]))
    assert len(set(shares)) > 20 and min(shares) < 0.4 and max(shares) > 0.8


@pytest.mark.parametrize("asked", [Augmentation(mixup=0.2), Augmentation(cutmix=1.0), EVERYTHING])
def test_shares_of_labels_add_up_to_one(asked: Augmentation) -> None:
    labels = after(asked, images(33))["labels"]
    assert labels.shape == (33, 4) and labels.dtype == torch.float32 and labels.min() >= 0
    torch.testing.assert_close(labels.sum(1), torch.ones(33))


def test_with_both_each_batch_draws_one() -> None:
    values = torch.tensor([0, 200], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 16, 16)
    both = Augmentation(mixup=1.0, cutmix=1.0)
    blended = 0
    for number in range(40):
        found = after(both, values, f"batch {number}")["pixel_values"]
        blended += not ((found == 0) | (found == 200)).all()
    assert 10 < blended < 30


# draws ----------------------------------------------------------------------------------------------------------------


def test_draws_are_the_generators_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = after(EVERYTHING, images(32))
    assert torch.equal(torch.get_rng_state(), before), "torch's stream is nobody's"
    torch.manual_seed(2)
    same, other = after(EVERYTHING, images(32)), after(EVERYTHING, images(32), "other")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert not torch.equal(one["labels"], other["labels"])


def test_images_stay_on_their_device() -> None:
    """A tensor without storage meets none of the CPU's: such a device is like a GPU."""
    batch = {"pixel_values": images(16).to("meta"), "labels": torch.zeros(16, dtype=torch.long, device="meta")}
    alone = Augmentation(crop=(0.3, 1.0), flip=0.5, randaugment=3, erase=0.5)
    for asked in (dataclasses.replace(alone, mixup=1.0), dataclasses.replace(alone, cutmix=1.0)):
        found = augmented(batch, 4, asked, generator(0, "test"))
        assert {tensor.device.type for tensor in found.values()} == {"meta"}


# as part of a task ----------------------------------------------------------------------------------------------------


def task_with(asked: Augmentation | None) -> Task:
    return Task(TaskConfig(CONFIG.data, patch_size=4, augmentation=asked))


def test_images_are_augmented_for_training_alone(ctx: ClientContext) -> None:
    plain, task, index = task_with(None), task_with(EVERYTHING), torch.arange(20)
    expected = plain.batch(ctx.train, index)
    for found in (task.batch(ctx.train, index), plain.batch(ctx.train, index, augment=generator(0, "a"))):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = task.batch(ctx.train, index, augment=generator(0, "a"))
    assert found["pixel_values"].dtype == torch.float32 and found["labels"].shape == (20, 10)
    assert not torch.equal(found["pixel_values"], expected["pixel_values"])
    assert found["pixel_values"].abs().max() <= 1


def test_scores_are_of_images_as_they_are(ctx: ClientContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.learning.task.augmented", lambda *_: pytest.fail("a score augments"))
    task, form = task_with(EVERYTHING), ctx.target
    model = task.module(form, task.fresh(form, 0))
    plain = task_with(None).score(model, Split(ctx.train.inputs, ctx.train.labels))
    assert task.score(model, ctx.train).loss == plain.loss


@pytest.mark.parametrize(
    "field, value",
    [
        ("crop", (0.0, 1.0)),
        ("crop", (0.5, 0.2)),
        ("crop", (0.5, 1.5)),
        ("crop_ratio", (-1.0, 1.0)),
        ("erase_area", (0.5, 2.0)),
        ("flip", 1.5),
        ("erase", -0.1),
        ("randaugment", -1),
        ("randaugment", 1.5),
        ("magnitude", 31.0),
        ("mixup", -1.0),
        ("cutmix", float("inf")),
        ("crop", 0.5),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"task.augmentation.{field}="):
        Augmentation(**{field: value})  # type: ignore[arg-type]


def test_only_images_are_augmented() -> None:
    with pytest.raises(ValueError, match=r"^task\.augmentation: must be None for data of kind 'text'"):
        TaskConfig(TEXTS, "bert", augmentation=Augmentation(flip=0.5))


def test_fields_can_be_set_by_themselves(tiny_experiment: Experiment) -> None:
    found = with_settings(tiny_experiment, ["task.augmentation.flip=0.5", "task.augmentation.crop=[0.3, 1]"])
    assert found.task.augmentation == Augmentation(flip=0.5, crop=(0.3, 1))
    with pytest.raises(ValueError, match=r"^task\.augmentation\.crop=\(0\.5,\): must be two numbers, as \[0\.08,1\]$"):
        with_settings(tiny_experiment, ["task.augmentation.crop=0.5"])
    assert with_settings(found, ["task.augmentation=none"]) == tiny_experiment
