"""`fedsim audit`, from a run that keeps its updates to the table; and what an attacker knows at each level."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.lora import fedit
from fedgrow_algo.fedgrow import FedGrow
from fedsim.algorithm import Algorithm
from fedsim.cli import main
from fedsim.core.tree import flat
from fedsim.data.partition import Partition
from fedsim.data.source import digits, pydoc
from fedsim.experiment import Experiment, Tier
from fedsim.learning.task import TaskConfig
from fedsim.models import Form
from fedsim.privacy import Around, ExampleDP, told
from fedsim.privacy import audit as auditing
from fedsim.privacy.attacks.reconstruction import Inversion
from fedsim.privacy.attacks.replay import Exchange, Replay, change, knowledge, without_data
from fedsim.privacy.audit import audit
from fedsim.privacy.kept import opened_run
from fedsim.privacy.measures import POINTS
from fedsim.results.columns import TABLES
from fedsim.results.pictures import read_pictures
from fedsim.results.tables import load
from fedsim.storage.checkpoint import exchanges_of
from fedsim.testing import Federation
from tests.support.inline_runs import assert_same_numbers, inline
from tests.support.small_federation import LOCAL


def experiment(algorithm: Algorithm | None = None) -> Experiment:
    """Three participants with 36 digits each, two rounds."""
    algorithm = algorithm or FedAvg(lr=5e-2, epochs=1, batch_size=12, optimizer="sgd")
    task, tiers = TaskConfig(digits(limit=120), patch_size=4), (Tier("phone", Form(8, 1, heads=2)),)
    middle, target = Form(8, 1, heads=2), Form(16, 1, heads=2)
    return Experiment(algorithm, task, tiers, middle, target, Partition("iid"), participants=3, rounds=2)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept")
    inline(experiment(), out, keep_updates=True)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    inline(experiment(), out)
    return out


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "SEARCH", Inversion(starts=1, iterations=2))
    monkeypatch.setattr(told, "SEARCH_UPDATE", Inversion(starts=1, iterations=2))
    monkeypatch.setattr(auditing, "GRADIENTS", 8)


def test_a_private_step_hides_the_image(tmp_path: Path, quickly: None) -> None:
    """What comes back in closed form after a plain step of SGD (below) does not after a clipped and noised one."""
    private = ExampleDP(clip=1.0, noise_multiplier=1.0, delta=1e-3)
    inline(experiment(Around(experiment().algorithm, (private,))), tmp_path, keep_updates=True)
    audit(tmp_path, None, None, say=lambda text: None)
    table = load(tmp_path).attacks
    assert (table[(table.attack == "inputs") & (table.metric == "psnr")].value < 20).all()


def test_what_is_kept_changes_no_number_and_is_what_the_server_got(kept: Path, plain: Path) -> None:
    assert_same_numbers(kept, plain)
    run_id = experiment().run_id
    run = opened_run(kept, run_id, None, ())
    assert run.rounds == {1: [0, 1, 2], 2: [0, 1, 2]}
    first = [run.exchange(1, client) for client in range(3)]
    weights = [run.population[client].info.num_examples for client in range(3)]
    received = run.exchange(2, 0).received  # the mean of what was sent the round before
    for name, mean in received.items():
        sent = torch.stack([w * each.sent[name].double() for w, each in zip(weights, first, strict=True)])
        assert torch.allclose(mean.double(), sent.sum(0) / sum(weights), atol=1e-6)
    assert not list((plain / "checkpoints").rglob("exchange.*"))


def test_an_audit_writes_one_row_a_value(kept: Path, quickly: None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(kept, out)
    ((run_id, rows),) = audit(out, None, None).items()
    assert pq.read_schema(out / "attacks" / f"{run_id}.parquet").equals(TABLES["attacks"])
    table = load(out).attacks
    assert len(table) == len(rows) and {*table.run_id} == {run_id} and {*table.method} == {"fedavg"}
    assert {*table.attack} == {
        *("loss", "loss_deployed", "likelihood", "alignment", "residual", "labels", "labels_by_gradients"),
        *("inversion", "inversion_update", "inputs", "attribution"),
    }
    assert {*table.knowledge} == {"shared"}  # of FedAvg nothing is private
    bounded = table[table.low.notna()]
    assert (bounded.low <= bounded.value).all() and (bounded.value <= bounded.high).all()
    assert (table[(table.attack == "inputs") & (table.metric == "psnr")].value > 60).all()
    (top1,) = table[table.metric == "top1"].value
    assert top1 in (0, 1 / 3, 2 / 3, 1) and load(out).runs.run_id.tolist() == [run_id]
    roc = load(out).roc
    assert pq.read_schema(out / "roc" / f"{run_id}.parquet").equals(TABLES["roc"])
    assert {*roc.attack} == {"loss", "loss_deployed", "likelihood", "alignment", "residual"}
    lengths = roc.fillna({"client": -1}).groupby(["attack", "knowledge", "round", "client"]).size()
    assert all(lengths <= POINTS) and {*roc.client.dropna()} == {0, 1, 2}
    of_loss = [frame[(frame.attack == "loss") & (frame.client == 0) & (frame["round"] == 2)] for frame in (roc, table)]
    assert of_loss[0].tpr[of_loss[0].fpr <= 0.01].max() == of_loss[1].set_index("metric").value["tpr_at_1_percent"]
    images = read_pictures(out, run_id)
    assert {*images} == {"true", "inversion/shared", "inputs/shared"}
    off = np.abs(images["true"].astype(int) - images["inputs/shared"].astype(int))
    assert images["true"].shape == (8, 8, 1) and off.max() <= 1 and float(images["true"].std()) > 10
    again = audit(out, run_id, None)
    assert again == {run_id: rows}


def test_three_seeds_are_attacked_together_and_two_are_not(
    quickly: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "of_round", lambda run, round: iter(()))
    for seed in range(3):
        inline(dataclasses.replace(experiment(), rounds=1, seed=seed), tmp_path, keep_updates=True)
        if seed == 1:
            assert all(
                row["attack"] != "likelihood_online" for rows in audit(tmp_path, None, None).values() for row in rows
            )
    for rows in audit(tmp_path, None, None).values():
        found = [row for row in rows if row["attack"] == "likelihood_online" and row["metric"] == "auc"]
        assert [row["client"] for row in found] == [0, 1, 2, None]
        assert all(row["round"] == 1 and row["knowledge"] == "shared" for row in found)
        assert 0 <= found[-1]["value"] <= 1


def test_texts_are_audited_for_their_tokens(quickly: None, tmp_path: Path) -> None:
    """Seven of eight tokens, and where they stood, of a model of 16 coordinates: the last one predicts no other."""
    of_texts = TaskConfig(pydoc(max_length=8, limit=24), "gpt2")
    algorithm = FedAvg(lr=5e-2, epochs=1, batch_size=8, optimizer="sgd", clip=None)
    inline(dataclasses.replace(experiment(algorithm), task=of_texts, rounds=1), tmp_path, keep_updates=True)
    ((_, rows),) = audit(tmp_path, None, None).items()
    found = {(row["attack"], row["metric"]): row["value"] for row in rows if row["client"] is not None}
    assert found["dager", "token_recall"] == 7 / 8 and found["dager", "token_precision"] == 1
    assert found["tokens", "token_precision"] < 0.1  # the embedding is the head, too: all of its rows change
    assert not {"inversion", "inversion_update"} & {attack for attack, _ in found}


def test_a_command_audits_and_clean_frees_what_was_kept(
    kept: Path, quickly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run_id = tmp_path / "run", experiment().run_id
    shutil.copytree(kept, out)
    assert main(["audit", str(out), "--run", run_id, "--numerics", "native"]) == 0
    assert "loss_deployed" in capsys.readouterr().out
    assert read_pictures(out, run_id)
    assert main(["clean", str(out)]) == 0
    assert not read_pictures(out, run_id)
    assert not list((out / "checkpoints").rglob("exchange.*")) and len(load(out).attacks)
    assert main(["audit", str(out), "--numerics", "native"]) == 2
    assert "--keep-updates" in capsys.readouterr().err


def test_runs_that_kept_nothing_and_folders_without_runs_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kept no updates"):
        audit(plain, None, None)
    with pytest.raises(ValueError, match="--run='nobody'"):
        audit(plain, "nobody", None)
    with pytest.raises(ValueError, match="holds no results"):
        audit(tmp_path, None, None)


def test_every_round_is_kept_and_an_earlier_one_can_be_read(kept: Path) -> None:
    versions = exchanges_of(kept / "checkpoints" / experiment().run_id / "private", 1)
    assert versions.stored() == [1, 2]
    first = versions.load(2)
    assert first is not None and first.number == 1


@pytest.mark.parametrize(
    ("algorithm", "levels"),
    [
        (FedAvg(**LOCAL), ["shared"]),
        (fedit(**LOCAL, rank=2), ["shared", "ancestor"]),
        (FedGrow(**LOCAL, local_epochs=1, small_epochs=1), ["shared", "ancestor", "intermediate"]),
    ],
    ids=["fedavg", "fedit", "fedgrow"],
)
def test_levels_of_knowledge_differ_where_something_is_private(algorithm: Algorithm, levels: list[str]) -> None:
    federation = Federation(algorithm)
    sent = federation.payload(1, 0), federation.update(1, 0).tree
    ctx = without_data(federation.at_client(0, 0))
    found = knowledge(algorithm, federation.state(0), ctx)
    assert list(found) == levels
    replays = [Replay(algorithm, Exchange(1, 0, *sent), state, ctx) for state in found.values()]
    asked = [replay.asked() for replay in replays]
    moved = [change(each, sent[1]) for each in asked if each is not None]
    assert len(moved) == len(levels) and all(each is not None and any(t.any() for t in each.values()) for each in moved)
    frozen = [torch.cat([t.flatten() for t in flat(each.frozen).values()]) for each in asked if each and each.frozen]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(frozen))
