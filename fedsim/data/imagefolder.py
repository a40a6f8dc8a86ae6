"""Folders of images: FOLDER/CLASS/IMAGE, a folder a split, exactly so deep.

The classes are the names of the folders, sorted as their bytes are. Images that lie in no class, folders in a class,
classes without images and files that are no images are refused by their path. Hidden files, and what systems and
archives leave behind, are not looked at. Links are followed; as the depth is fixed, none can lead in a circle.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from PIL import Image

from fedsim.core.fields import refuse
from fedsim.data import splits
from fedsim.data.config import DataConfig
from fedsim.data.vision import formats


if TYPE_CHECKING:
    import datasets

LITTER = re.compile(r"\..*|__MACOSX|Thumbs\.db|desktop\.ini", re.IGNORECASE)
NOTICES = re.compile(r"(readme|licen[cs]e).*", re.IGNORECASE)


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, in order of name, without what is hidden or litter."""
    return sorted(path for path in folder.iterdir() if not LITTER.fullmatch(path.name))


def rows(folder: Path, config: DataConfig) -> "datasets.Dataset":
    """One row an image, in the order of their paths: its file, not yet read, and its class, which carries its name."""
    import datasets

    found: list[tuple[str, str]] = []
    classes = []
    for class_folder in visible(folder):
        if not class_folder.is_dir():
            if not NOTICES.fullmatch(class_folder.name):
                hint = f" ({splits.AS_CLASSES})" if splits.present([folder.name], config) else ""
                _refused(config, f"folders of classes in {folder}; {class_folder} lies in no class{hint}")
            continue
        classes.append(class_folder.name)
        images = visible(class_folder)
        if not images:
            _refused(config, f"classes with images; {class_folder} holds none")
        for path in images:
            if path.is_dir():
                known = f"task.data.train_split={config.train_split!r}, test_split={config.test_split!r}"
                _refused(config, f"SPLIT/CLASS/IMAGE ({known}) or CLASS/IMAGE; {path} is a folder in a class")
            if not is_image(path):
                gone = "a link to what is not there" if path.is_symlink() and not path.exists() else "none"
                ending = f", as the ending {path.suffix!r} says" if path.is_file() else ""
                _refused(config, f"images alone in the folders of classes; {path} is {gone}{ending}")
            found.append((str(path.absolute()), class_folder.name))
    if not classes:
        _refused(config, f"folders of classes; {folder} holds none")
    found.sort()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    columns = {"image": [path for path, _ in found], "label": [name for _, name in found]}
    return datasets.Dataset.from_dict(columns, features=features)


def is_image(path: Path) -> bool:
    """Whether a path is a file whose name ends as those do that are read."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return path.is_file() and (kind in formats() or kind == "MPO")  # which the reader of JPEG reads


def _refused(config: DataConfig, accepted: str) -> NoReturn:
    refuse("task.data.name", config.name, f"an image folder with {accepted}")
