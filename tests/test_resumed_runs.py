"""A run that was cut goes on as if it had not been, and one that was finished is not computed again."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fedsim
import fedsim.results.store
import fedsim.simulation
import fedsim.sweeps.runner
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import ClientContext, ClientUpdate, Steps
from fedsim.core.tree import Tree
from fedsim.engine.cohort import members
from fedsim.engine.inbox import Inbox
from fedsim.engine.participant import Participant, Reply
from fedsim.experiment import Experiment
from fedsim.learning.steps import Asking, run_alone
from fedsim.learning.task import load_task
from fedsim.results.provenance import code_sha256
from fedsim.results.recorder import Recorder
from fedsim.results.records import Row
from fedsim.results.store import RunStore
from fedsim.results.tables import load
from fedsim.runtime.base import Runtime
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import check_folder, run_all
from tests.support.inline_runs import Cut, Interrupted, Told, assert_same_numbers, inline


# cut and resumed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_cut_after_a_round_goes_on_as_if_it_had_not_been(
    undisturbed: tuple[Experiment, Path], after: int, tmp_path: Path
) -> None:
    experiment, out = undisturbed
    with pytest.raises(Interrupted):
        inline(experiment, tmp_path, progress=Cut(after))
    store = RunStore(tmp_path, experiment.run_id, code_sha256(experiment.algorithm))
    assert store.status() == "unfinished"
    readable = load(tmp_path)
    assert list(readable.rounds["round"]) == list(range(after + 1)) and not len(readable.runs)

    progress = Told()
    inline(experiment, tmp_path, resume=True, progress=progress)
    assert (progress.first, progress.rounds) == (after + 1, list(range(after + 1, 3)))
    assert store.status() == "finished"
    assert_same_numbers(out, tmp_path)


def cut_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last participant of round 2 never answers; the others' private state of round 2 is on disk."""
    real = Participant.train

    def train(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        if (round, self.member.info.id) == (2, 2):
            raise Interrupted
        return real(self, round, payload)

    monkeypatch.setattr(Participant, "train", train)


def cut_in_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is aggregated, but neither scored nor saved by the server."""
    real = Participant.score

    def score(self: Participant, round: int, payload: Mapping[str, torch.Tensor]) -> Asking[Reply]:
        if (round, self.member.info.id) == (2, 0):
            raise Interrupted
        return real(self, round, payload)

    monkeypatch.setattr(Participant, "score", score)


def cut_before_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of round 2 is on disk but what vouches for it."""
    real = Recorder.round

    def recorded(self: Recorder, round: int, *more: Any) -> Row:
        if round == 2:
            raise Interrupted
        return real(self, round, *more)

    monkeypatch.setattr(Recorder, "round", recorded)


def cut_between_rows_and_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of round 2 are on disk, the manifest still says 1."""
    real = fedsim.results.store.write_atomically

    def write_atomically(path: Path, data: bytes) -> None:
        if json.loads(data)["round"] == 2:
            raise Interrupted
        real(path, data)

    monkeypatch.setattr(fedsim.results.store, "write_atomically", write_atomically)


@pytest.mark.parametrize(
    "cut", [cut_in_training, cut_in_scoring, cut_before_the_manifest, cut_between_rows_and_manifest]
)
def test_a_run_cut_within_a_round_repeats_that_round(
    undisturbed: tuple[Experiment, Path],
    cut: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment, out = undisturbed
    with monkeypatch.context() as patched:
        cut(patched)
        with pytest.raises(Interrupted):
            inline(experiment, tmp_path)
    progress = Told()
    inline(experiment, tmp_path, resume=True, progress=progress)
    assert progress.rounds == [2]
    assert_same_numbers(out, tmp_path)


def test_resume_with_nothing_finished_starts_from_the_beginning(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment
) -> None:
    progress = Told()
    inline(tiny_experiment, tmp_path, resume=True, progress=progress)
    assert progress.first == 0
    assert_same_numbers(tiny_run, tmp_path)


def test_a_resumed_run_reads_private_state_from_disk(
    tmp_path: Path, alone: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        inline(alone, tmp_path, progress=Cut(0))
    real = FedGrow.client_init

    def client_init(self: FedGrow, ctx: ClientContext) -> Steps[Tree]:
        assert not len(ctx.train), "made again"  # without data it is only being counted
        return real(self, ctx)

    monkeypatch.setattr(FedGrow, "client_init", client_init)
    inline(alone, tmp_path, resume=True)
    assert list(load(tmp_path).rounds["round"]) == [0, 1, 2]


def test_a_repeated_call_gives_the_same_answer(tmp_path: Path, alone: Experiment) -> None:
    """As after the aggregator was lost: the participant has done round 1, and is asked for round 1 once more."""
    member = members(alone, load_task(alone.task, None))[0]
    participant = Participant(alone, member, None, str(tmp_path), {}, Inbox())
    run_alone(participant.begin(0, {}))
    hashes = [run_alone(participant.train(round, {})).state_sha256 for round in (1, 1, 2, 1, 2)]
    assert hashes[0] == hashes[1] == hashes[3]
    assert hashes[2] == hashes[4] != hashes[0]


def test_nobody_can_write_into_what_was_sent(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FedGrow.client_update

    def rude(
        self: FedGrow, payload: Mapping[str, torch.Tensor], state: Tree, ctx: ClientContext
    ) -> Steps[tuple[ClientUpdate, Tree]]:
        outcome = yield from real(self, payload, state, ctx)
        for tensor in payload.values():
            tensor.zero_()
        return outcome

    monkeypatch.setattr(FedGrow, "client_update", rude)
    inline(tiny_experiment, tmp_path)
    assert_same_numbers(tiny_run, tmp_path)


# not computed twice ---------------------------------------------------------------------------------------------------


def refuses_to_start() -> Runtime:
    raise AssertionError("a runtime was asked for, though everything is finished")


def test_a_finished_run_is_not_computed_again(tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    check_folder(out, [tiny_experiment], resume=False)
    said = StringIO()
    console = Console(file=said, width=200)
    assert run_all([tiny_experiment], out=out, make_runtime=refuses_to_start, console=console) == []
    assert "finished before" in said.getvalue() and tiny_experiment.run_id in said.getvalue()
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_only_what_is_missing_of_several_runs_is_computed(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment
) -> None:
    out, progress = tmp_path / "out", Told()
    shutil.copytree(tiny_run, out)
    both = [tiny_experiment, dataclasses.replace(tiny_experiment, seed=1)]
    assert run_all(both, out=out, make_runtime=InlineRuntime, progress=progress) == []
    assert progress.rounds == [0, 1, 2]
    assert sorted(load(out).runs.seed) == [0, 1]


def test_results_of_other_sources_are_computed_again_and_that_is_said(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, progress, said = tmp_path / "out", Told(), StringIO()
    shutil.copytree(tiny_run, out)
    for module in (fedsim.sweeps.runner, fedsim.simulation):
        monkeypatch.setattr(module, "code_sha256", lambda *_: "other sources")
    assert RunStore(out, tiny_experiment.run_id, "other sources").status() == "outdated"
    console = Console(file=said, width=200)
    assert run_all([tiny_experiment], out=out, make_runtime=InlineRuntime, progress=progress, console=console) == []
    assert progress.rounds == [0, 1, 2]
    assert "computed again" in said.getvalue()
    assert list(load(out).runs.code_sha256) == ["other sources"]
    assert list(load(out).rounds.state_sha256) == list(load(tiny_run).rounds.state_sha256)


def test_an_unfinished_run_of_other_sources_is_not_resumed(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        inline(tiny_experiment, tmp_path, progress=Cut(1))
    progress = Told()
    for module in (fedsim.sweeps.runner, fedsim.simulation):
        monkeypatch.setattr(module, "code_sha256", lambda *_: "other sources")
    run_all([tiny_experiment], out=tmp_path, make_runtime=InlineRuntime, progress=progress)
    assert progress.rounds == [0, 1, 2]
