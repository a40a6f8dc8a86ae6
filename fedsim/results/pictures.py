"""Images that attacks of an audit found, and the true ones: `DIR/checkpoints/<run_id>/private/pictures.safetensors`.

They show examples of participants, so they lie with what is private, and go with it (`fedsim clean`).
"""

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsim.core.sealed import Damaged
from fedsim.storage.place import Place, write_atomically


TRUE = "true"  # the attack's name of what it was to find


def name_of(round: int, attack: str, knowledge: str = "") -> str:
    """What an image is called: `3/inversion/shared`, `3/true`."""
    return "/".join(filter(None, (str(round), attack, knowledge)))


def path_of(directory: Place, run_id: str) -> Place:
    return directory / "checkpoints" / run_id / "private" / "pictures.safetensors"


def write_pictures(directory: Place, run_id: str, images: Mapping[str, np.ndarray]) -> None:
    """Keep images `(H, W, C)` of bytes, C 1 or 3, by `name_of`; without any, those of an earlier audit go."""
    path = path_of(directory, run_id)
    if images:
        write_atomically(path, save({name: np.ascontiguousarray(image) for name, image in images.items()}))
    else:
        path.unlink(missing_ok=True)


def read_pictures(directory: Place, run_id: str) -> dict[str, np.ndarray]:
    """Those of a run's last attacked round, by attack and knowledge, or `TRUE`; empty where there are none.

    **Raises:** `Damaged` naming a file that holds something else.
    """
    path = path_of(directory, run_id)
    try:
        found = load(path.read_bytes())
        last = max((int(name.partition("/")[0]) for name in found), default=0)
        images = {name.removeprefix(f"{last}/"): image for name, image in found.items() if name.startswith(f"{last}/")}
        odd = [i for i in images.values() if i.dtype != np.uint8 or i.ndim != 3 or i.shape[2] not in (1, 3)]
        if odd or (images and TRUE not in images):
            raise ValueError("they are no images with a true one")
        return images
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise Damaged(f"{path}: not readable pictures (cut off or damaged): {error}; audit the run again") from error
