"""One run's place in a results folder: rows, checkpoints, and the manifest that says which round was finished last.

DIR/runs | rounds | clients/<run_id>.parquet
DIR/checkpoints/<run_id>/manifest.json       written last: what it does not vouch for never happened
DIR/checkpoints/<run_id>/server.<r>.safetensors
DIR/checkpoints/<run_id>/private/<participant>/state.<r>.safetensors
DIR/checkpoints/<run_id>/tokenizer/          where one was trained for the run
DIR/outdated/<run_id>.<n>/                   what was computed by other sources, or from other data: all of the above
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedsim.core.numerics import NATIVE
from fedsim.core.sealed import Damaged, sealed_json
from fedsim.engine.content import Content
from fedsim.results import manifest as manifests
from fedsim.results import tables as results
from fedsim.results.machine import cpu_model
from fedsim.results.records import Row
from fedsim.storage.checkpoint import check_states
from fedsim.storage.locking import Lock, check_held, lock_of
from fedsim.storage.place import Place, delete, move, sent, size_of, write_atomically


if TYPE_CHECKING:  # importing it takes long, and hosts make no frames
    import pandas as pd


TOKENIZER = "tokenizer"  # the folder's name


class RunStore:
    """Reads and writes what belongs to one run.

    - `content`: what the run reads; None: not looked at.
    - `classes`: what the classes of its data are called, in order, for whoever exports a model of it.
    """

    def __init__(self, directory: Place, run_id: str, code_sha256: str, content: Content | None = None) -> None:
        self.directory, self.run_id, self.code_sha256, self.content = directory, run_id, code_sha256, content
        self.folder = directory / "checkpoints" / run_id
        self.private = self.folder / "private"
        self.rounds: list[Row] = []
        self.clients = results.arrow_of("clients", run_id, [])  # of every round so far: converted once
        self.profile = results.arrow_of("profile", run_id, [])
        self.last: int | None = None
        self.config: str | None = None  # the experiment's canonical JSON
        self.numerics: list[dict[str, Any]] = []  # of the rounds, oldest first: more than one if resumed elsewhere
        self.classes: Sequence[str] = ()
        self.files: dict[str, str] = {}  # seals and hashes, as the manifest has them
        self.lock: Lock = None  # the folder's, when it was opened
        self.damage: str | None = None  # why the last finished round is computed once more

    @property
    def wall_seconds(self) -> float:
        return sum(row["wall_seconds"] for row in self.rounds)

    def status(self) -> str:
        """`finished`, `unfinished`, `absent`, or `outdated`: `outdated_by` says by what."""
        row, manifest = self._run_row(), self._manifest()
        if not _finished(row) and manifest is None:
            return "absent"
        return "outdated" if self._outdated_by(row, manifest) else "finished" if _finished(row) else "unfinished"

    def outdated_by(self) -> str | None:
        """What has changed since the run was computed, so that it is to be computed again: sources; if it has finished,
        also what it has read, with both hashes. None: nothing."""
        return self._outdated_by(self._run_row(), self._manifest())

    def content_read(self) -> Content:
        """What the run has read, as far as it is known."""
        return _content(self._run_row(), self._manifest())

    def check_content(self) -> None:
        """**Raises:** `ValueError` if what the finished rounds have read has changed, so that none may follow them."""
        if change := self._content_change():
            raise ValueError(f"{change}; bring back what rounds up to {self.last} have read, or give another folder")

    def check_numerics(self, numerics: Mapping[str, Any], anywhere: bool = False) -> None:
        """**Raises:** `ValueError` if what is finished of the run has other bits than `numerics` would give here."""
        manifest = self._manifest()
        if manifest is None or anywhere:
            return
        now, before = _bits(numerics), manifest["numerics"][-1]
        if before["name"] != now["name"] or (now["name"] == NATIVE and before["cpu"] != now["cpu"]):
            different = (
                f"{before['name']} numerics on {before['cpu']}; here they would be {now['name']} on {now['cpu']}"
            )
        elif None not in (now["fingerprint"], before["fingerprint"]) and before["fingerprint"] != now["fingerprint"]:
            different = (
                f"{before['name']} numerics with bits {before['fingerprint']}; here they are {now['fingerprint']}"
            )
        else:
            return
        raise ValueError(
            f"run {self.run_id}: rounds up to {manifest['round']} were computed with {different}: go on as it began, "
            "or with --resume-anywhere (resume_anywhere=True) if the bits of the rounds to come do not matter"
        )

    def finished_with(self) -> str:
        """The numerics of a finished run; `native` where its row does not say."""
        row = self._run_row()
        assert row is not None
        return json.loads(row["hardware"]).get("numerics", {}).get("name", NATIVE)

    def open(self, resume: bool, numerics: Mapping[str, Any]) -> int:
        """Prepare to compute; the number of the first round to do. Without `resume` what was there is moved aside.

        Every state is read and compared with its hash. Where one of the last finished round is damaged, that round is
        computed once more, from the one before it; `damage` says why.

        - `numerics`: what the rounds to come are computed with.

        **Raises:** `ValueError` naming a file that is missing, or not as it was written.
        """
        self.lock = lock_of(self.directory)
        manifest = self._manifest() if resume else None
        if manifest is None:
            self._move_aside()
            self.private.mkdir(parents=True, exist_ok=True)
            self.numerics = [_bits(numerics)]
            return 0
        before = manifest["numerics"]
        self.numerics = before if before[-1] == _bits(numerics) else [*before, _bits(numerics)]
        last = int(manifest["round"])
        self.rounds = self._rows("rounds", last)
        if [row["round"] for row in self.rounds] != list(range(last + 1)):
            raise self._damaged(f"{self.directory}/rounds/{self.run_id}.parquet: rows of finished rounds are missing")
        self.last = self._newest_intact(last)
        if self.last < last:
            if self.last < 0:
                self.rounds = []
                return self.open(resume=False, numerics=numerics)
            self._write_manifest(manifest | {"round": self.last})  # what is written from here on is newer than it
            self.rounds = self.rounds[: self.last + 1]
        self.clients = results.arrow_of_run(self.directory, "clients", self.run_id, self.last)
        self.profile = results.arrow_of_run(self.directory, "profile", self.run_id, self.last)
        return self.last + 1

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Keep a Hugging Face tokenizer that was trained for the run; None: there is none."""
        if tokenizer is not None:
            with sent(self.folder / TOKENIZER) as here:
                tokenizer.save_pretrained(here)
                self.files |= hashes_of_tokenizer(here, self.run_id)

    def commit(self, round: int, round_row: Row, client_columns: Mapping[str, Sequence]) -> None:
        """A round is finished: its rows, then the manifest that vouches for them."""
        check_held(self.directory, self.lock)
        self.rounds.append(round_row)
        added = results.arrow_of_columns("clients", self.run_id, client_columns)
        self.clients = pa.concat_tables([self.clients, added])
        tables = {"clients": self.clients, "rounds": results.arrow_of("rounds", self.run_id, self.rounds)}
        with ThreadPoolExecutor(len(tables)) as pool:  # most of it is waiting for the disk
            written = [pool.submit(results.replace_table, self.directory, n, self.run_id, t) for n, t in tables.items()]
        for name, each in zip(tables, written, strict=True):
            self.files[manifests.table_file(name, self.run_id)] = each.result()
        manifest = {
            "run_id": self.run_id,
            "code_sha256": self.code_sha256,
            "round": round,
            "numerics": self.numerics,
            "config": self.config,
            "content": self.content.as_json() if self.content else {},
            "classes": self.classes,
            manifests.FILES: self.files,
        }
        self._write_manifest(manifest)
        self.last = round

    def add_profile(self, rows: list[Row]) -> None:
        """Where the time of a round that is finished went."""
        check_held(self.directory, self.lock)
        self.profile = pa.concat_tables([self.profile, results.arrow_of("profile", self.run_id, rows)])
        results.replace_table(self.directory, "profile", self.run_id, self.profile)

    def finish(self, run_row: Row) -> None:
        """The run finished or failed: the row that says so."""
        check_held(self.directory, self.lock)
        results.write_table(self.directory, "runs", self.run_id, [run_row])

    # parts ----------------------------------------------------------------------------------------------------------

    def _outdated_by(self, row: Row | None, manifest: manifests.Manifest | None) -> str | None:
        if (before := manifest or row) is None:
            return None
        if before["code_sha256"] != self.code_sha256:
            return "the code has changed"
        changed = self.content.change_from(_content(row, manifest)) if self.content else None
        return changed if _finished(row) else None

    def _content_change(self) -> str | None:
        return self.content.change_from(self.content_read()) if self.content else None

    def _move_aside(self) -> None:
        """Keep what is there of the run, out of sight of whoever reads the tables; delete what no manifest names."""
        parts = {table: self.directory / table / f"{self.run_id}.parquet" for table in results.TABLES}
        if self.outdated_by() is not None:
            kept = self.directory / "outdated"
            names = [each.name.removeprefix(f"{self.run_id}.") for each in kept.glob(f"{self.run_id}.*")]
            number = 1 + max(map(int, filter(str.isdecimal, names)), default=0)
            for table, path in parts.items():
                move(path, kept / f"{self.run_id}.{number}" / path.name.replace(self.run_id, table))
            move(self.folder, kept / f"{self.run_id}.{number}" / "checkpoint")
        delete(self.folder)
        for path in parts.values():
            path.unlink(missing_ok=True)

    def _manifest(self) -> dict[str, Any] | None:
        return manifests.read(self.directory, self.run_id)

    def _write_manifest(self, manifest: manifests.Manifest) -> None:
        write_atomically(self.folder / "manifest.json", sealed_json(manifest))

    def _newest_intact(self, last: int) -> int:
        """The newest finished round whose states are all as they were written: the last, or the one before; -1: none
        need be, for it would be round 0 that is computed once more."""
        try:
            check_states(self.folder, last, self.rounds[last]["state_sha256"])
            return last
        except Damaged as damage:
            self.damage = f"{damage}: round {last} is computed once more"
            if last == 0:
                return -1
            try:
                check_states(self.folder, last - 1, self.rounds[last - 1]["state_sha256"])
                return last - 1
            except Damaged as before:
                raise self._damaged(f"{damage}; round {last} cannot be computed once more ({before})") from before

    def _damaged(self, what: str) -> Damaged:
        return manifests.damaged(what, self.directory, self.run_id)

    def _run_row(self) -> Row | None:
        rows = self._rows("runs", None)
        return rows[0] if rows else None

    def _rows(self, table: str, last: int | None) -> list[Row]:
        """This run's rows of a table, up to round `last`; rows of a round that was not finished are left out."""
        frame = results.read_run(self.directory, table, self.run_id)
        if last is not None:
            frame = frame.loc[frame["round"] <= last]
        return results.rows_of(frame, table)


def _finished(row: Row | None) -> bool:
    return row is not None and row["status"] == "finished"


def _content(row: Row | None, manifest: manifests.Manifest | None) -> Content:
    """What a run has read, as its manifest tells, or else its row."""
    if known := (manifest or {}).get("content"):
        return Content(**known)
    return Content((row or {}).get("data_sha256"), (row or {}).get("checkpoints_sha256"))


def _bits(numerics: Mapping[str, Any]) -> dict[str, Any]:
    """What decides bits, of what is in force here."""
    return {"name": numerics["name"], "cpu": cpu_model(), "fingerprint": numerics["fingerprint"]}


def hashes_of_tokenizer(folder: Path, run_id: str) -> dict[str, str]:
    """SHA-256 of each file of a run's tokenizer, as manifests name it."""
    files = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {f"checkpoints/{run_id}/{TOKENIZER}/{n}": hashlib.sha256(data).hexdigest() for n, data in files.items()}


def run_ids_in(directory: Place) -> set[str]:
    """Every run that left something in a results folder."""
    tables = {path.stem for table in results.TABLES for path in (directory / table).glob("*.parquet")}
    return tables | {path.parent.name for path in (directory / "checkpoints").glob("*/manifest.json")}


def config_of(directory: Place, run_id: str) -> str | None:
    """The canonical JSON of a run's experiment, as far as its row or its manifest tells."""
    row = RunStore(directory, run_id, "")._run_row()
    return row["config"] if row else (RunStore(directory, run_id, "")._manifest() or {}).get("config")


def runs_in(directory: Place) -> "pd.DataFrame":
    """The `runs` table of a folder. **Raises:** `ValueError` if the folder holds no results."""
    return results.read_table(directory, "runs")


@dataclasses.dataclass(frozen=True)
class Freed:
    """What `clean` deleted, and what it left: runs whose checkpoints went, bytes on disk, unfinished runs, and folders
    that no manifest says are a run's."""

    runs: int
    bytes: int
    unfinished: int
    foreign: int


def clean(directory: Place, *, unfinished: bool = False) -> Freed:
    """Delete the checkpoints of finished runs, and what killed processes left half-written; tables stay as they are.

    A run without checkpoints is still known to be finished, but cannot be exported any more. Nothing is deleted but
    what a run writes, where a manifest says that it is one, and nothing behind a link.

    - `unfinished`: also those of runs that did not finish: they can then not be resumed.

    **Raises:** `ValueError` if the folder holds no results.
    """
    runs = runs_in(directory)
    finished = {*runs["run_id"][runs["status"] == "finished"]}
    folders = [path for path in sorted((directory / "checkpoints").glob("*")) if path.is_dir()]
    ours = [path for path in folders if _is_of_a_run(path, directory)]
    chosen = [path for path in ours if unfinished or path.name in finished]
    leftovers = [path for table in results.TABLES for path in (directory / table).glob(".*.parquet.tmp")]
    written = [path for folder in chosen for path in _written_in(folder)]
    written += [path for path in leftovers if re.fullmatch(r"\.[0-9a-f]{16}\.parquet\.tmp", path.name)]
    freed = sum(map(size_of, written))
    for path in written:
        if path.is_dir():
            delete(path)
        else:
            path.unlink(missing_ok=True)
    for folder in chosen:
        if isinstance(folder, Path) and not any(folder.iterdir()):
            folder.rmdir()
    return Freed(len(chosen), freed, len(ours) - len(chosen), len(folders) - len(ours))


def _is_of_a_run(folder: Place, directory: Place) -> bool:
    """Whether a folder lies in the results folder itself and has a manifest that says whose it is."""
    if folder.resolve() != directory.resolve() / "checkpoints" / folder.name:
        return False
    try:
        return manifests.read(directory, folder.name) is not None
    except Damaged:
        return False


def _written_in(folder: Place) -> list[Place]:
    """What a run writes into its folder, the manifest last."""
    states = (*folder.glob("server.*.safetensors"), *folder.glob(".server.*.tmp"), *folder.glob(".manifest.json.tmp"))
    return [*states, folder / "private", folder / TOKENIZER, folder / "manifest.json"]
