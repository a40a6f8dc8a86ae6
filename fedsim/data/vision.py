"""Images to one uint8 tensor: the same that the image processor computes which goes with an exported model.

Shape legend: N images, C channels (1 or 3), H = W = image_size.
"""

import functools
import io
import os
import warnings
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedsim.core.limits import check_memory
from fedsim.data.config import DataConfig
from fedsim.data.table import Table


# Black and white, grey, of a palette, colour and print; the others have more than 8 bits, or no agreed meaning.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


def pixels(images: Iterable[Any], image_size: int, channels: int) -> Tensor:
    """Bring images to one size and number of channels.

    **Arguments:**

    - `images`: PIL images, encoded bytes, `{"bytes", "path"}` dicts, or arrays and nested lists of 0..255 in
        `(H, W)` or `(H, W, C)`. Other sizes are resized bilinearly.

    **Returns:** uint8 `(N, C, H, W)`.
    """
    if isinstance(images, Sized):
        check_memory("task.data.image_size", image_size, len(images) * channels * image_size**2)
    arrays = [_array(_opened(cell), image_size, channels) for cell in images]
    if not arrays:
        return torch.empty((0, channels, image_size, image_size), dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2)))


def column_pixels(table: Table, column: str, image_size: int, channels: int) -> Tensor:
    """The images of one column of a table, decoded a batch at a time.

    **Returns:** uint8 `(N, C, H, W)`. **Raises:** `ValueError` naming the file, or the row, of what is no image.
    """
    check_memory("task.data.image_size", image_size, len(table) * channels * image_size**2)
    reading: list[Any] = []  # the one that is being decoded

    def cells() -> Iterable[Any]:
        for row, cell in enumerate(table.encoded_images(column)):
            reading[:] = row, cell
            yield cell

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return pixels(cells(), image_size, channels)
        except Exception as error:  # of any kind: files can be broken in more ways than their readers foresee
            if not reading:
                raise
            row, cell = reading
            path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else None
            reason = "no image" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
            accepted = f"a column of images; {path or table.where(row)}: {reason}"
            raise ValueError(f"task.data.image={column!r}: must be {accepted}") from error


def floats(pixels: Tensor, config: DataConfig) -> Tensor:
    """What models get, float32 `(N, C, H, W)`: `(x / 255 - mean) / std`, without a mean `x / 127.5 - 1`."""
    pixels = pixels.to(torch.float32)
    if not config.image_mean:
        return pixels.div(127.5).sub(1.0)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return pixels.div(255.0).sub(mean).div(std)


def _array(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """uint8 `(H, W, C)`. What is transparent lies on white, as `transformers` lays it."""
    if image.mode not in MODES:
        raise ValueError(f"pixels of mode {image.mode!r}; {', '.join(MODES)} are read: save it with 8 bits a channel")
    mode = "L" if channels == 1 else "RGB"
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and not image.mode == mode == "L":  # what is grey already, no processor looks at twice
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels)


@functools.cache
def formats() -> tuple[str, ...]:
    """What Pillow reads by itself: PostScript is a program, which it has another one run."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def _opened(cell: Any) -> Image.Image:
    """An image the way up that its camera says, the first of several."""
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            if not os.path.isabs(cell):
                raise ValueError(f"the path {cell!r}; bytes, or an absolute path, are read")
            cell = Path(cell).read_bytes()
    if isinstance(cell, bytes):
        with Image.open(io.BytesIO(cell), formats=formats()) as image:
            if any("16" in str(raw) or "65535" in str(raw) for *_, raw in getattr(image, "tile", ())):
                raise ValueError("16 bits a channel; 8 are read: save it with 8 bits a channel")
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image
    if isinstance(cell, list | np.ndarray):
        array = np.asarray(cell)
        if array.dtype.kind not in "iu" or array.ndim not in (2, 3) or array.size == 0:
            raise ValueError(f"an array of {array.dtype} with shape {array.shape}; integers in 2 or 3 dimensions fit")
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"values {array.min()}..{array.max()}; 0..255 is accepted")
        array = array.astype(np.uint8)
        return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    raise TypeError(f"cells of type {type(cell).__name__}")
