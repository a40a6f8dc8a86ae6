"""The columns are a promise to other people's scripts; a folder stays readable whatever happens to its writer."""

import errno
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.results import tables as results
from fedsim.results.tables import SCHEMAS, load, read_table, write_table


# Written out a second time on purpose: renaming a column or changing its type must fail here.
COLUMNS = {
    "runs": """
        run_id string, suite string, algorithm string, preset string, dataset string, family string, partition string,
        alpha double, participants int64, cohort int64, rounds int64, seed int64, target_params int64,
        trainable_params double, upload_params double, status string, wall_seconds double, git_commit string,
        code_sha256 string, versions string, hardware string, config string, bytes_per_upload int64, model string,
        federation_sha256 string, error string, labels string, held_bytes int64, peak_bytes int64,
        command string, data_sha256 string, checkpoints_sha256 string, method string, leaves string
    """,
    "rounds": """
        run_id string, algorithm string, seed int64, round int64, stage string, accuracy_mean double,
        accuracy_std double, accuracy_min double, accuracy_local_mean double, accuracy_local_std double,
        accuracy_local_min double, accuracy_val_mean double, accuracy_global double, loss_mean double,
        train_loss double, bytes_up int64, bytes_down int64, bytes_up_total int64, bytes_down_total int64,
        flops int64, wall_seconds double, retries int64, participants int64, state_sha256 string, bytes_moved int64,
        seam_bytes_up int64, seam_bytes_down int64, accuracy_val_std double, accuracy_val_min double, failed int64,
        precision_mean double, recall_mean double, f1_mean double, coverage double, coverage_min double,
        simulated_seconds double, late int64, dropped_out int64, excluded int64, metrics string,
        preset string, method string, bytes_once int64, accuracy_val_even_mean double,
        epsilon double, delta double, noise_multiplier double, clipped_share double
    """,
    "clients": """
        run_id string, algorithm string, seed int64, round int64, client int64, tier string, num_examples int64,
        num_test_examples int64, accuracy double, accuracy_local double, accuracy_val double, loss double,
        train_loss double, bytes_up int64, bytes_down int64, train_seconds double, flops int64,
        peak_memory_bytes int64, host string, node string, retries int64, stage string, model string,
        trainable_params int64, upload_params int64, precision double, recall double, f1 double, small_sha256 string,
        simulated_seconds double, outcome string, metrics string, preset string, method string, error string,
        bytes_once int64, accuracy_val_even double
    """,
}
SAMPLE = {"string": "x", "int64": 1, "double": 0.5}


def row(table: str, **values: Any) -> dict[str, Any]:
    return {field.name: SAMPLE[str(field.type)] for field in SCHEMAS[table]} | values


@pytest.mark.parametrize("table", SCHEMAS)
def test_columns_are_the_promised_ones_in_order(table: str) -> None:
    promised = [tuple(column.split()) for column in COLUMNS[table].split(",")]
    assert [(field.name, str(field.type)) for field in SCHEMAS[table]] == promised


@pytest.mark.parametrize("table", SCHEMAS)
def test_file_carries_the_schema_and_its_version(tmp_path: Path, table: str) -> None:
    path = write_table(tmp_path, table, "r1", [row(table, run_id="r1")])
    assert path == tmp_path / table / "r1.parquet"
    schema = pq.read_schema(path)
    assert schema.equals(SCHEMAS[table])
    assert schema.metadata == {b"fedsim_schema": b"1"}


def test_round_trip_keeps_values_and_nulls(tmp_path: Path) -> None:
    write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1", round=i, loss_mean=None) for i in range(3)])
    frame = read_table(tmp_path, "rounds")
    assert list(frame["round"]) == [0, 1, 2]
    assert list(frame["loss_mean"].isna()) == [True] * 3
    assert frame["loss_mean"].dtype == "float64"
    assert frame["bytes_up"].dtype == "int64"


def test_second_write_replaces_the_first_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1", round=0)])
    write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1", round=i) for i in range(2)])
    assert len(read_table(tmp_path, "rounds")) == 2
    assert os.listdir(tmp_path / "rounds") == ["r1.parquet"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_names_the_path_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1")])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results.os, call, full)
        with pytest.raises(OSError, match=r"No space left.*r1\.parquet") as caught:
            write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1", round=i) for i in range(2)])
    assert caught.value.errno == errno.ENOSPC
    assert len(read_table(tmp_path, "rounds")) == 1
    assert os.listdir(tmp_path / "rounds") == ["r1.parquet"]


def test_unusable_folder_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "rounds").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"r1\.parquet"):
        write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1")])


def test_pandas_reads_the_folder_and_leftovers_are_not_data(tmp_path: Path) -> None:
    for run_id in ("r1", "r2"):
        # A column that is null in one file and not in the other must not confuse a reader of the folder.
        loss = None if run_id == "r1" else 0.25
        write_table(tmp_path, "rounds", run_id, [row("rounds", run_id=run_id, loss_mean=loss)])
    (tmp_path / "rounds" / ".r3.parquet.tmp").write_bytes(b"PAR1 half a fi")
    (tmp_path / "rounds" / "_r4.parquet").write_bytes(b"")
    frame = pd.read_parquet(str(tmp_path) + "/rounds")
    assert sorted(frame["run_id"]) == ["r1", "r2"]
    assert list(read_table(tmp_path, "rounds")["run_id"]) == ["r1", "r2"]


def test_load_gives_all_three_tables_even_before_a_run_has_finished(tmp_path: Path) -> None:
    write_table(tmp_path, "rounds", "r1", [row("rounds", run_id="r1")])
    loaded = load(tmp_path)
    assert len(loaded.rounds) == 1 and len(loaded.runs) == 0 and len(loaded.clients) == 0
    assert list(loaded.runs.columns) == SCHEMAS["runs"].names
    for table in ("runs", "clients"):
        write_table(tmp_path, table, "r1", [row(table, run_id="r1")])
    loaded = load(str(tmp_path))
    assert len(loaded.runs) == 1 and len(loaded.clients) == 1


@pytest.mark.parametrize("folder", ["", "absent"])
def test_folder_without_results_says_what_was_looked_for(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match=r"looked for runs/\*\.parquet, rounds/\*\.parquet, clients/\*\.parquet"):
        load(tmp_path / folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    rows = [row("rounds", run_id="r1", round=i, stage="federated") for i in range(50)]
    path = write_table(tmp_path, "rounds", "r1", rows)
    data = path.read_bytes()
    damaged = {"empty": b"", "cut": data[: len(data) // 2], "flipped": data.replace(b"federated", b"fedirated")}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"r1\.parquet is not a readable Parquet file"):
        read_table(tmp_path, "rounds")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({b"fedsim_schema": b"2"}, r"r1\.parquet has fedsim schema 2, this fedsim reads up to 1"),
        (None, r"r1\.parquet was not written by fedsim"),
        ({b"fedsim_schema": b"next"}, r"r1\.parquet was not written by fedsim"),
    ],
)
def test_foreign_schema_is_refused(tmp_path: Path, metadata: dict | None, message: str) -> None:
    path = write_table(tmp_path, "runs", "r1", [row("runs", run_id="r1")])
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path, "runs")


def test_columns_of_a_file_are_checked(tmp_path: Path) -> None:
    path = write_table(tmp_path, "runs", "r1", [row("runs", run_id="r1")])
    full = pq.ParquetFile(path).read().replace_schema_metadata(SCHEMAS["runs"].metadata)  # without its seal
    pq.write_table(full.drop_columns(["labels"]), path)
    assert list(read_table(tmp_path, "runs")["labels"].isna()) == [True]
    pq.write_table(full.drop_columns(["status"]), path)
    with pytest.raises(ValueError, match=r"r1\.parquet has no column 'status'"):
        read_table(tmp_path, "runs")
    pq.write_table(full.set_column(11, "seed", pa.array(["1"])), path)
    with pytest.raises(ValueError, match=r"r1\.parquet has string in column 'seed', fedsim wants int64"):
        read_table(tmp_path, "runs")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surprise": 1}, "unknown columns .*surprise"),
        ({"run_id": "other"}, "run 'other' in the file of run 'r1'"),
        ({"bytes_up": None}, "'bytes_up' must not be null"),
        ({"bytes_up": 1.5}, "'bytes_up' must hold int64"),
        ({"host": 3}, "'host' must hold string"),
    ],
)
def test_wrong_row_is_our_bug_and_names_the_column(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        write_table(tmp_path, "clients", "r1", [row("clients", run_id="r1") | change])
    assert not (tmp_path / "clients").exists()


def test_missing_column_is_our_bug_and_named(tmp_path: Path) -> None:
    short = row("clients", run_id="r1")
    del short["loss"]
    with pytest.raises(AssertionError, match=r"lacks the columns \['loss'\]"):
        write_table(tmp_path, "clients", "r1", [short])


@pytest.mark.parametrize("run_id", ["", ".hidden", "_hidden", "a/b", ".."])
def test_run_id_that_cannot_name_a_file_is_our_bug(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(AssertionError, match="cannot name a file"):
        write_table(tmp_path, "rounds", run_id, [])
