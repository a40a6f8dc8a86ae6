"""Pretrained small models: a folder that `transformers` saved, or a name on the hub."""

import dataclasses

from fedsim.fields import check_types, refuse


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a pretrained model lies.

    - `path`: a folder, or a hub name (with `hub`).
    - `hub`: whether a name may be fetched from the hub; a folder never needs it.
    - `revision`: the hub's branch, tag or commit.
    """

    path: str
    hub: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "checkpoint")
        if not self.path:
            refuse("checkpoint.path", self.path, "a folder, or a hub name together with checkpoint.hub=true")
