"""Results and checkpoints in an object store: an S3 server on this machine, real requests to it."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import fedsim
from fedsim.cli import main
from fedsim.experiment import Experiment
from fedsim.report.document import write_report
from fedsim.results.tables import Results
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import RunFailed, run
from fedsim.storage import locking
from fedsim.storage.checkpoint import Versions
from fedsim.storage.locking import LockLost, check_held, locked
from fedsim.storage.place import Remote, delete, download, fetched, place, sent, size_of, write_atomically
from fedsim.sweeps.runner import run_all
from tests.support.store_server import Store, store_server


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with store_server() as server:
        yield server


@pytest.fixture
def bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """An empty bucket that this process can reach."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    found = place(f"s3://{store.bucket()}")
    assert isinstance(found, Remote)
    return found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder is taken for dead after a second."""
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locking, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(locking, "SETTLE_SECONDS", 0.1)


# a place ------------------------------------------------------------------------------------------------------------


def test_a_path_stays_a_path() -> None:
    assert place("results/quick") == Path("results/quick")
    assert place(Path("a")) == Path("a") and place(Remote("s3://a/b")) == Remote("s3://a/b")


def test_an_url_is_taken_apart_as_a_path_is() -> None:
    there = place("s3://bucket/a/b/")
    assert isinstance(there, Remote) and str(there) == "s3://bucket/a/b"
    assert there / "rounds" == Remote("s3://bucket/a/b/rounds") and (there / "x.parquet").stem == "x"
    assert there.name == "b" and there.parent == Remote("s3://bucket/a") and there.path == "bucket/a/b"


@pytest.mark.parametrize("text", ["ftp://host/x", "http://host/x", "s3://", "s3:///x", "gs://bucket//x"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--out"):
        place(text)


@pytest.mark.parametrize(
    "text", ["s3://KEY:topsecret@bucket/x", "s3://bucket/x?secret_key=topsecret", "s3a://KEY:topsecret@bucket/x"]
)
def test_credentials_in_an_url_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="credentials") as refused:
        place(text)
    assert "topsecret" not in str(refused.value)


# files --------------------------------------------------------------------------------------------------------------


def test_files_come_and_go(bucket: Remote, tmp_path: Path) -> None:
    folder = bucket / "some folder"
    assert not folder.exists() and not folder.is_dir() and folder.glob("*") == [] and folder.files() == []
    write_atomically(folder / "a.txt", b"one")
    write_atomically(folder / "deep/er.txt", b"three")
    assert folder.is_dir() and (folder / "a.txt").exists() and not (folder / "a.txt").is_dir()
    assert (folder / "a.txt").read_bytes() == b"one" and (folder / "a.txt").read_text() == "one"
    assert folder.glob("*.txt") == [folder / "a.txt"] and folder.glob("*/er.txt") == [folder / "deep/er.txt"]
    assert size_of(folder) == 8 and dict(folder.files(deep=False)) == {folder / "a.txt": 3}

    with fetched(folder) as here:
        assert (here / "a.txt").read_text() == "one" and (here / "deep/er.txt").read_text() == "three"
    assert not here.exists()
    with fetched(folder / "a.txt") as file:
        assert file.read_text() == "one"
    assert download(folder, tmp_path) == 2 and (tmp_path / "deep/er.txt").read_text() == "three"

    write_atomically(folder / "a.txt", b"another")
    assert (folder / "a.txt").read_text() == "another"
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").unlink()
    delete(folder)
    delete(folder)
    assert folder.files() == []


def test_a_folder_is_sent_when_it_is_whole(bucket: Remote) -> None:
    with sent(bucket / "page") as here:
        (here / "figures").mkdir()
        (here / "figures" / "one.svg").write_text("figure")
        assert (bucket / "page").files() == []
    assert (bucket / "page/figures/one.svg").read_text() == "figure"

    with pytest.raises(RuntimeError), sent(bucket / "other") as here:
        (here / "half.txt").write_text("half")
        raise RuntimeError("broke")
    assert (bucket / "other").files() == []


def test_what_cannot_be_written_is_named(bucket: Remote) -> None:
    with pytest.raises(OSError, match="could not write s3://no-such-bucket/x"):
        write_atomically(Remote("s3://no-such-bucket/x"), b"")


def test_versions_of_a_tree(bucket: Remote) -> None:
    import torch

    tree = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    versions = Versions(bucket / "private/7", "state")
    assert versions.load(5) is None and versions.stored() == []
    for version in range(4):
        versions.save(version, {name: tensor + version for name, tensor in tree.items()}, {"round": str(version)})
    assert versions.stored() == [2, 3]
    found = versions.load(before=3)
    assert found is not None and found[0] == 2 and found[2] == {"round": "2"}
    assert [*found[1]] == ["a", "b"] and torch.equal(found[1]["b"], torch.arange(3.0) + 2)
    write_atomically(versions.path(3), b"cut")
    with pytest.raises(ValueError, match=r"state\.3\.safetensors: not a readable checkpoint"):
        versions.load(4)


# who writes ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_one_process_at_a_time(bucket: Remote) -> None:
    with locked(bucket / "out") as out:
        with pytest.raises(ValueError, match="another process is writing to this folder"), locked(bucket / "out"):
            raise AssertionError("two hold it")
        with locked(bucket / "other") as other:
            check_held(other)
        check_held(out)
    assert (bucket / "out").files() == []
    with locked(bucket / "out") as out:
        check_held(out)
        assert isinstance(out, Remote) and out == bucket / "out" and out.holder is not None
        assert pickle.loads(pickle.dumps(out)).holder is None, "another process holds nothing"


@pytest.mark.usefixtures("impatient")
def test_a_dead_holder_is_followed(bucket: Remote) -> None:
    write_atomically(bucket / "out/.lock", b"somewhere process 1 abc 17")
    started = time.monotonic()
    told: list[str] = []
    with locked(bucket / "out", told.append):
        assert time.monotonic() - started > 1.0, "it was not given time to be heard of"
    assert told == [f"{bucket}/out is held by somewhere process 1; waiting 1 s to see whether that has ended"]


@pytest.mark.usefixtures("impatient")
def test_a_holder_that_slept_looks_before_it_writes(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that was closed: its heart has not beaten since, nor noticed that another took over."""
    monkeypatch.setattr(locking.LockHeartbeat, "run", lambda heart: None)
    with locked(bucket / "out") as out:
        check_held(out)
        write_atomically(bucket / "out/.lock", b"somewhere process 2 def 1")
        check_held(out)  # it was heard of just now: nobody else can hold it
        monkeypatch.setattr(locking, "_now", lambda: time.monotonic() + 10**6)
        with pytest.raises(LockLost, match="taken this folder over"):
            check_held(out)
    assert (bucket / "out/.lock").exists(), "it is the other's"


@pytest.mark.usefixtures("impatient")
def test_a_holder_that_was_taken_over_notices_and_writes_no_more(bucket: Remote, tiny_experiment: Experiment) -> None:
    taken = threading.Event()

    class Taken(InlineRuntime):
        def ask(self, method, *args, watch=None):
            if args[0] == 1:
                taken.set()
                end = time.monotonic() + 30
                assert isinstance(out, Remote)
                while not out.holder.lost.is_set():
                    assert time.monotonic() < end
                    write_atomically(bucket / "out/.lock", b"somewhere process 2 def 1")  # its heart beats, too
                    time.sleep(0.05)
            return super().ask(method, *args, watch=watch)

    with locked(bucket / "out") as out, pytest.raises(RunFailed, match="taken this folder over"):
        run(tiny_experiment, runtime=Taken(), out=out)
    assert taken.is_set() and (bucket / "out/.lock").read_bytes() == b"somewhere process 2 def 1"
    with pytest.raises(LockLost), locked(bucket / "third") as third:
        assert isinstance(third, Remote)
        third.holder.lost.set()
        check_held(third)
    assert set(fedsim.load(bucket / "out").rounds["round"]) == {0}, "a round was written after that"
    assert fedsim.load(bucket / "out").runs.empty


def test_what_cannot_be_read_is_not_said_to_be_damaged(bucket: Remote, store: Store, tiny_run: Path) -> None:
    for path in tiny_run.rglob("*.*"):
        write_atomically(bucket / str(path.relative_to(tiny_run)), path.read_bytes())
    assert hashes(fedsim.load(bucket)) == hashes(fedsim.load(tiny_run))
    [private] = (bucket / "checkpoints").glob("*/private")
    store.forbid(bucket.name, "s3:GetObject")
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        fedsim.load(bucket)
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        Versions(private / "0", "state").load(9)


# runs ---------------------------------------------------------------------------------------------------------------


def hashes(results: Results) -> list[str]:
    return [*results.rounds.sort_values(["run_id", "round"])["state_sha256"]]


@pytest.mark.usefixtures("impatient")
def test_a_run_is_the_same_and_everything_reads_it(
    bucket: Remote, tiny_experiment: Experiment, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bucket / "tiny"
    with locked(out):
        assert run_all([tiny_experiment], out=out, make_runtime=InlineRuntime) == []
    results = fedsim.load(str(out))
    assert hashes(results) == hashes(fedsim.load(tiny_run)) and len(results.clients) > 0
    rounds = pd.read_parquet(f"{out}/rounds")
    pd.testing.assert_frame_equal(rounds, results.rounds)
    assert len(results.deployed) == tiny_experiment.participants
    left = {file.url.removeprefix(f"{out}/") for file, _ in out.files()}
    here = {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()}
    assert left == here, "the same files, whether in a folder or in a store"

    with locked(out):  # again: nothing is left to do
        assert run_all([tiny_experiment], out=out, make_runtime=lambda: pytest.fail("computed again")) == []
    assert main(["export", str(out), "--participant", "1", "--to", str(tmp_path / "model")]) == 0
    assert main(["export", str(tiny_run), "--participant", "1", "--to", str(tmp_path / "same")]) == 0
    name = "model.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()

    page = write_report(out)
    assert str(page) == f"{out}/report.html" and "<html" in page.read_text()
    assert (out / "report.md").exists() and (out / "report_figures").is_dir()
    assert main(["clean", str(out)]) == 0 and "freed" in capsys.readouterr().out
    assert (out / "checkpoints").files() == [] and hashes(fedsim.load(out)) == hashes(results)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_resumed_after_sigkill(
    bucket: Remote, tiny_settings: list[str], tiny_run: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bucket / "killed"
    words = ["run", "benchmarks.suites:tiny", "--set", *tiny_settings, "--runtime", "inline", "--out", str(out)]
    environment = os.environ | store.environment
    with subprocess.Popen([sys.executable, "-m", "fedsim", *words], env=environment) as process:
        try:
            end = time.monotonic() + 120
            while not out.glob("checkpoints/*/manifest.json"):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    assert (out / ".lock").exists() and not (out / "runs").exists()
    assert main(words) == 2 and "--resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert hashes(fedsim.load(out)) == hashes(fedsim.load(tiny_run))
    assert not (out / ".lock").exists()


# refused ------------------------------------------------------------------------------------------------------------


def test_unknown_credentials_stop_a_run_before_it_starts(
    bucket: Remote, store: Store, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "run",
        "benchmarks.suites:tiny",
        "--set",
        *tiny_settings,
        "--runtime",
        "inline",
        "--out",
        str(bucket / "o"),
    ]
    with store.checking_credentials():
        assert main(words) == 2
    said = capsys.readouterr().err
    assert f"--out='{bucket}/o': not a folder that can be written to" in said
    assert store.environment["AWS_SECRET_ACCESS_KEY"] not in said
    assert store.names(bucket.name) == []


@pytest.mark.usefixtures("impatient")
def test_credentials_that_end_in_a_run_lose_no_round(
    bucket: Remote, store: Store, tiny_experiment: Experiment, tiny_run: Path
) -> None:
    class Refused(InlineRuntime):
        def ask(self, method, *args, watch=None):
            if args[0] == 2:
                store.forbid(bucket.name, "s3:PutObject")
            return super().ask(method, *args, watch=watch)

    with locked(bucket / "out"):
        [failure] = run_all([tiny_experiment], out=bucket / "out", make_runtime=Refused)
    assert "ACCESS_DENIED" in failure.reason and f"{bucket}/out" in failure.reason
    results = fedsim.load(bucket / "out")
    assert hashes(results) == hashes(fedsim.load(tiny_run))[:2] and results.runs.empty

    store.forbid(bucket.name)
    with locked(bucket / "out"):
        assert run_all([tiny_experiment], out=bucket / "out", make_runtime=InlineRuntime) == []
    assert hashes(fedsim.load(bucket / "out")) == hashes(fedsim.load(tiny_run))


def test_a_bucket_that_is_not_there_is_said_before_anything_starts(
    bucket: Remote, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "benchmarks.suites:tiny", "--set", *tiny_settings, "--runtime", "inline"]
    assert main([*words, "--out", "s3://not-there/x"]) == 2
    assert "--out='s3://not-there/x'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing is not a folder: looked for"):
        fedsim.load(bucket / "nothing")


def test_no_secret_is_in_what_a_run_writes(bucket: Remote, store: Store, tiny_experiment: Experiment) -> None:
    run(tiny_experiment, runtime=InlineRuntime(), out=bucket / "out", command="fedsim run ...")
    secret = store.environment["AWS_SECRET_ACCESS_KEY"].encode()
    found = [file for file, _ in bucket.files() if secret in file.read_bytes()]
    assert found == [] and len(bucket.files()) > 5
    text = json.dumps(fedsim.load(bucket / "out").runs.to_dict("records"), default=str)
    assert store.environment["AWS_ACCESS_KEY_ID"] not in text


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "a//b", "..", "/etc/x", "a/./b", "..\\outside", "a\0b"]
)
def test_an_object_never_leads_out_of_the_folder_it_is_fetched_into(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a bucket calls its objects; nothing is copied then."""
    folder, here = Remote("s3://bucket/out"), tmp_path / "here"
    listed = [(Remote(f"{folder.url}/{each}"), 1) for each in ("runs/x.parquet", name)]
    monkeypatch.setattr(Remote, "files", lambda self, deep=True: listed)
    monkeypatch.setattr(Remote, "read_bytes", lambda self: b"data")
    with pytest.raises(ValueError, match="names no file inside a folder"):
        download(folder, here)
    assert not list(tmp_path.iterdir())
