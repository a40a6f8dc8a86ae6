"""Augmentation: images that are trained on are cut, mirrored, distorted, erased and mixed by chance.

A whole batch is computed at once, where it lies; every image has draws of its own. They are made on the CPU, from the
generator that is given and nothing else: the same bits wherever a participant is computed, whoever is trained with it.

    crop, flip, RandAugment, erasing     of one image
    mixup or CutMix                      of two, and of their labels: shares of classes that add up to 1

Shape legend: B images, C channels (1 or 3), H = W pixels; everything is uint8 in 0..255.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.core.fields import check_range, check_types, refuse
from fedsim.learning.randaugment import randaugmented


TRIES = 10  # rectangles that are drawn for one that fits
STRONGEST = 30.0  # the magnitude at which RandAugment's operations are at full strength
GREY = 128  # what is erased


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to images in training, in this order. Left out, a part does nothing.

    - `crop`: the smallest and the largest share of the image's area that is cut out and resized to the whole, as
      `(0.08, 1.0)`. - `crop_ratio`: of its width to its height.
    - `flip`: the probability that an image is mirrored, left to right.
    - `randaugment`: how many operations each image goes through (`fedsim.learning.randaugment`).
      - `magnitude`: how strong they are, from 0 to 30.
    - `erase`: the probability that a rectangle of an image becomes grey. - `erase_area`, `erase_ratio`: as of a crop.
    - `mixup`: a, where the share of the first of two images is drawn from Beta(a, a); 0: images are not mixed.
    - `cutmix`: the same, where a rectangle of the second covers the first. With both, each batch draws one of them.
    """

    crop: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    randaugment: int = 0
    magnitude: float = 9.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "task.augmentation")
        check_range(self, "task.augmentation", "flip", "erase", least=0, most=1)
        check_range(self, "task.augmentation", "randaugment", least=0, most=100)
        check_range(self, "task.augmentation", "magnitude", least=0, most=STRONGEST)
        check_range(self, "task.augmentation", "mixup", "cutmix", least=0)
        for name, most in {"crop": 1.0, "crop_ratio": 100.0, "erase_area": 1.0, "erase_ratio": 100.0}.items():
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                accepted = f"the smallest and the largest, above 0 and at most {most:g}"
                refuse(f"task.augmentation.{name}", (low, high), accepted)


def augmented(
    batch: dict[str, Tensor], classes: int, asked: Augmentation, generator: torch.Generator
) -> dict[str, Tensor]:
    """The images and labels of a batch, augmented.

    **Arguments:**

    - `batch`: `pixel_values`, uint8 `(B, C, H, W)`; `labels`, `(B,)`.
    - `generator`: on the CPU.

    **Returns:** the same; where images are mixed, labels are float32 `(B, classes)`.
    """
    pixels, labels = batch["pixel_values"], batch["labels"]
    if asked.crop != (1.0, 1.0):
        windows = windows_of(pixels, asked.crop, asked.crop_ratio, generator)[0]
        pixels = cropped(pixels, windows)
    if asked.flip:
        pixels = torch.where(_chosen(pixels, asked.flip, generator), pixels.flip(-1), pixels)
    if asked.randaugment:
        pixels = randaugmented(pixels, asked.randaugment, asked.magnitude / STRONGEST, generator)
    if asked.erase:
        windows, fits = windows_of(pixels, asked.erase_area, asked.erase_ratio, generator)
        erased = _chosen(pixels, asked.erase, generator) & fits.to(pixels.device)[:, None, None, None]
        pixels = torch.where(erased & inside(pixels, windows), GREY, pixels)
    if asked.mixup or asked.cutmix:
        pixels, labels = mixed(pixels, F.one_hot(labels, classes).float(), asked, generator)
    return {"pixel_values": pixels, "labels": labels}


def _chosen(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Which images are, `(B, 1, 1, 1)`."""
    return (torch.rand(len(pixels), 1, 1, 1, generator=generator) < probability).to(pixels.device)


def windows_of(
    pixels: Tensor, area: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A rectangle in each image: the first of ten that lies inside. Uniform are its share of the area, the logarithm
    of its width over its height, and its place.

    **Returns:** first row, first column, height and width, whole numbers `(B, 4)`; and which images have one, `(B,)`:
    that of the others is the whole image.
    """
    side, shape = pixels.shape[-1], (len(pixels), TRIES)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    areas = side**2 * (area[0] + (area[1] - area[0]) * torch.rand(shape, generator=generator))
    ratios = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    sizes = torch.stack([(areas / ratios).sqrt(), (areas * ratios).sqrt()], dim=-1).round().clamp(min=1)
    fitting = (sizes <= side).all(-1)
    first = fitting.int().argmax(1)
    fits = fitting.any(1)
    size_B2 = torch.where(fits[:, None], sizes[torch.arange(len(first)), first], float(side))
    start_B2 = (torch.rand(len(first), 2, generator=generator) * (side - size_B2 + 1)).floor()
    return torch.cat([start_B2, size_B2], dim=1), fits


def cropped(pixels: Tensor, windows_B4: Tensor) -> Tensor:
    """Each image's rectangle, resized bilinearly to the whole."""
    side = pixels.shape[-1]
    centres = (torch.arange(side) + 0.5) / side
    start, size = windows_B4[:, :2, None], windows_B4[:, 2:, None]
    inner = torch.minimum(torch.maximum(start + centres * size - 0.5, start), start + size - 1)  # (B, 2, side)
    rows, columns = ((2 * inner + 1) / side - 1).to(pixels.device).unbind(1)
    shape = (len(pixels), side, side)
    grid = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


def inside(pixels: Tensor, windows_B4: Tensor) -> Tensor:
    """Which pixels lie in their image's rectangle, `(B, 1, H, W)`."""
    places = torch.arange(pixels.shape[-1], device=pixels.device)
    top, left, height, width = windows_B4.to(pixels.device)[:, :, None].unbind(1)
    rows, columns = (places >= top) & (places < top + height), (places >= left) & (places < left + width)
    return rows[:, None, :, None] & columns[:, None, None, :]


def mixed(pixels: Tensor, shares: Tensor, asked: Augmentation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image with the one before it in the batch, whose order is drawn: mixup (Zhang et al., ICLR 2018) or CutMix
    (Yun et al., ICCV 2019).

    - `shares`: of classes, `(B, classes)`.
    """
    draw, *place = torch.rand(3, generator=generator).tolist()
    cut = draw < (0.5 if asked.mixup else 1.0) if asked.cutmix else False
    alpha = asked.cutmix if cut else asked.mixup
    own = _beta(alpha, generator)
    if cut:
        side = pixels.shape[-1]
        half, middle = int(side * math.sqrt(1 - own)) / 2, [round(side * at) for at in place]
        ends = [(max(0, round(at - half)), min(side, round(at + half))) for at in middle]
        (top, bottom), (left, right) = ends
        others, pixels = pixels.roll(1, 0), pixels.clone()
        pixels[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        own = 1 - (bottom - top) * (right - left) / side**2
    else:
        pixels = (own * pixels.float() + (1 - own) * pixels.roll(1, 0).float()).round().to(torch.uint8)
    return pixels, own * shares + (1 - own) * shares.roll(1, 0)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw from Beta(alpha, alpha), for which torch takes no generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.Generator(np.random.PCG64(seed)).beta(alpha, alpha))
