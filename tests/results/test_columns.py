"""The declaration of the columns, and what is made of it."""

import dataclasses
from pathlib import Path

import pytest

from fedsim.engine.report import ClientReport
from fedsim.results.columns import COLUMNS, TABLES, Column, columns_of, reference, row_of
from fedsim.results.records import mean_metrics
from fedsim.results.tables import load


DOCS = Path(__file__).resolve().parents[2] / "docs" / "tables.md"
EVERY = [(table, column) for table, columns in COLUMNS.items() for column in columns]


def test_the_page_of_the_docs_is_made_of_the_columns() -> None:
    assert DOCS.read_text() == reference(), "python -m fedsim.results.columns > docs/tables.md"


@pytest.mark.parametrize(("table", "column"), EVERY, ids=[f"{table}.{column.name}" for table, column in EVERY])
def test_every_column_says_what_it_is(table: str, column: Column) -> None:
    assert column.meaning and "|" not in column.meaning
    assert [each.name for each in COLUMNS[table]].count(column.name) == 1
    units = {"seconds": "s", "bytes": "bytes"}
    named = next((unit for word, unit in units.items() if word in column.name.split("_")), None)
    assert named is None or column.unit == named or column.kind.startswith("str")
    assert TABLES[table].field(column.name).nullable == column.kind.endswith("?")


def test_rows_and_columns_are_the_same_numbers() -> None:
    @dataclasses.dataclass(frozen=True)
    class Record:
        run: object
        round: int
        place: str
        phases: object

    @dataclasses.dataclass(frozen=True)
    class Named:
        run_id: str = "r"
        name: str = "fedavg"
        seed: int = 3
        broadcast: float = 1.0
        compute: float = 2.0
        sum: float = 3.0
        write: float = 4.0
        idle: float = 5.0

        @property
        def experiment(self) -> "Named":
            return self

        @property
        def algorithm(self) -> "Named":
            return self

    record = Record(Named(), 7, "driver", Named())
    row = row_of("profile", record)
    assert row == {
        "run_id": "r", "algorithm": "fedavg", "seed": 3, "round": 7, "place": "driver",
        "broadcast_seconds": 1.0, "compute_seconds": 2.0, "sum_seconds": 3.0, "write_seconds": 4.0, "idle_seconds": 5.0,
    }  # fmt: skip
    assert columns_of("profile", [record, record]) == {name: [value, value] for name, value in row.items()}


def test_a_preset_is_named_in_every_table(tiny_run: Path) -> None:
    results = load(tiny_run)
    for table in (results.rounds, results.clients):
        assert set(table.preset) == {"paper"} and set(table.method) == {"fedgrow (paper)"}


def test_reports_of_one_round_add_up() -> None:
    """Training 10 FLOPs in 2 s, then scoring, in which a private state was made with 5 FLOPs: 15, in 2 s."""
    trained = ClientReport(
        outcome="in_time", bytes_up=8, upload_params=2, flops=10, init_flops=0, train_seconds=2.0, train_loss=0.5,
        trainable_params=2, peak_memory_bytes=300,
    )  # fmt: skip
    scored = ClientReport(
        accuracy=0.75, loss=1.0, flops=5, init_flops=5, train_seconds=0.0, trainable_params=0, peak_memory_bytes=200
    )
    both = trained.then(scored)
    assert (both.outcome, both.bytes_up, both.flops, both.init_flops) == ("in_time", 8, 15, 5)
    assert (both.train_seconds, both.train_loss, both.accuracy, both.loss) == (2.0, 0.5, 0.75, 1.0)
    assert (both.trainable_params, both.peak_memory_bytes) == (2, 300)
    assert ClientReport().then(trained) == trained == trained.then(ClientReport())
    assert not scored.trained and both.trained


def test_who_fails_after_being_late_was_late() -> None:
    late, in_time = ClientReport(outcome="late").failed("KeyError: 1"), ClientReport(outcome="in_time").failed("x")
    assert (late.outcome, late.error) == ("late", "KeyError: 1")
    assert (in_time.outcome, in_time.error) == ("in_time", "x"), "its update counted; its scoring raised"
    assert ClientReport().failed("x").outcome == "failed"
    assert ClientReport(outcome="dropped_out").failed("x").outcome == "dropped_out", "simulated time goes by it"


def test_metrics_are_averaged_by_weight() -> None:
    reports = [
        ClientReport(outcome="in_time", metrics={"drift": 1.0, "steps": 4.0}, weight=1.0),
        ClientReport(outcome="in_time", metrics={"drift": 4.0}, weight=2.0),
        ClientReport(outcome="late", metrics={"drift": 9.0}, weight=9.0),
        ClientReport(),
    ]
    assert mean_metrics(reports) == '{"drift": 3.0, "steps": 4.0}' and mean_metrics(reports[2:]) is None
