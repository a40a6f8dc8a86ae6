"""Images to pixels: every format as the exported processor makes it, or refused by file or row."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedsim.data import vision
from fedsim.data.config import cifar10
from fedsim.data.source import DataConfig, load
from fedsim.results.export import image_processor
from tests.support.exported import picture


pytestmark = pytest.mark.usefixtures("read_again")

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
CONFIGS = {"halves": cifar10(image_size=8), "ImageNet's": cifar10(image_size=8, **IMAGENET)}
SIZES = [(8, 8), (20, 31)]


def noise(mode: str, size: tuple[int, int] = (20, 31)) -> Image.Image:
    return picture("RGBA", *size).convert(mode)


def marked(mode: str, transparent: Any, size: tuple[int, int] = (20, 31)) -> Image.Image:
    image = noise(mode, size)
    image.info["transparency"] = transparent
    return image


KINDS: dict[str, Callable[[tuple[int, int]], Image.Image]] = {
    **{mode: (lambda size, mode=mode: noise(mode, size)) for mode in vision.MODES},
    "a transparent entry of a palette": lambda size: marked("P", 3, size),
    "a palette with transparency": lambda size: picture("RGBA", *size).quantize(16),
    "a transparent colour": lambda size: marked("RGB", tuple(np.asarray(picture("RGB", *size))[0, 0].tolist()), size),
    "a transparent grey": lambda size: marked("L", 7, size),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_what_the_exported_processor_makes_of_it(kind: str, config: DataConfig) -> None:
    processor, compared = image_processor(config), 0
    for size in SIZES:
        image = KINDS[kind](size)
        for written in (None, "PNG", "TIFF", "GIF", "WEBP", "JPEG", "BMP"):
            given = image
            if written is not None:
                buffer = io.BytesIO()
                try:
                    image.save(buffer, written)
                except (OSError, ValueError):  # a format that has no such pixels
                    continue
                given = Image.open(buffer)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
                ours = vision.floats(vision.pixels([given], 8, 3), config)
                theirs = processor(given, return_tensors="pt")["pixel_values"]
            assert torch.equal(ours, theirs), (written, given.mode, size)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("size", [(16, 3), (160, 16), (54, 5), (72, 16), (5, 16), (100, 2)])
@pytest.mark.parametrize("kind", ["BMP", "DIB", "PCX", "PPM", "TIFF", "PNG"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_sixteens_that_are_no_bits_of_a_channel(mode: str, kind: str, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    try:
        noise(mode, size).save(buffer, kind)
    except (OSError, ValueError):  # a format that has no such pixels
        return
    expected = vision.pixels([Image.open(io.BytesIO(buffer.getvalue()))], 8, 3)
    assert torch.equal(vision.pixels([buffer.getvalue()], 8, 3), expected)


def test_what_is_transparent_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert vision.pixels([clear], 4, 3).unique().tolist() == [255]
    assert vision.pixels([clear], 4, 1).unique().tolist() == [255]
    assert vision.pixels([clear.convert("LA")], 4, 1).unique().tolist() == [255]
    for mode, size in (("L", 1), ("L", 3), ("P", 1)):
        whole = Image.new(mode, (4, 4), 7)
        whole.info["transparency"] = 7
        assert vision.pixels([whole], 4, size).unique().tolist() == [255], "a grey that is marked so"
    half = Image.new("LA", (4, 4), (0, 128))
    assert vision.pixels([half], 4, 1).unique().tolist() == [127]


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "LAB", "HSV", "YCbCr"])
def test_pixels_that_have_no_agreed_reading_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"pixels of mode '{mode}'; 1, L, LA, .*8 bits a channel"):
        vision.pixels([Image.new(mode, (4, 4))], 4, 3)


def encoded(image: Image.Image, written: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, written, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.png", b"", "no image: it is empty"),
        ("x.png", b"neither", "no image of a kind that is read"),
        ("x.gif", encoded(noise("L", (64, 64)), "GIF")[:1500], "an image that is cut off or damaged"),
    ],
)
def test_why_a_file_is_no_image_in_plain_words(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^task\.data\.image='image': must be .*/train/a/{name}: {why}"):
        load(DataConfig(str(tmp_path), num_classes=1), None)


def in_column(folder: Path, cells: Any, **settings: Any) -> DataConfig:
    pq.write_table(pa.table({"image": cells, "label": [0] * len(cells)}), folder / "train.parquet")
    pq.write_table(pa.table({"image": cells[:1], "label": [0]}), folder / "test.parquet")
    return DataConfig(str(folder), **{"image_size": 8, "channels": 3, "num_classes": 1, **settings})


@pytest.mark.parametrize("side", range(1, 9))
@pytest.mark.parametrize("written", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_cameras_say_wherever_they_lie(side: int, written: str, tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = side
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(written, {})
    bytes_ = encoded(picture("RGB", 16, 16), written, exif=exif, **lossless)
    for split in ("train", "test"):
        (tmp_path / "folder" / split / "a").mkdir(parents=True)
        (tmp_path / "folder" / split / "a" / f"x.{written.lower()}").write_bytes(bytes_)
    in_folder = DataConfig(str(tmp_path / "folder"), image_size=8, channels=3, num_classes=1)
    found = [load(config, None).test.inputs["pixel_values"] for config in (in_folder, in_column(tmp_path, [bytes_]))]
    upright = load_image(str(tmp_path / "folder/train/a" / f"x.{written.lower()}"))  # as pipelines read it
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], vision.pixels([upright], 8, 3))
    assert (side == 1) == torch.equal(found[0], vision.pixels([Image.open(io.BytesIO(bytes_))], 8, 3)) or side == 1


@pytest.mark.parametrize("written", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_picture_of_several_is_read(written: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    bytes_ = encoded(
        first, written, save_all=True, append_images=[second], **({"lossless": True} if written == "WEBP" else {})
    )
    assert vision.pixels([bytes_], 8, 3)[0, :, 0, 0].tolist() == [255, 0, 0]


GOOD = encoded(picture("RGB", 32, 32), "JPEG")


def png(channels: int, bits: int) -> bytes:
    """A PNG of 2 x 2 pixels with so many bits a channel, which Pillow does not write itself."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    row = b"\0" + bytes(2 * channels * bits // 8)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 2, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(2 * row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_more_than_eight_bits_are_refused_whatever_pillow_makes_of_them(channels: int, tmp_path: Path) -> None:
    for folder in ("8", "16", "ppm"):
        (tmp_path / folder).mkdir()
    assert len(load(in_column(tmp_path / "8", [png(channels, 8)] * 4), None).train)
    with pytest.raises(ValueError, match=r"row 0: (16 bits a channel|pixels of mode)"):
        load(in_column(tmp_path / "16", [png(channels, 16)] * 4), None)
    with pytest.raises(ValueError, match="row 0: 16 bits a channel"):
        load(in_column(tmp_path / "ppm", [b"P6\n2 2\n65535\n" + bytes(24)] * 4), None)


def bomb() -> bytes:
    """A picture that is small on disk and too large for memory."""
    return encoded(Image.new("1", (13400, 13400)), "PNG")


BROKEN: dict[str, Callable[[], Any]] = {
    "cut": lambda: GOOD[: len(GOOD) // 2],
    "cut in its header": lambda: GOOD[:20],
    "empty": lambda: b"",
    "no image": lambda: b"GIF89a, or so it says",
    "huge": bomb,
    "rather large": lambda: encoded(Image.new("1", (9500, 9500)), "PNG"),
    "16 bits": lambda: encoded(Image.new("I;16", (8, 8)), "PNG"),
    "missing": lambda: None,
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_images_are_named_by_file_and_by_row(how: str, tmp_path: Path) -> None:
    broken = BROKEN[how]()
    config = in_column(tmp_path, pa.array([GOOD, GOOD, broken], pa.binary()))
    with pytest.raises(ValueError, match=r"^task\.data\.image='image': must be .*train\.parquet, row 2: "):
        load(config, None)
    cells = [{"bytes": each, "path": "a.jpg"} for each in (GOOD, broken)]
    struct = in_column(tmp_path, cells)
    with pytest.raises(ValueError, match=r"^task\.data\.image='image': must be .*row 1: |a\.jpg"):
        load(struct, None)
    if broken is not None:
        for split in ("train", "test"):
            (tmp_path / "folder" / split / "a").mkdir(parents=True)
            (tmp_path / "folder" / split / "a" / "1.jpg").write_bytes(GOOD)
        (tmp_path / "folder/test/a/2.jpg").write_bytes(broken)
        folder = replace(config, name=str(tmp_path / "folder"))
        with pytest.raises(ValueError, match=r"^task\.data\.image='image': must be .*test/a/2\.jpg: "):
            load(folder, None)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (np.zeros((8, 8)).tolist(), r"row 1: an array of float64"),
        ([[0, 300], [0, 0]], r"row 1: values 0\.\.300; 0\.\.255 is accepted"),
        ([[-1, 3], [0, 0]], r"row 1: values -1\.\.3"),
        ([[True, False]], r"row 1: an array of bool"),
        (np.zeros((3, 8, 8), int).tolist(), r"row 1: an array of int64 with shape \(3, 8, 8\); whole numbers"),
        ([[]], r"row 1: an array"),
    ],
)
def test_arrays_that_are_no_pixels_are_named_by_row(cell: Any, message: str, tmp_path: Path) -> None:
    good = np.zeros_like(np.asarray(cell)).tolist()
    config = in_column(tmp_path, [good, cell])
    with pytest.raises(ValueError, match=rf"task\.data\.image='image': .*({message}|row 0: an array)"):
        load(config, None)


def test_paths_in_a_column_are_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("RGB", 8, 8).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    config = in_column(tmp_path, [{"bytes": None, "path": str(tmp_path / "a.png")}] * 2)
    assert len(load(config, None).train) == 2
    config = in_column(tmp_path, [{"bytes": None, "path": "a.png"}] * 2)
    with pytest.raises(
        ValueError,
        match=r"task\.data\.image='image': must be a column of images; .*train\.parquet, row 0: .*'a\.png'; .*absolute",
    ):
        load(config, None)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"image_mean": (0.5,)}, "image_mean"),
        ({"image_mean": (0.5, 0.5, 0.5)}, "image_std"),
        ({"image_std": (0.5, 0.5, 0.5)}, "image_mean"),
        ({**IMAGENET, "image_std": (0.2, 0.0, 0.2)}, "image_std"),
        ({**IMAGENET, "image_mean": (0.2, float("inf"), 0.2)}, "image_mean"),
        ({**IMAGENET, "channels": 1}, "image_mean"),
        ({**IMAGENET, "name": "a.csv", "text": ("t",)}, "image_mean"),
    ],
)
def test_means_and_deviations_that_are_none(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^task\.data\.{field}=\(.*task\.data\.channels=\d"):
        cifar10(**settings)
