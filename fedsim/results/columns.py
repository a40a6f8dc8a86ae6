"""The columns of the tables, each declared once: its type, where its value comes from, its unit and its meaning.

`docs/tables.md` is made of this: `python -m fedsim.results.columns > docs/tables.md`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import pyarrow as pa


SCHEMA_KEY = b"fedsim_schema"
SCHEMA_VERSION = 1
TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column. `kind`: str, int or float; with `?` it may be null. `source`: a path from the row's record
    (`fedsim.results.records`). `private`: null in runs with `publish=True`, for it tells of participants' own examples
    otherwise than by what they send, or of one participant's model alone."""

    name: str
    kind: str
    source: str
    meaning: str
    unit: str = ""
    private: bool = False

    def __post_init__(self) -> None:
        assert not self.private or self.kind.endswith("?"), f"{self.name}: what may be left out may be null"

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, TYPES[self.kind.rstrip("?")], nullable=self.kind.endswith("?"))


Private = functools.partial(Column, private=True)
RUN_ID = Column("run_id", "str", "run.run_id", "hash of the experiment")
ALGORITHM = Column("algorithm", "str", "run.experiment.algorithm.name", "the method")
SEED = Column("seed", "int", "run.experiment.seed", "the experiment's seed")
PRESET = Column("preset", "str?", "run.preset", "the growth preset; null where nothing is grown")
METHOD = Column("method", "str?", "run.method", "algorithm and preset as one label")
OF_RUN = (RUN_ID, ALGORITHM, SEED)

RUNS = (
    RUN_ID,
    Column("suite", "str", "run.suite", "the suite it was computed in"),
    ALGORITHM,
    PRESET,
    Column("dataset", "str", "run.experiment.task.data.name", "name of the data"),
    Column("family", "str", "run.experiment.task.family", "the models' Hugging Face family"),
    Column("partition", "str", "run.experiment.partition.scheme", "how the training data are dealt"),
    Column("alpha", "float?", "run.alpha", "concentration of the partition; null where it has none"),
    Column("participants", "int", "run.experiment.participants", "size of the population"),
    Column("cohort", "int", "run.cohort", "updates wanted in a round"),
    Column("rounds", "int", "run.experiment.rounds", "federated rounds"),
    SEED,
    Column("target_params", "int?", "run.cost.target_params", "parameters of the target", "scalars"),
    Column("trainable_params", "float?", "trainable_params", "trained by a participant, mean", "scalars"),
    Column("upload_params", "float?", "upload_params", "in a participant's upload, mean", "scalars"),
    Column("status", "str", "status", "finished or failed"),
    Column("wall_seconds", "float?", "wall_seconds", "of all rounds, across resumes", "s"),
    Column("git_commit", "str?", "git_commit", "of the checkout, + where it has changes; null outside of one"),
    Column("code_sha256", "str", "run.code_sha256", "of the sources that decide the numbers"),
    Column("versions", "str", "versions", "JSON: versions of the packages"),
    Column("hardware", "str", "hardware", "JSON: the driver's machine and the numerics"),
    Column("config", "str", "config", "JSON: the experiment; some fields under older names (core/canonical.py)"),
    Column("bytes_per_upload", "int?", "bytes_per_upload", "of one participant in a federated round, mean", "bytes"),
    Column("model", "str?", "model", "the target form, for example 128x4"),
    Column("federation_sha256", "str?", "run.federation_sha256", "of shards, small forms and cohorts: equal for all "
           "methods that met the same federation"),
    Private("error", "str?", "error", "which participant, and the traceback's last line; null unless it failed"),
    Private("labels", "str?", "run.labels", "JSON: label histograms of participants; null in large populations"),
    Column("held_bytes", "int?", "held_bytes", "largest private state and download of any participant, by count",
           "bytes"),
    Column("peak_bytes", "int?", "peak_bytes", "largest memory of any participant in a training step, by count",
           "bytes"),
    Column("command", "str?", "run.command", "what was typed to start it"),
    Column("data_sha256", "str?", "run.content.data_sha256", "of the content of its data, as it was read"),
    Column("checkpoints_sha256", "str?", "run.content.checkpoints_sha256", "of the checkpoints; null without any"),
    METHOD,
    Column("leaves", "str?", "run.experiment.algorithm.leaves", "what leaves a participant: nothing, statistics, "
           "operator, adapter, head, auxiliary model, sub-model or model"),
)  # fmt: skip

ROUNDS = (
    *OF_RUN,
    Column("round", "int", "round", "0: the state before any federated round"),
    Column("stage", "str", "stage", "local (round 0, and where nothing is shared), federated or finetune"),
    Column("accuracy_mean", "float?", "scores.accuracy.mean", "on the global test set, over the participants scored"),
    Column("accuracy_std", "float?", "scores.accuracy.std", "the same: spread over participants"),
    Column("accuracy_min", "float?", "scores.accuracy.min", "the same: worst participant"),
    Private(
        "accuracy_local_mean",
        "float?",
        "scores.accuracy_local.mean",
        "weighted by each label mix; tokens: accuracy_val",
    ),
    Private("accuracy_local_std", "float?", "scores.accuracy_local.std", "the same: spread over participants"),
    Private("accuracy_local_min", "float?", "scores.accuracy_local.min", "the same: worst participant"),
    Private("accuracy_val_mean", "float?", "scores.accuracy_val.mean", "on own validation data: for tuning"),
    Column("accuracy_global", "float?", "report.accuracy_global", "of the server's own model; null where it has none"),
    Column("loss_mean", "float?", "scores.loss.mean", "on the global test set, over the participants scored"),
    Private("train_loss", "float?", "scores.train_loss.mean", "over the last local epoch, over participants"),
    Column("bytes_up", "int", "bytes_up", "sent by the cohort, by numel x itemsize", "bytes"),
    Column(
        "bytes_down",
        "int",
        "bytes_down",
        "received, also by those who then raised or dropped out",
        "bytes",
    ),
    Column("bytes_up_total", "int", "bytes_up_total", "sent since round 0", "bytes"),
    Column("bytes_down_total", "int", "bytes_down_total", "received since round 0, with bytes_once", "bytes"),
    Column("flops", "int?", "flops", "of the cohort's training, forward and backward, by count"),
    Column("wall_seconds", "float", "wall_seconds", "without writing the tables", "s"),
    Column("retries", "int", "report.retries", "calls that were repeated"),
    Column("participants", "int", "participants", "sampled in this round, over-selection included"),
    Column("state_sha256", "str", "report.state_sha256", "of the server's state and all private states"),
    Column("bytes_moved", "int?", "report.bytes_moved", "that physically moved inside the cluster", "bytes"),
    Column("seam_bytes_up", "int?", "report.traffic.up", "bytes_up by the runtime's own count", "bytes"),
    Column("seam_bytes_down", "int?", "report.traffic.down", "bytes_down by the runtime's own count", "bytes"),
    Private("accuracy_val_std", "float?", "scores.accuracy_val.std", "accuracy_val: spread over participants"),
    Private("accuracy_val_min", "float?", "scores.accuracy_val.min", "accuracy_val: worst participant"),
    Column("failed", "int", "failed", "participants that raised, in training or in scoring, where the run goes on"),
    Column("precision_mean", "float?", "scores.precision.mean", "of entities; null unless token classes tag entities"),
    Column("recall_mean", "float?", "scores.recall.mean", "of entities"),
    Column("f1_mean", "float?", "scores.f1.mean", "of entities"),
    Column("coverage", "float?", "report.coverage", "share of the target trained so far; null where all is, always"),
    Column("coverage_min", "float?", "report.coverage_min", "the smallest coverage of any matrix"),
    Column(
        "simulated_seconds",
        "float?",
        "report.simulated_seconds",
        "simulated time the server waits in this round",
        "s",
    ),
    Column("late", "int?", "late", "of the cohort: updates that came when the round was over"),
    Column("dropped_out", "int?", "dropped_out", "received what was sent and were not heard of again"),
    Column("excluded", "int?", "excluded", "whose device is too small for the method"),
    Private(
        "metrics",
        "str?",
        "metrics",
        "JSON: means, by weight, of the clients' metrics in time",
    ),
    PRESET,
    METHOD,
    Column("bytes_once", "int?", "bytes_once", "public models, downloaded by those who then began", "bytes"),
    Private(
        "accuracy_val_even_mean",
        "float?",
        "scores.accuracy_val_even.mean",
        "accuracy_val with the participant's classes weighted evenly: for tuning of accuracy_mean",
    ),
    Column("epsilon", "float?", "spent.epsilon", "spent by participants since round 0, at delta; null without noise"),
    Column("delta", "float?", "spent.delta", "for which epsilon is computed"),
    Column("noise_multiplier", "float?", "spent.noise_multiplier", "standard deviation of a round's noise over clip"),
    Private("clipped_share", "float?", "clipped_share", "of the updates in time: clipped, without noise: no part of "
            "what epsilon covers"),
)  # fmt: skip

CLIENTS = (
    *OF_RUN,
    Column("round", "int", "round", "as in rounds"),
    Column("client", "int", "info.id", "the participant"),
    Column("tier", "str?", "info.tier", "its tier"),
    Private("num_examples", "int?", "info.num_examples", "training examples it holds; null with publish alone"),
    Column("num_test_examples", "int?", "report.num_test_examples", "it was scored on"),
    Private("accuracy", "float?", "report.accuracy", "of the model it would deploy, on the global test set"),
    Private("accuracy_local", "float?", "report.accuracy_local", "weighted by its label mix; tokens: accuracy_val"),
    Private("accuracy_val", "float?", "report.accuracy_val", "on its own validation data: for tuning"),
    Private("loss", "float?", "report.loss", "on the global test set"),
    Private("train_loss", "float?", "report.train_loss", "over the last local epoch"),
    Column("bytes_up", "int", "report.bytes_up", "it sent, by numel x itemsize", "bytes"),
    Column("bytes_down", "int", "report.bytes_down", "it received", "bytes"),
    Private("train_seconds", "float?", "report.train_seconds", "of local work, without scoring", "s"),
    Private("flops", "int?", "report.flops", "of its training, forward and backward, by count"),
    Column("peak_memory_bytes", "int?", "report.peak_memory_bytes", "high-water mark of its process (on a GPU: of its "
           "allocations) during the call; null where it cannot be read", "bytes"),
    Column("host", "str?", "host", "the process it was in"),
    Column("node", "str?", "node", "the machine it was on"),
    Column("retries", "int", "retries", "calls of it that were repeated"),
    Column("stage", "str", "stage", "as in rounds"),
    Column("model", "str?", "model", "its small form, for example 64x2"),
    Column("trainable_params", "int?", "report.trainable_params", "trained in this round", "scalars"),
    Column("upload_params", "int?", "report.upload_params", "in its upload", "scalars"),
    Private("precision", "float?", "report.precision", "of entities, on the global test set"),
    Private("recall", "float?", "report.recall", "of entities"),
    Private("f1", "float?", "report.f1", "of entities"),
    Private("small_sha256", "str?", "report.small_sha256", "of the small model it trained, in the round it did"),
    Private("simulated_seconds", "float?", "report.simulated_seconds", "from the payload to the update, and of making "
            "its private state where it did, by its device", "s"),
    Column("outcome", "str?", "report.outcome", "in_time, late, dropped_out, excluded or failed; null where it was "
           "only scored"),
    Private("metrics", "str?", "metrics", "JSON: what its method reported (ClientUpdate.metrics, client_scores)"),
    PRESET,
    METHOD,
    Private("error", "str?", "report.error", "the traceback's last line, where it raised and the run went on"),
    Column("bytes_once", "int?", "report.bytes_once", "of the public models it began with, where it did", "bytes"),
    Private("accuracy_val_even", "float?", "report.accuracy_val_even", "accuracy_val, its classes weighted evenly"),
)  # fmt: skip

PROFILE = (
    *OF_RUN,
    Column("round", "int", "round", "as in rounds"),
    Column("place", "str", "place", "driver, aggregator or host N"),
    Column("broadcast_seconds", "float", "phases.broadcast", "payloads are made, or arrive", "s"),
    Column(
        "compute_seconds", "float", "phases.compute", "participants train and are scored; aggregator: its model is", "s"
    ),
    Column("sum_seconds", "float", "phases.sum", "updates are added up", "s"),
    Column(
        "write_seconds",
        "float",
        "phases.write",
        "states and hashes; driver: tables; host: the rest of its updates",
        "s",
    ),
    Column("idle_seconds", "float", "phases.idle", "the rest of the round", "s"),
)

ATTACKS = (
    *OF_RUN,
    METHOD,
    Column("round", "int", "round", "whose updates were attacked; deployed models: the last"),
    Column("client", "int?", "client", "the participant attacked; null for a value over several"),
    Column("attack", "str", "attack", "as docs/audits.md names it"),
    Column("knowledge", "str", "knowledge", "of the attacker: shared, ancestor or intermediate"),
    Column("metric", "str", "metric", "what was measured, for example auc, psnr or top1; chance: by guessing alone"),
    Column("value", "float", "value", "of the metric; psnr in dB, all others between -1 and 1"),
    Column("low", "float?", "low", "lower end of a 95 % interval; null where one value has none"),
    Column("high", "float?", "high", "its upper end"),
)

ROC = (
    *OF_RUN,
    METHOD,
    *(column for column in ATTACKS if column.name in ("round", "client", "attack", "knowledge")),
    Column("fpr", "float", "fpr", "share of others above a threshold"),
    Column("tpr", "float", "tpr", "share of members above it: at no more others, none tells more"),
)

COLUMNS: Mapping[str, Sequence[Column]] = {
    "runs": RUNS,
    "rounds": ROUNDS,
    "clients": CLIENTS,
    "profile": PROFILE,
    "attacks": ATTACKS,
    "roc": ROC,
}
TABLES: Mapping[str, pa.Schema] = {
    table: pa.schema([column.field for column in columns], metadata={SCHEMA_KEY: str(SCHEMA_VERSION).encode()})
    for table, columns in COLUMNS.items()
}
# Of every run: `profile` is written with `--profile` alone, `attacks` and `roc` by `fedsim audit`.
SCHEMAS = {table: schema for table, schema in TABLES.items() if table not in ("profile", "attacks", "roc")}
# Of what participants would deploy at the end: read without the rest of `clients`.
DEPLOYED = ("run_id", "algorithm", "seed", "round", "client", "tier", "num_examples", "accuracy", "accuracy_local")
PRIVATE = {table: frozenset(c.name for c in columns if c.private) for table, columns in COLUMNS.items()}
_GETTERS = {table: {c.name: attrgetter(c.source) for c in columns} for table, columns in COLUMNS.items()}


def row_of(table: str, record: Any, publish: bool = False) -> dict[str, Any]:
    """A record as a row of a table. - `publish`: what is private is left out, and not even looked at."""
    hidden = PRIVATE[table] if publish else ()
    return {name: None if name in hidden else get(record) for name, get in _GETTERS[table].items()}


def columns_of(table: str, records: Sequence[Any], publish: bool = False) -> dict[str, list]:
    """Records of one run as a table, column by column: there may be thousands, so what is the run's is read once."""
    found: dict[str, list] = {}
    for column in COLUMNS[table]:
        if publish and column.private:
            found[column.name] = [None] * len(records)
            continue
        get, of_the_run = _GETTERS[table][column.name], column.source.startswith("run.")
        found[column.name] = [get(records[0])] * len(records) if of_the_run and records else list(map(get, records))
    return found


def reference() -> str:
    """The page of the docs about the tables."""
    about = {
        "runs": "One row for every run that finished or failed.",
        "rounds": "One row for every round, round 0 included.",
        "clients": "One row for every participant and round in which it was sampled or scored.",
        "profile": "One row for every place and round: where the time went. Written with `--profile`.",
        "attacks": "One row for every value that an attack measured. Written by `fedsim audit` (audits.md).",
        "roc": "One row for every point of the curves of `attacks` on membership: at most 60 a curve, evenly spread in "
        "the logarithm of `fpr`. `client` null: all participants' scores as one.",
    }
    lines = [
        "# Tables",
        "",
        "Made from `fedsim/results/columns.py`. A type with `?` may be null. `source` is where the value comes from:",
        "a path from the row's record in `fedsim/results/records.py`. `private`: null in runs with `publish=True`",
        "([privacy.md](privacy.md)).",
    ]
    for table, columns in COLUMNS.items():
        lines += ["", f"## {table}", "", about[table], "", "| column | type | unit | private | meaning | source |"]
        lines += ["|---|---|---|---|---|---|", *_rows(columns)]
    return "\n".join(lines) + "\n"


def _rows(columns: Iterable[Column]) -> Iterable[str]:
    for c in columns:
        yield f"| `{c.name}` | {c.kind} | {c.unit} | {'yes' if c.private else ''} | {c.meaning} | `{c.source}` |"


if __name__ == "__main__":
    print(reference(), end="")
