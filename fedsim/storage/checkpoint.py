"""Versions of a tree on disk: safetensors files that are complete or absent, never half written."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from fedsim.core.sealed import MARK, UNSEALED, Damaged, stamp
from fedsim.core.tree import State, Tree, flat, nested, ordered, sha256, sha256_of_text
from fedsim.storage.place import AT_ONCE, Place, Remote, fetched, place, write_atomically


SEAL = "seal"  # in the metadata of a file: hash of its tensors, the rest of its metadata, and its name


class Version(NamedTuple):
    """A version as it was saved. - `sha256`: of its state, as `fedsim.core.tree.sha256` gives it."""

    number: int
    state: State
    metadata: dict[str, str]
    sha256: str


class Versions:
    """The versions of one tree: `<folder>/<name>.<version>.safetensors`; a version is the round it was made in.

    Saving version r keeps r and the newest before it, so round r can be repeated from what stood when it began; or all
    of them. Each file carries its seal, and is not used if that does not match.
    """

    def __init__(self, folder: str | Place, name: str, all_kept: bool = False) -> None:
        self.place, self.name = str(folder), name  # as text: there may be thousands, most of which hold nothing
        self.all_kept = all_kept

    @property
    def folder(self) -> Place:
        return place(self.place)

    def path(self, version: int) -> Place:
        return self.folder / f"{self.name}.{version}.safetensors"

    def stored(self) -> list[int]:
        """Versions on disk, oldest first."""
        try:  # of a path as text: a participant that was never called must cost nothing
            names = None if "://" in self.place else os.listdir(self.place)
        except FileNotFoundError:
            return []
        if names is None:
            folder = self.folder
            assert isinstance(folder, Remote)
            names = [file.name for file, _ in folder.files(deep=False)]
        pattern = re.compile(re.escape(self.name) + r"\.(\d+)\.safetensors")
        return sorted(int(match.group(1)) for match in map(pattern.fullmatch, names) if match)

    def save(self, version: int, state: State, metadata: Mapping[str, str] | None = None) -> str:
        """Write a version, then delete those nobody can ask for any more. **Returns:** hash of the state.

        The file's folder is made; what that lies in must be there: a run whose folder was moved makes no other.
        """
        path, about = self.path(version), dict(metadata or {})
        tensors = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in flat(state).items()})
        with ThreadPoolExecutor(1) as pool:  # one waits for the disk, the other computes
            hashed = pool.submit(sha256, state)
            if isinstance(path, Remote):
                seal = MARK.decode() + self._seal(version, hashed.result(), about)
                write_atomically(path, save(tensors, about | {SEAL: seal}))
            else:
                unsealed = about | {SEAL: UNSEALED.decode()}
                _save_file(path, tensors, unsealed, lambda: self._seal(version, hashed.result(), about))
        for old in [] if self.all_kept else [v for v in self.stored() if v < version][:-1]:
            self.path(old).unlink(missing_ok=True)
        return hashed.result()

    def load(self, before: int, sealed: bool = True) -> Version | None:
        """The newest version older than `before`; None if there is none.

        - `sealed`: whether each file must carry a seal; those of earlier versions of fedsim do not.

        **Raises:** `Damaged` naming a file that cannot be read, or is not as it was written.
        """
        versions = [version for version in self.stored() if version < before]
        if not versions:
            return None
        path = self.path(versions[-1])
        with fetched(path) as here:
            try:
                with safe_open(here, framework="pt") as file:
                    # Copies: mapped memory is not aligned, and aligned vector code may round differently.
                    tree = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
                    metadata = dict(file.metadata() or {})
                state = ordered(nested(tree))
                digest, seal = sha256(state), metadata.pop(SEAL, None)
                if (sealed or seal is not None) and seal != MARK.decode() + self._seal(versions[-1], digest, metadata):
                    raise Damaged("its checksum does not match what is in it")
            except Exception as error:  # whatever a reader makes of a header that was changed
                raise Damaged(f"{path}: not a readable checkpoint (cut off or damaged): {error}") from error
        return Version(versions[-1], state, metadata, digest)

    def _seal(self, version: int, digest: str, metadata: Mapping[str, str]) -> str:
        return sha256_of_text(json.dumps([self.name, version, digest, dict(metadata)], sort_keys=True))


def _apart(tree: Tree) -> Tree:
    """The same tensors, none of which shares memory with another: two parts of a state may be one."""
    seen, found = set[int](), {}
    for name, tensor in tree.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _save_file(path: Path, tensors: Tree, metadata: dict[str, str], seal: Callable[[], str]) -> None:
    """Straight to disk: the file is not made in memory first. - `seal`: what is put in place of `UNSEALED`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            header = bytearray(file.read(int.from_bytes(file.read(8), "little")))
            stamp(header, seal())
            file.seek(8)
            file.write(header)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"could not write {path}: {error}") from error


def private_of(folder: str | Place, participant: int, all_kept: bool = False) -> Versions:
    """A participant's private state, in a folder of its own: saving lists a folder, and there may be thousands."""
    return Versions(f"{folder}/{participant}", "state", all_kept)


RECEIVED, SENT = "received", "sent"  # parts of what is kept of an exchange


def exchanges_of(folder: str | Place, participant: int) -> Versions:
    """What a participant received and sent, by round, beside its private state: only runs that are to be audited keep
    it."""
    return Versions(f"{folder}/{participant}", "exchange", all_kept=True)


def state_sha256(server: str, private: Mapping[int, str]) -> str:
    """Hash of a federation: of the server's state and, in order of id, of each participant's private state."""
    of_participants = ";".join(f"{id_}:{private[id_]}" for id_ in sorted(private))
    return sha256_of_text(f"{server}|{of_participants}")


def check_states(folder: Place, last: int, expected: str) -> None:
    """Compare what a run's folder holds of round `last` with the `state_sha256` that its row has: all of it is read.

    **Raises:** `Damaged` naming the file that is missing, or not as it was written.
    """
    server = Versions(folder, "server")
    found = server.load(last + 1)
    if found is None or found.number != last:
        raise Damaged(f"{server.path(last)}: is missing")
    private = {int(id_): digest for id_, digest in json.loads(found.metadata["private"]).items()}
    if state_sha256(found.sha256, private) != expected:
        raise Damaged(f"{server.path(last)}: is not the state of round {last}")

    def check(id_: int) -> None:
        versions = private_of(folder / "private", id_)
        found = versions.load(last + 1)
        if (sha256({}) if found is None else found.sha256) != private[id_]:
            raise Damaged(f"{versions.folder}: the private state of participant {id_} after round {last} is missing")

    with ThreadPoolExecutor(AT_ONCE if isinstance(folder, Remote) else 1) as pool:
        list(pool.map(check, sorted(private)))
