"""Inline runs: their tables, their accounts, and participants that raise."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fedsim
import fedsim.results.store
import fedsim.simulation
import fedsim.sweeps.runner
from fedsim.algorithm import ClientUpdate, weighted_mean, weighted_sum
from fedsim.core.tree import sha256, sha256_of_text
from fedsim.engine.cohort import cohort_of
from fedsim.engine.cost import cost_of
from fedsim.engine.participant import Participant, Reply
from fedsim.experiment import Experiment
from fedsim.learning.steps import Asking
from fedsim.results.provenance import code_sha256
from fedsim.results.tables import SCHEMAS, load
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import RunFailed
from fedsim.storage.checkpoint import Versions, private_of
from fedsim.sweeps.runner import run_all
from tests.support.inline_runs import Told, assert_same_numbers, inline, numbers


# tables ---------------------------------------------------------------------------------------------------------------


def test_a_run_writes_all_tables(tiny_run: Path, tiny_experiment: Experiment) -> None:
    results = load(tiny_run)
    assert [len(frame) for frame in (results.runs, results.rounds, results.clients)] == [1, 3, 9]
    for name in SCHEMAS:
        assert list(getattr(results, name).columns) == SCHEMAS[name].names
        assert set(getattr(results, name).run_id) == {tiny_experiment.run_id}
        assert len(pd.read_parquet(tiny_run / name)) == len(getattr(results, name))
    assert list(results.rounds["round"]) == [0, 1, 2]
    assert list(results.rounds.stage) == ["local", "federated", "federated"]
    assert [tuple(pair) for pair in results.clients[["round", "client"]].to_numpy()] == [
        (round, client) for round in range(3) for client in range(3)
    ]


def test_the_row_of_a_run_says_where_its_numbers_come_from(tiny_run: Path, tiny_experiment: Experiment) -> None:
    (row,) = load(tiny_run).runs.to_dict("records")
    assert (row["algorithm"], row["preset"], row["dataset"], row["family"]) == ("fedgrow", "paper", "digits", "vit")
    assert (row["partition"], row["alpha"], row["participants"], row["cohort"]) == ("dirichlet", 0.5, 3, 3)
    assert (row["rounds"], row["seed"], row["status"]) == (2, 0, "finished")
    assert pd.isna(row["error"])
    assert row["code_sha256"] == code_sha256(tiny_experiment.algorithm)
    assert json.loads(row["config"]) == json.loads(tiny_experiment.canonical_json())
    assert {"python", "torch", "transformers", "ray", "fedsim"} <= set(json.loads(row["versions"]))
    assert {"cpu", "cores", "memory_mb"} <= set(json.loads(row["hardware"]))
    cost = cost_of(tiny_experiment, {})
    assert row["target_params"] == cost.target_params
    assert row["trainable_params"] == pytest.approx(cost.mean("trainable_params"))
    assert row["upload_params"] == cost.mean("upload_params")
    assert row["bytes_per_upload"] == cost.mean("upload_bytes") == 4 * row["upload_params"]
    labels = json.loads(row["labels"])
    clients = load(tiny_run).clients.query("round == 0")
    assert [sum(histogram) for histogram in labels] == list(clients.num_examples)


def test_a_row_of_rounds_sums_up_its_rows_of_clients(undisturbed: tuple[Experiment, Path]) -> None:
    results = load(undisturbed[1])
    for _, row in results.rounds.iterrows():
        clients = results.clients[results.clients["round"] == row["round"]]
        assert row.accuracy_mean == pytest.approx(clients.accuracy.mean(), abs=1e-12)
        assert row.accuracy_std == pytest.approx(clients.accuracy.std(ddof=0), abs=1e-12)
        assert row.accuracy_min == clients.accuracy.min()
        assert row.accuracy_local_mean == pytest.approx(clients.accuracy_local.mean(), abs=1e-12)
        assert row.accuracy_val_mean == pytest.approx(clients.accuracy_val.mean(), abs=1e-12)
        assert row.loss_mean == pytest.approx(clients.loss.mean(), abs=1e-12)
        assert row.train_loss == pytest.approx(clients.train_loss.mean(), abs=1e-12)
        assert (row.bytes_up, row.bytes_down) == (clients.bytes_up.sum(), clients.bytes_down.sum())
        assert row.flops == clients.flops.sum() > 0
        assert row.failed == 0 and row.participants == 3
    assert list(results.rounds.bytes_up_total) == list(results.rounds.bytes_up.cumsum())
    assert list(results.rounds.bytes_down_total) == list(results.rounds.bytes_down.cumsum())
    assert results.rounds.state_sha256.nunique() == 3


def test_state_hash_is_over_the_servers_state_and_the_private_ones(undisturbed: tuple[Experiment, Path]) -> None:
    experiment, out = undisturbed
    folder = out / "checkpoints" / experiment.run_id

    def stored(versions: Versions) -> str:
        found = versions.load(before=100)
        assert found is not None
        return sha256(found[1])

    private = ";".join(f"{i}:{stored(private_of(folder / 'private', i))}" for i in range(3))
    expected = sha256_of_text(f"{stored(Versions(folder, 'server'))}|{private}")
    assert load(out).rounds.state_sha256.iloc[-1] == expected


def test_a_second_run_gives_the_same_numbers_and_another_seed_others(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment
) -> None:
    torch.manual_seed(99)
    inline(tiny_experiment, tmp_path / "again", suite="")
    assert_same_numbers(tiny_run, tmp_path / "again")
    inline(dataclasses.replace(tiny_experiment, seed=1), tmp_path / "other")
    assert not set(load(tmp_path / "other").rounds.state_sha256) & set(load(tiny_run).rounds.state_sha256)


def test_cohorts_and_rounds_without_scores(tmp_path: Path, tiny_experiment: Experiment) -> None:
    experiment = dataclasses.replace(tiny_experiment, cohort=2, scored="cohort", eval_every=2, rounds=3)
    progress = Told()
    inline(experiment, tmp_path, progress=progress)
    results = load(tmp_path)
    assert progress.rounds == [0, 1, 2, 3]
    seen: set[int] = set()
    for round in range(4):
        cohort = cohort_of(experiment, round)
        rows = results.clients[results.clients["round"] == round].set_index("client")
        assert sorted(rows.index) == ([0, 1, 2] if round == 3 else list(cohort))
        sent = set(rows.index[rows.bytes_up > 0])
        assert sent == (set() if round == 0 else set(cohort))
        assert rows.accuracy.notna().all() == (round in (0, 2, 3))
        assert rows.accuracy.isna().all() == (round == 1)
        # Whoever takes part for the first time makes its private state now, and that is counted.
        late = set(rows.index) - seen
        assert all(rows.trainable_params[i] > rows.trainable_params[min(sent)] for i in late & sent)
        assert all(rows.flops[i] > 0 for i in late)
        seen |= set(rows.index)
    rounds = results.rounds.set_index("round")
    assert list(rounds.participants) == [2, 2, 2, 2]
    assert rounds.accuracy_mean.isna().tolist() == [False, True, False, False]
    assert rounds.loss_mean.isna().tolist() == [False, True, False, False]


def test_no_validation_share_means_no_validation_score(tmp_path: Path, tiny_experiment: Experiment) -> None:
    inline(dataclasses.replace(tiny_experiment, validation_share=0.0, rounds=1), tmp_path)
    results = load(tmp_path)
    assert results.clients.accuracy_val.isna().all()
    assert results.rounds.accuracy_val_mean.isna().all()
    assert results.clients.accuracy.notna().all()


def test_progress_hears_of_every_participant(tmp_path: Path, tiny_experiment: Experiment) -> None:
    progress = Told()
    inline(dataclasses.replace(tiny_experiment, rounds=1), tmp_path, progress=progress)
    assert progress.first == 0
    expected = [(method, done, 3) for method in ("begin", "score", "train", "score") for done in (1, 2, 3)]
    assert progress.within_calls == expected


def test_run_from_a_notebook(tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment) -> None:
    results = fedsim.run(tiny_experiment, out=tmp_path / "mine")
    pd.testing.assert_frame_equal(numbers(results)[0], numbers(fedsim.load(tiny_run))[0])


# bytes ----------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_tensors_that_cross_the_participants_boundary(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[tuple[int, int], tuple[int, int]] = {}
    real = Participant.train

    def watched(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        reply = yield from real(self, round, payload)
        assert reply.update is not None
        down, up = (sum(len(t.numpy().tobytes()) for t in tree.values()) for tree in (payload, reply.update.tree))
        counted[round, self.member.info.id] = down, up
        return reply

    monkeypatch.setattr(Participant, "train", watched)
    inline(tiny_experiment, tmp_path)
    results = load(tmp_path)
    assert len(counted) == 6 and all(down == up > 1000 for down, up in counted.values())
    for row in results.clients.to_dict("records"):
        assert (row["bytes_down"], row["bytes_up"]) == counted.get((row["round"], row["client"]), (0, 0))
    predicted = cost_of(tiny_experiment, {})
    for row in results.rounds.to_dict("records"):
        down, up = (sum(pair[i] for (round, _), pair in counted.items() if round == row["round"]) for i in (0, 1))
        assert (row["bytes_down"], row["bytes_up"]) == (down, up)
        assert (row["seam_bytes_down"], row["seam_bytes_up"]) == (down, up)
        assert up == (3 * predicted.mean("upload_bytes") if row["round"] else 0)
        assert row["bytes_moved"] == 0


def test_nothing_is_sent_without_federation(alone_run: Path) -> None:
    rounds = load(alone_run).rounds
    for column in ("bytes_up", "bytes_down", "bytes_up_total", "bytes_down_total", "seam_bytes_up", "seam_bytes_down"):
        assert list(rounds[column]) == [0, 0, 0]


# participants that raise ----------------------------------------------------------------------------------------------


def breaking(monkeypatch: pytest.MonkeyPatch, method: str, when: tuple[int, int]) -> None:
    """One method of one participant raises in one round."""
    real = getattr(Participant, method)

    def broken(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        if (round, self.member.info.id) == when:
            raise ArithmeticError("two and two make five")
        return real(self, round, payload)

    monkeypatch.setattr(Participant, method, broken)


@pytest.mark.parametrize("method, when", [("train", (2, 1)), ("score", (1, 1)), ("begin", (0, 1))])
def test_a_participant_that_raises_stops_the_run(
    method: str,
    when: tuple[int, int],
    tmp_path: Path,
    tiny_run: Path,
    tiny_experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        breaking(patched, method, when)
        with pytest.raises(RunFailed) as error:
            inline(tiny_experiment, tmp_path)
    assert error.value.run_id == tiny_experiment.run_id
    assert "participant 1" in str(error.value)
    assert str(error.value).endswith("ArithmeticError: two and two make five")
    results = load(tmp_path)
    (row,) = results.runs.to_dict("records")
    assert row["status"] == "failed"
    assert row["error"] == "participant 1: ArithmeticError: two and two make five"
    assert list(results.rounds["round"]) == list(range(when[0]))

    inline(tiny_experiment, tmp_path, resume=True)  # once mended, it goes on
    assert_same_numbers(tiny_run, tmp_path)


def test_a_participant_that_raises_is_dropped_from_the_round(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: dict[int, list[ClientUpdate]] = {}
    breaking(monkeypatch, "train", (1, 1))
    real = Participant.train

    def watched(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        reply = yield from real(self, round, payload)
        assert reply.update is not None
        updates.setdefault(round, []).append(reply.update)
        return reply

    monkeypatch.setattr(Participant, "train", watched)
    experiment = dataclasses.replace(tiny_experiment, on_error="drop", rounds=1)
    run_id = inline(experiment, tmp_path)
    results = load(tmp_path)
    assert list(results.rounds.failed) == [0, 1]
    assert list(results.rounds.participants) == [3, 3]
    assert results.runs.status.item() == "finished"
    last = results.clients[results.clients["round"] == 1].set_index("client")
    assert (last.bytes_up > 0).tolist() == [True, False, True]
    assert last.accuracy.notna().all(), "it is scored with what it has"
    assert results.rounds.bytes_up.iloc[1] == last.bytes_up.sum()
    assert results.rounds.bytes_down.iloc[1] == results.rounds.seam_bytes_down.iloc[1], "who then raised received, too"
    assert last.outcome.tolist() == ["in_time", "failed", "in_time"]
    assert last.error.isna().tolist() == [True, False, True] and "ArithmeticError" in last.error[1]

    # The state is the mean over the others, added up in the experiment's chunks of two: (0), then (2).
    assert [update.client for update in updates[1]] == [0, 2]
    found = Versions(tmp_path / "checkpoints" / run_id, "server").load(before=2)
    assert found is not None
    state = found[1]
    assert sha256(state) == sha256(weighted_mean([weighted_sum([one]) for one in updates[1]], state))


def test_a_round_in_which_everybody_is_dropped_leaves_the_state(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        raise ArithmeticError("nobody can")

    monkeypatch.setattr(Participant, "train", broken)
    inline(dataclasses.replace(tiny_experiment, on_error="drop", rounds=1), tmp_path)
    rounds = load(tmp_path).rounds
    assert list(rounds.failed) == [0, 3]
    assert list(rounds.bytes_up) == [0, 0]
    assert rounds.state_sha256.nunique() == 1
    assert rounds.accuracy_mean.nunique() == 1


def test_one_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Participant.begin

    def broken(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        if self.experiment.seed == 0:
            raise ArithmeticError("not this seed")
        return real(self, round, payload)

    monkeypatch.setattr(Participant, "begin", broken)
    both = [dataclasses.replace(tiny_experiment, seed=seed, rounds=1) for seed in (0, 1)]
    (failure,) = run_all(both, out=tmp_path, make_runtime=InlineRuntime)
    assert failure.run_id == both[0].run_id
    assert load(tmp_path).runs.set_index("seed").status.to_dict() == {0: "failed", 1: "finished"}
    assert list(load(tmp_path).rounds.seed) == [1, 1]


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    runtime = InlineRuntime()
    assert torch.get_num_threads() == 1
    runtime.close()
    runtime.close()
    assert torch.get_num_threads() == before


def test_test_examples_are_the_same_for_every_participant(tiny_run: Path) -> None:
    clients = load(tiny_run).clients
    assert set(clients.num_test_examples) == {120}
    assert np.isfinite(clients.loss).all()
    assert clients.groupby("client").num_examples.nunique().eq(1).all()
