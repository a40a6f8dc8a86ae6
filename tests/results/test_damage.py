"""What is kept is not trusted: a flipped bit, a cut, zeroed or deleted file is found before it is used, or harmless."""

import contextlib
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import fedsim
from fedsim.cli import main
from fedsim.core.numerics import NATIVE, in_force
from fedsim.core.sealed import Damaged
from fedsim.engine.participant import Participant
from fedsim.experiment import Experiment
from fedsim.results.export import check_tokenizer, export
from fedsim.results.provenance import code_sha256
from fedsim.results.store import RunStore
from fedsim.results.tables import load
from fedsim.simulation import RunFailed
from fedsim.storage.locking import locked
from tests.support.inline_runs import Cut, Interrupted, Told, inline
from tests.support.manifests import rewrite


FLIPS, RESUMED = 30, 5  # bits of each kind of file, and how many of the runs are computed to the end

KINDS = {  # what a resume reads, by pattern in the results folder
    "server": "checkpoints/*/server.2.safetensors",
    "server before": "checkpoints/*/server.1.safetensors",
    "private": "checkpoints/*/private/1/state.2.safetensors",
    "private before": "checkpoints/*/private/1/state.1.safetensors",
    "manifest": "checkpoints/*/manifest.json",
    "rounds": "rounds/*.parquet",
    "clients": "clients/*.parquet",
}
GOES_ON_WITH = {"server": 2, "private": 2, "server before": 3, "private before": 3}  # with which round


@pytest.fixture(scope="module")
def experiment(alone: Experiment) -> Experiment:
    """Participants keep private state that changes in every round."""
    return dataclasses.replace(alone, rounds=3)


@pytest.fixture(scope="module")
def finished(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    inline(experiment, out)
    return out


@pytest.fixture(scope="module")
def cut(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, cut after round 2."""
    out = tmp_path_factory.mktemp("cut")
    with pytest.raises(Interrupted):
        inline(experiment, out, progress=Cut(2))
    return out


def hashes(out: Path) -> list[str]:
    return list(load(out).rounds.sort_values("round").state_sha256)


def flips(path: Path, seed: str) -> Iterator[bytes]:
    """A file's content with one bit flipped, again and again."""
    draw, data = random.Random(seed), path.read_bytes()
    for _ in range(FLIPS):
        bit = draw.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def resumed(experiment: Experiment, out: Path) -> str | list[str]:
    """The hashes of a resumed run's rounds; or what was said, where it was refused."""
    try:
        inline(experiment, out, resume=True)
    except ValueError as error:
        return str(error)
    return hashes(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_never_changes_a_resumed_run(
    kind: str, cut: Path, finished: Path, experiment: Experiment, tmp_path: Path
) -> None:
    """It is refused with the file's name, or goes on from the round before, or the bit did not matter."""
    wanted, (path,) = hashes(finished), cut.glob(KINDS[kind])
    for number, data in enumerate(flips(path, kind)):
        out = tmp_path / str(number)
        shutil.copytree(cut, out)
        damaged = out / path.relative_to(cut)
        damaged.write_bytes(data)
        store = RunStore(out, experiment.run_id, code_sha256(experiment.algorithm))
        if kind not in GOES_ON_WITH:
            with pytest.raises(Damaged) as refused:
                store.open(resume=True, numerics=in_force(NATIVE))
            assert str(damaged) in str(refused.value)
        else:
            assert store.open(resume=True, numerics=in_force(NATIVE)) == GOES_ON_WITH[kind]
            assert (store.damage is None) == kind.endswith("before")
        if number < RESUMED:
            found = resumed(experiment, out)
            assert found == wanted if kind in GOES_ON_WITH else str(damaged) in found
        shutil.rmtree(out)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def header_damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(reversed(data[8:40]))
    path.write_bytes(data)


def tensors_swapped(path: Path) -> None:
    """A file that can be read, of the round before."""
    path.write_bytes(path.with_name(path.name.replace("2", "1")).read_bytes())


@pytest.mark.parametrize("damage", [cut_off, emptied, zeroed, header_damaged, tensors_swapped, Path.unlink])
@pytest.mark.parametrize("kind", ["server", "private"])
def test_a_damaged_state_falls_back_to_the_round_before_and_a_message_says_so(
    kind: str, damage: Callable[[Path], None], cut: Path, finished: Path, experiment: Experiment, tmp_path: Path
) -> None:
    class Noted(Told):
        said = ""

        def noted(self, text: str) -> None:
            self.said += text

    out, told = tmp_path / "out", Noted()
    shutil.copytree(cut, out)
    (path,) = out.glob(KINDS[kind])
    damage(path)
    inline(experiment, out, resume=True, progress=told)
    assert told.rounds == [2, 3] and "round 2 is computed once more" in told.said
    assert (path.name if damage is not Path.unlink or kind == "server" else str(path.parent)) in told.said
    assert hashes(out) == hashes(finished)


def test_two_damaged_states_are_named_with_what_to_do(cut: Path, experiment: Experiment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    for kind in ("server", "server before"):
        (path,) = out.glob(KINDS[kind])
        zeroed(path)
    message = resumed(experiment, out)
    assert isinstance(message, str) and "server.2.safetensors" in message and "server.1.safetensors" in message
    assert f"delete {out}/*/{experiment.run_id}.parquet and {out}/checkpoints/{experiment.run_id}" in message


def test_a_run_whose_first_round_is_damaged_starts_anew(experiment: Experiment, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        inline(experiment, tmp_path, progress=Cut(0))
    zeroed(tmp_path / "checkpoints" / experiment.run_id / "private/0/state.0.safetensors")
    assert resumed(experiment, tmp_path) == hashes(finished)


@pytest.mark.parametrize("table", ["rounds", "clients"])
@pytest.mark.parametrize("damage", [cut_off, emptied, zeroed, Path.unlink])
def test_a_damaged_table_is_refused_by_whoever_reads_it(
    table: str, damage: Callable[[Path], None], cut: Path, experiment: Experiment, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    path = out / table / f"{experiment.run_id}.parquet"
    damage(path)
    message = resumed(experiment, out)
    assert isinstance(message, str) and str(path) in message
    with pytest.raises(Damaged, match=path.name):
        _ = fedsim.load(out).clients


@pytest.mark.parametrize("table", ["rounds", "clients"])
def test_a_table_of_an_earlier_round_is_refused(table: str, cut: Path, experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        inline(experiment, tmp_path / "earlier", progress=Cut(1))
    out, name = tmp_path / "out", f"{table}/{experiment.run_id}.parquet"
    shutil.copytree(cut, out)
    shutil.copy(tmp_path / "earlier" / name, out / name)
    message = resumed(experiment, out)
    assert isinstance(message, str) and "is not the file that the run's manifest vouches for" in message


def test_a_manifest_without_its_seal_or_of_another_run_is_refused(cut: Path, experiment: Experiment) -> None:
    path = cut / "checkpoints" / experiment.run_id / "manifest.json"
    before = path.read_bytes()
    try:
        content = json.loads(before)
        del content["sha256"]
        path.write_text(json.dumps(content))
        with pytest.raises(Damaged, match="checksum"):
            load(cut)
        path.write_bytes(before)
        rewrite(path, run_id="another")
        with pytest.raises(Damaged, match="not that of run"):
            load(cut)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("on_error", ["stop", "drop", "retry"])
def test_a_state_that_is_damaged_under_a_run_ends_it_whatever_the_policy(
    on_error: Literal["stop", "drop", "retry"], experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out of the round, its participant would change everybody's numbers without a word."""
    real = Participant._enter

    def entered(self: Participant, before: int, round: int, meter: Any) -> Any:
        if (before, round, self.member.info.id) == (2, 2, 1):
            self.version = None  # as in the host that replaces one
            zeroed(tmp_path / "checkpoints" / run.run_id / "private/1/state.1.safetensors")
        return real(self, before, round, meter)

    monkeypatch.setattr(Participant, "_enter", entered)
    run = dataclasses.replace(experiment, on_error=on_error)
    with pytest.raises(RunFailed, match=r"participant 1: .*state\.1\.safetensors: not a readable checkpoint"):
        inline(run, tmp_path)
    assert list(load(tmp_path).rounds["round"]) == [0, 1]


# a run that is under way ----------------------------------------------------------------------------------------------


def test_whoever_reads_while_a_run_writes_is_never_alarmed(experiment: Experiment, tmp_path: Path) -> None:
    """Read after every file that a run replaces, and where a damaged state made it go back a round."""
    import fedsim.results.store as store
    import fedsim.results.tables as tables
    import fedsim.storage.place as storage

    reads, real = [], storage.write_atomically

    def write_atomically(target: Path, data: bytes) -> None:
        real(target, data)
        if list(tmp_path.glob("r*/*.parquet")):
            found = load(tmp_path)
            reads.append((len(found.rounds), len(found.clients)))

    with pytest.MonkeyPatch.context() as patched:
        for module in (store, tables):
            patched.setattr(module, "write_atomically", write_atomically)
        with pytest.raises(Interrupted):
            inline(experiment, tmp_path, progress=Cut(2))
        (path,) = tmp_path.glob(KINDS["server"])
        zeroed(path)
        inline(experiment, tmp_path, resume=True)
        inline(experiment, tmp_path)
    assert len(reads) > 20 and max(rounds for rounds, _ in reads) == 4


def test_a_folder_that_is_moved_under_a_run_is_not_made_anew(
    experiment: Experiment, finished: Path, tmp_path: Path
) -> None:
    """The run stops, and nothing is written where the folder lay."""
    out, moved = tmp_path / "out", tmp_path / "moved"

    class Mover(Told):
        def finished(self, row: dict) -> None:
            super().finished(row)
            if row["round"] == 1:
                out.rename(moved)

    told = Mover()
    with locked(out), pytest.raises(RunFailed) as error:
        inline(experiment, out, progress=told)
    assert told.rounds == [0, 1] and not out.exists() and "\n" not in str(error.value)
    assert list(load(moved).rounds["round"]) == [0, 1]
    assert resumed(experiment, moved) == hashes(finished)


@pytest.mark.parametrize("remade", ["by another process", "as a copy", "without its lock"])
def test_a_folder_that_is_another_one_now_is_not_written_to(
    remade: str, experiment: Experiment, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    class Remaker(Told):
        def finished(self, row: dict) -> None:
            super().finished(row)
            if row["round"] != 1:
                return
            if remade == "without its lock":
                (out / ".lock").unlink()
                return
            out.rename(tmp_path / "moved")
            shutil.copytree(tmp_path / "moved", out)
            if remade == "by another process":
                other.enter_context(locked(out))
            self.before = tables(out)

    def tables(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}

    told = Remaker()
    with contextlib.ExitStack() as other, locked(out), pytest.raises(RunFailed, match="was moved or deleted"):
        inline(experiment, out, progress=told)
    assert told.rounds == [0, 1]
    if remade != "without its lock":
        assert tables(out) == told.before


# export and report ----------------------------------------------------------------------------------------------------

EXPORTED = {
    "server": "checkpoints/*/server.3.safetensors",
    "private": "checkpoints/*/private/0/state.3.safetensors",
    "manifest": "checkpoints/*/manifest.json",
    "runs": "runs/*.parquet",
    "clients": "clients/*.parquet",
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_a_flipped_bit_never_changes_what_is_exported(
    kind: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (path,) = out.glob(EXPORTED[kind])
    words = ["export", str(out), "--participant", "0", "--to", str(tmp_path / "model")]
    for data in list(flips(path, kind))[: FLIPS // 3]:
        path.write_bytes(data)
        assert main(words) == 2
        message = capsys.readouterr().err
        assert str(path) in message and message.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_deleted_private_state_is_not_exported_as_an_empty_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for path in out.glob("checkpoints/*/private/0/*"):
        path.unlink()
    assert main(["export", str(out), "--participant", "0", "--to", str(tmp_path / "model")]) == 2
    assert "private state of participant 0 after round 3 is missing" in capsys.readouterr().err


def test_the_states_of_an_earlier_round_are_not_exported_as_the_last(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (manifest,) = out.glob("checkpoints/*/manifest.json")
    last = json.loads(manifest.read_text())["round"]
    rewrite(manifest, round=last - 1)
    with pytest.raises(ValueError, match=rf"holds round {last - 1} of a finished run of {last}: put back the last"):
        export(out, None, 0, tmp_path / "model")


@pytest.mark.parametrize("table", ["runs", "rounds", "clients"])
def test_a_damaged_table_is_not_reported(
    table: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (path,) = (out / table).glob("*.parquet")
    for data in list(flips(path, table))[: FLIPS // 3]:
        path.write_bytes(data)
        assert main(["report", str(out)]) == 2
        message = capsys.readouterr().err
        assert str(path) in message and message.count("\n") == 1


class Tokenizer:
    """What a run keeps of a tokenizer that it has trained."""

    def save_pretrained(self, folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text(f'{{"name": "{name}"}}')


def test_a_changed_tokenizer_is_not_exported(cut: Path, experiment: Experiment, tmp_path: Path) -> None:
    out, run_id = tmp_path / "out", experiment.run_id
    shutil.copytree(cut, out)
    store = RunStore(out, run_id, "")
    store.save_tokenizer(Tokenizer())
    rewrite(out / "checkpoints" / run_id / "manifest.json", files=store.files)
    folder = out / "checkpoints" / run_id / "tokenizer"
    path, more = folder / "tokenizer.json", folder / "special_tokens.json"
    check_tokenizer(out, run_id, folder)
    for data in flips(path, "tokenizer"):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"tokenizer\.json: is not as it was written"):
            check_tokenizer(out, run_id, folder)
    path.unlink()
    with pytest.raises(Damaged, match=r"tokenizer\.json: is missing"):
        check_tokenizer(out, run_id, folder)
    Tokenizer().save_pretrained(folder)
    more.write_text("{}")
    with pytest.raises(Damaged, match=r"special_tokens\.json"):
        check_tokenizer(out, run_id, folder)
