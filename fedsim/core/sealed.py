"""Files that show whether they are as they were written.

Each carries its seal, a hash of everything else in it: a table and a checkpoint have a place for one, which is filled
when the hash is known; a manifest has a field.
"""

import hashlib
import json
from typing import Any


MARK = b"fedsim.seal:"
UNSEALED = MARK + b"0" * 64  # what stands in a file until its seal is known
FIELD = "sha256"  # of a JSON object


class Damaged(ValueError):
    """A file is not as it was written."""


def is_damage(traceback: str) -> bool:
    """Whether an error that came as text is a `Damaged`."""
    return traceback.strip().rpartition("\n")[2].startswith(f"{Damaged.__module__}.{Damaged.__qualname__}: ")


def stamp(data: bytearray, seal: str) -> None:
    """Put a seal where `UNSEALED` stands last."""
    place = data.rfind(UNSEALED)
    assert place >= 0, "no place for a seal"
    data[place : place + len(UNSEALED)] = MARK + seal.encode()


def sealed(data: bytes | memoryview) -> tuple[bytearray, str]:
    """What is to be written, in which `UNSEALED` stands, with its seal; and the seal."""
    content = bytearray(data)
    seal = hashlib.sha256(content).hexdigest()
    stamp(content, seal)
    return content, seal


def check_sealed(data: bytes) -> str | None:
    """The seal of what `sealed` has made; None if it carries none. **Raises:** `Damaged` if it was changed."""
    place = data.rfind(MARK)
    if place < 0:
        return None
    start, end = place + len(MARK), place + len(UNSEALED)
    digest, seal = hashlib.sha256(data[:start]), data[start:end]
    digest.update(b"0" * len(seal) + data[end:])
    if digest.hexdigest().encode() != seal:
        raise Damaged("its checksum does not match what is in it")
    return seal.decode()


def sealed_json(content: dict[str, Any]) -> bytes:
    """A JSON object with its seal as one more field."""
    return json.dumps(content | {FIELD: _seal_of(content)}).encode()


def read_sealed_json(data: bytes, sealed_if: str) -> dict[str, Any]:
    """What `sealed_json` was given, or an object that has no seal and no field `sealed_if`.

    **Raises:** `Damaged` if it was changed.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(str(error)) from error
    if not isinstance(found, dict):
        raise Damaged("it holds no JSON object")
    seal = found.pop(FIELD, None)
    if seal != _seal_of(found) and (seal is not None or sealed_if in found):
        raise Damaged("its checksum does not match what is in it")
    return found


def _seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
