"""From what a round reported to the rows of the three tables. The columns' meanings are in `fedsim.results.tables`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsim.engine.cohort import Member, RoundCohort
from fedsim.engine.cost import Cost, whole
from fedsim.experiment import Experiment
from fedsim.results.machine import versions
from fedsim.results.provenance import git_commit, hardware
from fedsim.runtime.base import PHASES


Row = dict[str, Any]


def client_columns(
    experiment: Experiment, run_id: str, population: Sequence[Member], round: int, noted: Mapping[int, Mapping]
) -> dict[str, list]:
    """The participants that trained or were scored in this round, column by column: there may be thousands."""
    ids = sorted(noted)
    notes, infos = [noted[id_] for id_ in ids], [population[id_].info for id_ in ids]

    def each(name: str, otherwise: int | None = None) -> list:
        return [note.get(name, otherwise) for note in notes]

    def all_alike(value: Any) -> list:
        return [value] * len(ids)

    return {
        "run_id": all_alike(run_id),
        "algorithm": all_alike(experiment.algorithm.name),
        "seed": all_alike(experiment.seed),
        "round": all_alike(round),
        "client": ids,
        "tier": [info.tier for info in infos],
        "num_examples": [info.num_examples for info in infos],
        "num_test_examples": each("num_test_examples"),
        "accuracy": each("accuracy"),
        "accuracy_local": each("accuracy_local"),
        "accuracy_val": each("accuracy_val"),
        "loss": each("loss"),
        "train_loss": each("train_loss"),
        "bytes_up": each("bytes_up", 0),
        "bytes_down": each("bytes_down", 0),
        "train_seconds": each("train_seconds"),
        "flops": each("flops"),
        "peak_memory_bytes": each("peak_memory_bytes"),
        "host": [None if host is None else str(host) for host in each("host")],
        "node": each("node"),
        "retries": each("retries", 0),
        "stage": all_alike(stage_of(experiment, round)),
        "model": [str(info.form) for info in infos],
        "trainable_params": each("trainable_params"),
        "upload_params": each("upload_params"),
        "precision": each("precision"),
        "recall": each("recall"),
        "f1": each("f1"),
        "small_sha256": each("small_sha256"),
        "simulated_seconds": each("simulated_seconds"),
        "outcome": [outcome(note) for note in notes],
        "metrics": [None if metrics is None else json.dumps(metrics) for metrics in each("metrics")],
    }


def outcome(note: Mapping[str, Any]) -> str | None:
    """What became of a participant's part in a round; None where it was only scored."""
    for name in ("excluded", "dropped_out", "late"):
        if name in note:
            return name
    return "failed" if "error" in note else "in_time" if "bytes_up" in note else None


def round_row(
    experiment: Experiment,
    run_id: str,
    round: int,
    round_cohort: RoundCohort,
    report: Mapping[str, Any],
    before: Row | None,
    wall_seconds: float,
) -> Row:
    """One row a round. `before` is the row of the round before: totals go on from it."""
    noted = report["rows"]
    up = sum(note.get("bytes_up", 0) for note in noted.values())
    down = sum(note.get("bytes_down", 0) for note in noted.values())
    accuracy, local, validation, precision, recall, f1 = (
        statistics([note.get(name) for note in noted.values()])
        for name in ("accuracy", "accuracy_local", "accuracy_val", "precision", "recall", "f1")
    )
    return {
        "run_id": run_id,
        "algorithm": experiment.algorithm.name,
        "seed": experiment.seed,
        "round": round,
        "stage": stage_of(experiment, round),
        "accuracy_mean": accuracy[0],
        "accuracy_std": accuracy[1],
        "accuracy_min": accuracy[2],
        "accuracy_local_mean": local[0],
        "accuracy_local_std": local[1],
        "accuracy_local_min": local[2],
        "accuracy_val_mean": validation[0],
        "accuracy_global": report.get("accuracy_global"),
        "loss_mean": statistics([note.get("loss") for note in noted.values()])[0],
        "train_loss": statistics([note.get("train_loss") for note in noted.values()])[0],
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_total": up + (before["bytes_up_total"] if before else 0),
        "bytes_down_total": down + (before["bytes_down_total"] if before else 0),
        "flops": sum(note.get("flops") or 0 for note in noted.values()),
        "wall_seconds": wall_seconds,
        "retries": report["retries"],
        "participants": len(round_cohort.reached) + len(round_cohort.excluded),
        "state_sha256": report["state_sha256"],
        "bytes_moved": report["bytes_moved"],
        "seam_bytes_up": report["seam_bytes_up"],
        "seam_bytes_down": report["seam_bytes_down"],
        "accuracy_val_std": validation[1],
        "accuracy_val_min": validation[2],
        "failed": sum("error" in note for note in noted.values()),
        "coverage": report["coverage"],
        "coverage_min": report["coverage_min"],
        "precision_mean": precision[0],
        "recall_mean": recall[0],
        "f1_mean": f1[0],
        "simulated_seconds": report["simulated_seconds"],
        "late": sum("late" in note for note in noted.values()),
        "dropped_out": len(round_cohort.dropped_out),
        "excluded": len(round_cohort.excluded),
        "metrics": mean_metrics(list(noted.values())),
    }


def mean_metrics(notes: Sequence[Mapping[str, Any]]) -> str | None:
    """JSON of each metric's mean over those who reported it, by the weights of their updates; None if nobody did."""
    totals: dict[str, list[float]] = {}
    for note in notes:
        for name, value in (note.get("metrics") or {}).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + note["weight"] * value, total[1] + note["weight"]
    means = {name: total / weight for name, (total, weight) in sorted(totals.items()) if weight}
    return json.dumps(means) if means else None


def profile_rows(
    experiment: Experiment, run_id: str, round: int, spent: Mapping[str, Mapping[str, float]], seconds: float
) -> list[Row]:
    """One row a place: where the `seconds` of a round went there. What is not accounted for was waited."""
    rows = []
    for place, phases in spent.items():
        known = {phase: phases.get(phase, 0.0) for phase in PHASES}
        about = {"run_id": run_id, "algorithm": experiment.algorithm.name, "seed": experiment.seed, "round": round}
        busy = {f"{phase}_seconds": taken for phase, taken in known.items()}
        rows.append(about | {"place": place} | busy | {"idle_seconds": max(0.0, seconds - sum(known.values()))})
    return rows


def run_row(
    experiment: Experiment,
    *,
    run_id: str,
    suite: str,
    code_sha256: str,
    cost: Cost,
    federation: str,
    labels: list[list[int]] | None,
    numerics: Mapping[str, Any],
    wall_seconds: float,
    error: str | None,
    command: str | None,
) -> Row:
    """The one row of a run that finished, or failed with `error`."""
    return {
        "run_id": run_id,
        "suite": suite,
        "algorithm": experiment.algorithm.name,
        "preset": experiment.algorithm.preset_name or None,
        "dataset": experiment.task.data.name,
        "family": experiment.task.family,
        "partition": experiment.partition.scheme,
        "alpha": experiment.partition.alpha if experiment.partition.scheme in ("dirichlet", "by_size") else None,
        "participants": experiment.participants,
        "cohort": experiment.cohort or experiment.participants,
        "rounds": experiment.rounds,
        "seed": experiment.seed,
        "target_params": cost.target_params,
        "trainable_params": float(cost.mean("trainable_params")),
        "upload_params": float(cost.mean("upload_params")),
        "status": "failed" if error else "finished",
        "wall_seconds": wall_seconds,
        "git_commit": git_commit(),
        "code_sha256": code_sha256,
        "versions": json.dumps(versions()),
        "hardware": json.dumps(hardware() | {"numerics": numerics}),
        "config": experiment.canonical_json(),
        "bytes_per_upload": round(whole(cost.mean("upload_bytes"))),
        "model": str(experiment.target),
        "federation_sha256": federation,
        "held_bytes": max(each.private_bytes + each.download_bytes for each in cost.participants),
        "peak_bytes": max(each.peak_bytes for each in cost.participants),
        "error": error,
        "command": command,
        "labels": None if labels is None else json.dumps(labels),
    }


def statistics(values: Sequence[float | None]) -> tuple[float | None, float | None, float | None]:
    """Mean, standard deviation and minimum over participants that have a value; None where nobody has."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return None, None, None
    return float(known.mean()), float(known.std()), float(known.min())


def stage_of(experiment: Experiment, round: int) -> str:
    """Round 0 is each participant alone; what the others are, the algorithm says."""
    return "local" if round == 0 else experiment.algorithm.stage(round)
