"""Images in a table's column to one uint8 tensor.

Shape legend: N images, C channels (1 or 3), H = W = image_size.
"""

import io
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fedsim.core.memory import check_memory


def pixels(images: Iterable[Any], image_size: int, channels: int) -> Tensor:
    """Bring images to one size and number of channels.

    **Arguments:**

    - `images`: PIL images, encoded bytes, `{"bytes", "path"}` dicts, or arrays and nested lists of 0..255 in
        `(H, W)` or `(H, W, C)`. Other sizes are resized bilinearly.

    **Returns:** uint8 `(N, C, H, W)`.
    """
    mode = "L" if channels == 1 else "RGB"
    arrays = []
    if isinstance(images, Sized):
        check_memory("task.data.image_size", image_size, len(images) * channels * image_size**2)
    for cell in images:
        image = _opened(cell)
        if image.mode != mode:
            image = image.convert(mode)
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels))
    if not arrays:
        return torch.empty((0, channels, image_size, image_size), dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2)))


def column_pixels(table: Any, column: str, image_size: int, channels: int) -> Tensor:
    """The images of one column of a `datasets.Dataset`, decoded a batch at a time.

    **Returns:** uint8 `(N, C, H, W)`.
    """
    check_memory("task.data.image_size", image_size, len(table) * channels * image_size**2)
    cells = (cell for batch in table.select_columns([column]).iter(batch_size=256) for cell in batch[column])
    try:
        return pixels(cells, image_size, channels)
    except (TypeError, ValueError, UnidentifiedImageError) as error:
        raise ValueError(f"task.data.image={column!r}: a cell of this column is not an image ({error})") from error


def _opened(cell: Any) -> Image.Image:
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            with Image.open(cell) as image:
                image.load()
                return image
    if isinstance(cell, bytes):
        with Image.open(io.BytesIO(cell)) as image:
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
