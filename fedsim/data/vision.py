"""Images to one uint8 tensor: the same that the image processor computes which goes with an exported model.

Shape legend: N images, C channels (1 or 3), H = W = image_size.
"""

import functools
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedsim.core.limits import check_memory
from fedsim.data.config import DataConfig
from fedsim.data.table import Table


TOGETHER = 256  # images that are held, encoded and decoded, at once
# Black and white, grey, of a palette, colour and print; the others have more than 8 bits, or no agreed meaning.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
GREYS = ("1", "L", "LA")
Kind = tuple[int, int, str]  # width, height, "grey" or "colour"


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
    return stacked(arrays, (image_size, image_size, channels))


def stacked(images_HWC: Sequence[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """uint8 `(N, C, H, W)` of images with this shape, `(H, W, C)`."""
    images_NHWC = np.stack(images_HWC) if images_HWC else np.empty((0, *shape), np.uint8)
    return torch.from_numpy(np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)))


class MixedSizes(Exception):
    """Images are not all of the size of the first one."""


def column_rows(
    table: Table,
    column: str,
    image_size: int,
    channels: int,
    keep: bool,
    read: Callable[[Path], None],
    kinds: set[Kind],
) -> Iterator[np.ndarray]:
    """The images of one column of a table in order, uint8 `(h, w, C)`, decoded a few at a time by all processors.

    - `read`: is told the path of each image that lies in a file of its own.
    - `keep`: leave images as they are if the first is no larger than `image_size`; else each is resized to H = W.
    - `kinds`: receives what the images were.

    **Raises:** `ValueError` naming the file, or the row, of what is no image; `MixedSizes`.
    """

    def decoded(numbered: tuple[int, Any]) -> tuple[np.ndarray, Kind]:
        row, cell = numbered
        path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else None
        alone = path is not None and os.path.isabs(path)
        try:
            image = _opened(cell)
            colours = "grey" if image.mode in GREYS else "colour"
            return _array(image, None if keep else image_size, channels), (*image.size, colours)
        except Exception as error:  # of any kind: files can be broken in more ways than their readers foresee
            accepted = f"a column of images; {path if alone else table.where(row)}: {_reason(error)}"
            raise ValueError(f"task.data.image={column!r}: must be {accepted}") from error

    first = None
    cells = enumerate(table.encoded_images(column))
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        while some := list(itertools.islice(cells, TOGETHER)):
            for (_, cell), (array, kind) in zip(some, pool.map(decoded, some), strict=True):
                kinds.add(kind)
                if isinstance(cell, dict) and not cell.get("bytes"):
                    read(Path(cell["path"]))
                first = first or array.shape
                if array.shape != first or max(array.shape[:2]) > image_size:
                    raise MixedSizes
                yield array


def _reason(error: Exception) -> str:
    """Why something is no image, in plain words where there are any."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a kind that is read"
    if isinstance(error, OSError) and error.errno is None:
        return f"an image that is cut off or damaged ({error})"
    return str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"


def resized(pixels: Tensor, image_size: int) -> Tensor:
    """Bring images, uint8 `(N, C, h, w)` no larger than H = W, to that size on their device: bit by bit as Pillow does.

    Enlarged bilinearly, a pixel is a mean of two in each direction. Pillow's weights are whole multiples of 2^-22, and
    it rounds after each direction, the width first: in whole numbers every processor gives the same.
    """
    if pixels.shape[2:] == (image_size, image_size):
        return pixels
    some = pixels.split(4) if pixels.is_cpu else (pixels,)  # so few stay in a processor's cache
    return torch.cat([_enlarged(few, image_size) for few in some])


def _enlarged(pixels: Tensor, image_size: int) -> Tensor:
    for dim in (3, 2):
        if pixels.shape[dim] != image_size:
            sums = torch.tensor(2**21, dtype=torch.int32, device=pixels.device)
            for at, weight in _neighbours(pixels.shape[dim], image_size):
                at, weight = at.to(pixels.device), weight.to(pixels.device).view(-1, *[1] * (3 - dim))
                sums = pixels.index_select(dim, at).int().mul_(weight).add_(sums)
            pixels = sums.bitwise_right_shift_(22).to(torch.uint8)
    return pixels


@functools.lru_cache(maxsize=16)
def _neighbours(size: int, enlarged: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels that each of the enlarged ones is a mean of, and their weights times 2^22, `(enlarged,)` each."""
    assert size < enlarged, f"{size} pixels are enlarged to {enlarged}"
    centers = (np.arange(enlarged) + 0.5) * (size / enlarged)
    first = np.trunc(np.maximum(centers - 0.5, 0)).astype(np.int64)
    both = np.stack([first, np.minimum(first + 1, size - 1)])
    weights = np.maximum(1 - np.abs(both + 0.5 - centers), 0)
    weights[1, both[1] == both[0]] = 0  # at the end there is one
    whole = np.trunc(weights / weights.sum(axis=0) * 2**22 + 0.5)
    return [(torch.from_numpy(at), torch.from_numpy(weight).int()) for at, weight in zip(both, whole, strict=True)]


def floats(pixels: Tensor, config: DataConfig) -> Tensor:
    """What models get, float32 `(N, C, H, W)`: `(x / 255 - mean) / std`, without a mean `x / 127.5 - 1`."""
    pixels = pixels.to(torch.float32, copy=True)
    if not config.image_mean:
        return pixels.div_(127.5).sub_(1.0)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return pixels.div_(255.0).sub_(mean).div_(std)


def _array(image: Image.Image, image_size: int | None, channels: int) -> np.ndarray:
    """uint8 `(H, W, C)`; `image_size=None` leaves the size as it is. What is transparent lies on white, as
    `transformers` lays it."""
    if image.mode not in MODES:
        raise ValueError(f"pixels of mode {image.mode!r}; {', '.join(MODES)} are read: save it with 8 bits a channel")
    mode = "L" if channels == 1 else "RGB"
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)


@functools.cache
def formats() -> tuple[str, ...]:
    """What Pillow reads by itself: PostScript is a program, which it has another one run."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def _has_16_bits(raw: Any, format: str | None) -> bool:
    """Whether a decoder is told so: by a mode's name, such as "RGB;16B", or by the maximum that a PPM file names."""
    said = raw if isinstance(raw, tuple | list) else (raw,)
    return any(";16" in part if isinstance(part, str) else format == "PPM" and part == 65535 for part in said)


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
        if not cell:
            raise ValueError("no image: it is empty")
        with Image.open(io.BytesIO(cell), formats=formats()) as image:
            if any(_has_16_bits(raw, image.format) for *_, raw in getattr(image, "tile", ())):
                raise ValueError("16 bits a channel; 8 are read: save it with 8 bits a channel")
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image
    if isinstance(cell, list | np.ndarray):
        array = np.asarray(cell)
        shape = array.shape
        if array.dtype.kind not in "iu" or len(shape) not in (2, 3) or array.size == 0 or max(shape[2:], default=1) > 4:
            raise ValueError(f"an array of {array.dtype} with shape {shape}; whole numbers (H, W) or (H, W, C) fit")
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"values {array.min()}..{array.max()}; 0..255 is accepted")
        array = array.astype(np.uint8)
        return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    raise TypeError(f"cells of type {type(cell).__name__}")
