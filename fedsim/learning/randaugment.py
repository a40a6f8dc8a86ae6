"""RandAugment (Cubuk et al., NeurIPS 2020 workshops): a few operations for each image, all equally likely.

    operation      at full strength
    identity
    shear x, y     0.3 of the side; the middle of the image stays where it is
    translate x, y 150/331 of the side
    rotate         30 degrees
    brightness, color, contrast, sharpness     a factor of 0.1 or 1.9
    posterize      the last 4 of 8 bits are cleared
    solarize       every pixel is inverted, from the brightest on
    autocontrast, equalize                     of each channel

The operations and their ranges are torchvision's. What an operation does not fill is black. Each takes uint8 images
`(b, C, H, W)` and a strength in [-1, 1] for each of them, `(b,)`, and returns uint8 images.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def randaugmented(pixels_BCHW: Tensor, operations: int, strength: float, generator: torch.Generator) -> Tensor:
    """Every image after so many operations of its own, each in one direction or the other."""
    size = len(pixels_BCHW)
    for _ in range(operations):
        kind_B = torch.randint(len(OPERATIONS), (size,), generator=generator)
        strength_B = strength * (2.0 * torch.randint(2, (size,), generator=generator) - 1.0)
        pixels_BCHW = pixels_BCHW.clone()
        for kind, operation in enumerate(OPERATIONS):
            chosen_b = (kind_B == kind).nonzero()[:, 0]
            if len(chosen_b):
                there_b = chosen_b.to(pixels_BCHW.device)
                pixels_BCHW[there_b] = operation(pixels_BCHW[there_b], strength_B[chosen_b].to(pixels_BCHW.device))
    return pixels_BCHW


def identity(pixels: Tensor, strength: Tensor) -> Tensor:
    return pixels


# that move pixels -----------------------------------------------------------------------------------------------------


def shear_x(pixels: Tensor, strength: Tensor) -> Tensor:
    return warped(pixels, xy=0.3 * strength)


def shear_y(pixels: Tensor, strength: Tensor) -> Tensor:
    return warped(pixels, yx=0.3 * strength)


def translate_x(pixels: Tensor, strength: Tensor) -> Tensor:
    return warped(pixels, x=2 * 150 / 331 * strength)


def translate_y(pixels: Tensor, strength: Tensor) -> Tensor:
    return warped(pixels, y=2 * 150 / 331 * strength)


def rotate(pixels: Tensor, strength: Tensor) -> Tensor:
    angle = math.radians(30) * strength
    return warped(pixels, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def warped(
    pixels: Tensor,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """Each pixel from the nearest to `(xx X + xy Y + x, yx X + yy Y + y)`, in sides that go from -1 to 1."""
    size, (height, width) = len(pixels), pixels.shape[-2:]
    across = ((torch.arange(width, device=pixels.device) + 0.5) * 2 / width - 1).expand(size, height, width)
    down = ((torch.arange(height, device=pixels.device) + 0.5) * 2 / height - 1)[:, None].expand(size, height, width)

    def each(number: Tensor | float) -> Tensor:
        return torch.as_tensor(number, dtype=across.dtype, device=across.device).reshape(-1, 1, 1)

    grid = torch.stack(
        [each(xx) * across + each(xy) * down + each(x), each(yx) * across + each(yy) * down + each(y)], dim=-1
    )
    return F.grid_sample(pixels.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


# that move brightness -------------------------------------------------------------------------------------------------


def brightness(pixels: Tensor, strength: Tensor) -> Tensor:
    return blended(pixels, torch.zeros_like(pixels), strength)


def color(pixels: Tensor, strength: Tensor) -> Tensor:
    return blended(pixels, grey(pixels), strength)


def contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    return blended(pixels, grey(pixels).mean((1, 2, 3), keepdim=True).round(), strength)


def sharpness(pixels: Tensor, strength: Tensor) -> Tensor:
    """From or towards the weighted mean of a pixel (5) and its eight neighbours (1 each); the border stays."""
    if min(pixels.shape[-2:]) < 3:
        return pixels
    smooth = pixels.float()
    inner = F.avg_pool2d(smooth, 3, stride=1, divisor_override=1) + 4 * smooth[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = (inner / 13).round()
    return blended(pixels, smooth, strength)


def posterize(pixels: Tensor, strength: Tensor) -> Tensor:
    cleared = (4 * strength.abs()).round().long()
    return pixels & (256 - 2**cleared).to(torch.uint8)[:, None, None, None]


def solarize(pixels: Tensor, strength: Tensor) -> Tensor:
    threshold = 255 * (1 - strength.abs())[:, None, None, None]
    return torch.where(pixels >= threshold, 255 - pixels, pixels)


def autocontrast(pixels: Tensor, strength: Tensor) -> Tensor:
    """Each channel stretched to 0..255; one of a single value stays."""
    low, high = pixels.float().amin((2, 3), keepdim=True), pixels.float().amax((2, 3), keepdim=True)
    stretched = ((pixels - low) * 255 / (high - low).clamp(min=1)).round().to(torch.uint8)
    return torch.where(high > low, stretched, pixels)


def equalize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Each channel by Pillow's table, after which its values are spread evenly; one of a single value stays."""
    values = pixels.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - last) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view_as(pixels).to(torch.uint8)


def grey(pixels: Tensor) -> Tensor:
    """Luminance, `(b, 1, H, W)`."""
    if pixels.shape[1] == 1:
        return pixels.float()
    red, green, blue = pixels.float().split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round()


def blended(pixels: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """From the other image through this one, which is at factor 1, to the factor `1 + 0.9 strength`."""
    factor = (1 + 0.9 * strength)[:, None, None, None]
    return (other + factor * (pixels - other.float())).round().clamp(0, 255).to(torch.uint8)


Operation = Callable[[Tensor, Tensor], Tensor]
OPERATIONS: tuple[Operation, ...] = (
    identity,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    rotate,
    brightness,
    color,
    contrast,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
)
