"""How a checkpoint's data were prepared, by the files that come with it, beside how an experiment does it."""

import math
from collections.abc import Mapping
from typing import Any

from fedsim.data import bpe
from fedsim.data.config import DataConfig
from fedsim.data.text import BYTE_END, pretrained_tokenizer


IMAGES = "preprocessor_config.json"
FIELDS = ("image_mean", "image_std")  # what a `DataConfig` can say as well
PROBE = "Any text will do: 0123456789 ÄÖÜ naïve 東京"  # some of it one byte a letter, some two or three

BILINEAR = 2  # Pillow's number for how images are resized here


def differing(held: Mapping[str, Any], data: DataConfig) -> dict[str, tuple[Any, Any]]:
    """What is otherwise there and here, by name: both values. What the file leaves out is as ViT's processor has it."""
    found: dict[str, tuple[Any, Any]] = {}
    # Whatever a processor multiplies pixels with first, it can be said of pixels of 0..1.
    factor = 255 * held.get("rescale_factor", 1 / 255) if held.get("do_rescale", True) else 255
    for name, without in zip(FIELDS, (0.0, 1.0), strict=True):
        value = held.get(name, 0.5) if held.get("do_normalize", True) else without
        theirs = tuple(each / factor for each in (value if isinstance(value, list) else [value] * data.channels))
        ours = getattr(data, name) or (0.5,) * data.channels
        if len(theirs) != len(ours) or not all(map(_close, theirs, ours)):
            found[name] = theirs, getattr(data, name)
    if held.get("do_resize", True):
        size = held.get("size", data.image_size)
        sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
        if sides != {data.image_size}:
            found["size"] = size, {"height": data.image_size, "width": data.image_size}
        if held.get("resample", BILINEAR) != BILINEAR:
            found["resample"] = held["resample"], BILINEAR
    if held.get("do_center_crop", False):
        found["do_center_crop"] = True, False
    return found


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, abs_tol=1e-6)


def token_difference(tokenizer: str, hub: bool, held: Any) -> str | None:
    """How the tokens of `task.data.tokenizer` are not those of a checkpoint's tokenizer; None if they are the same."""
    if tokenizer == "bytes":
        ids, expected = held(PROBE, add_special_tokens=False)["input_ids"], list(PROBE.encode())
        return None if ids in (expected, [*expected, BYTE_END]) else ""  # some close a text before special tokens
    if bpe.parsed(tokenizer) is not None:
        return ""
    ours, theirs = pretrained_tokenizer(tokenizer, hub).get_vocab(), held.get_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            return f": the id of {token!r} is {theirs.get(token)} there and {ours.get(token)} here"
    return None
