"""Manifests as a run would have written them, had it stood elsewhere."""

import json
from pathlib import Path
from typing import Any

from fedsim.core.sealed import FIELD, sealed_json


def rewrite(path: Path, **fields: Any) -> None:
    """Change fields of a manifest, and seal it."""
    content = json.loads(path.read_text())
    del content[FIELD]
    path.write_bytes(sealed_json(content | fields))
