"""Checkpoints in experiments: tiers that start from them, what they cost, and who is named where one does not fit."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from baselines.fedavg import FedAvg
from fedgrow_algo.pretrain import trained_on_own_shard
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.cli import main
from fedsim.core.canonical import revived
from fedsim.core.seeding import derive
from fedsim.core.tree import Tree
from fedsim.engine.cohort import check_checkpoints, federation_sha256, members, tiers_of
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment, from_pretrained, with_settings
from fedsim.learning.meter import Meter
from fedsim.learning.starts import load_small
from fedsim.learning.steps import run_client
from fedsim.learning.task import load_task
from fedsim.models.checkpoint import Checkpoint
from tests.support.checkpoints import built, read, same, saved, with_task
from tests.support.family_rows import ROWS, Row


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")


def checkpoint_of(experiment: Experiment, tier: int, folder: Path, seed: int = 1) -> Checkpoint:
    return saved(built(Row(experiment.task), experiment.tiers[tier].form, seed), folder)


def with_checkpoints(experiment: Experiment, checkpoints: Mapping[int, Checkpoint | None]) -> Experiment:
    tiers = tuple(
        dataclasses.replace(tier, checkpoint=checkpoints.get(number)) for number, tier in enumerate(experiment.tiers)
    )
    return dataclasses.replace(experiment, tiers=tiers)


@pytest.mark.parametrize("name", ["vit", "bert-tokens", "gpt2-lm", "llama-lm"])
def test_a_tier_from_a_checkpoint_has_its_form(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    form = dataclasses.replace(row.small, norm_eps=1e-3)
    checkpoint = saved(built(row, form), tmp_path)
    tier = from_pretrained("phone", row.config.family, checkpoint.path, share=2.0)
    assert (tier.name, tier.share, tier.checkpoint) == ("phone", 2.0, checkpoint)
    assert (tier.form.axes, tier.form.depth, tier.form.norm_eps) == (form.axes, form.depth, 1e-3)
    assert read(row, checkpoint, tier.form)
    with pytest.raises(ValueError, match=r"tier 'phone': checkpoint\.path='nowhere'"):
        from_pretrained("phone", row.config.family, "nowhere")


def test_a_checkpoint_is_part_of_an_experiment(tiny_experiment: Experiment) -> None:
    experiment = with_settings(tiny_experiment, ["tiers.1.checkpoint.path=models/a", "tiers.1.checkpoint.revision=b"])
    assert [tier.checkpoint for tier in experiment.tiers] == [None, Checkpoint("models/a", revision="b"), None]
    assert experiment.run_id != tiny_experiment.run_id
    assert revived(json.loads(experiment.canonical_json())).run_id == experiment.run_id
    moved = with_settings(experiment, ["tiers.1.checkpoint.hub=true"])
    assert moved.tiers[1].checkpoint == Checkpoint("models/a", hub=True, revision="b")
    assert with_settings(experiment, ["tiers.1.checkpoint=none"]) == tiny_experiment


@pytest.mark.parametrize(
    "setting, words",
    [
        ("tiers.1.checkpoint=models/a", ["tiers.1.checkpoint='models/a'", "set its fields instead", "checkpoint.path"]),
        ("tiers.1.checkpoint.hub=true", ["tiers.1.checkpoint", "tiers.1.checkpoint.path must be given"]),
        ("tiers.1.checkpoint.pth=a", ["tiers.1.checkpoint.pth", "did you mean path"]),
        ("tiers.1.checkpoint.path=3", ["checkpoint.path=3", "a text"]),
        ("tiers.1.form=none", ["tiers.1.form=None", "set its fields instead"]),
    ],
)
def test_checkpoints_that_cannot_be_set(setting: str, words: list[str], tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError) as error:
        with_settings(tiny_experiment, [setting])
    for word in words:
        assert word in str(error.value)


def test_the_federation_is_what_checkpoints_hold(tiny_experiment: Experiment, tmp_path: Path) -> None:
    task = load_task(tiny_experiment.task, None)
    one = checkpoint_of(tiny_experiment, 0, tmp_path / "one")
    shutil.copytree(one.path, tmp_path / "copy")
    two = checkpoint_of(tiny_experiment, 0, tmp_path / "two", seed=2)
    variants = [with_checkpoints(tiny_experiment, {0: c}) for c in (None, one, Checkpoint(str(tmp_path / "copy")), two)]
    nothing, first, copied, second = (federation_sha256(variant, members(variant, task)) for variant in variants)
    assert first == copied
    assert len({nothing, first, second}) == 3


def test_participants_know_their_tiers_checkpoint(tiny_experiment: Experiment) -> None:
    experiment = with_checkpoints(tiny_experiment, {2: Checkpoint("models/a")})
    for member in members(experiment, load_task(experiment.task, None)):
        assert member.info.checkpoint == (Checkpoint("models/a") if member.tier == experiment.tiers[2] else None)


def context(experiment: Experiment, checkpoint: Checkpoint | None) -> ClientContext:
    task = load_task(experiment.task, None)
    member = members(experiment, task)[0]
    assert task.dataset is not None
    return ClientContext(
        seed=experiment.seed,
        round=0,
        task=task,
        intermediate=experiment.middle,
        target=experiment.target,
        info=ClientInfo(0, "phone", experiment.tiers[0].form, len(member.train), checkpoint),
        train=task.dataset.train.select(member.train),
        device=torch.device("cpu"),
        meter=Meter({}),
    )


def own_model(ctx: ClientContext, **settings: Any) -> Tree:
    return run_client(ctx, trained_on_own_shard(ctx, **settings))


@pytest.mark.usefixtures("uncounted")
def test_training_on_the_own_shard_starts_from_the_checkpoint(tiny_experiment: Experiment, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_experiment, 0, tmp_path)
    settings: dict[str, Any] = {"batch_size": 16, "weight_decay": 0.0, "clip": None}
    ctx = context(tiny_experiment, checkpoint)
    held = load_small(ctx.task, ctx.info.form, checkpoint, ctx.seed)
    before = {name: tensor.clone() for name, tensor in held.items()}

    as_it_is = own_model(ctx, lr=1e-2, epochs=0, **settings)
    assert all(as_it_is[name] is held[name] for name in held), "held once a process, not once a participant"
    assert ctx.meter.work == []

    unmoved = own_model(ctx, lr=0.0, epochs=1, **settings)
    assert same(unmoved, dict(sorted(before.items())))
    trained = own_model(ctx, lr=1e-4, epochs=1, **settings)
    from_scratch = own_model(context(tiny_experiment, None), lr=1e-4, epochs=1, **settings)
    distances = [max(float((tree[n] - before[n]).abs().max()) for n in before) for tree in (trained, from_scratch)]
    assert 0 < distances[0] < 1e-2 < 0.1 < distances[1]
    assert same(held, before)


@pytest.mark.usefixtures("uncounted")
def test_tiers_start_from_checkpoints_of_their_own(
    tiny_experiment: Experiment, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two tiers from checkpoints of different forms, one that trains its own; all of it from the command line."""
    folders = {number: checkpoint_of(tiny_experiment, number, tmp_path / f"tier {number}") for number in (0, 2)}
    words = [*tiny_settings, "algorithm.preset=preserving", "algorithm.small_epochs=0", "algorithm.local_epochs=0"]
    words += [f"tiers.{number}.checkpoint.path={checkpoint.path}" for number, checkpoint in folders.items()]
    out = tmp_path / "out"
    assert main(["run", "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(out), "--set", *words]) == 0

    results = fedsim.load(out)
    assert results.runs.status.tolist() == ["finished"]
    first = results.clients[results.clients["round"] == 0].set_index("client")
    task = load_task(tiny_experiment.task, None)
    assert task.dataset is not None
    for client, tier in enumerate(tiers_of(tiny_experiment)):
        number = tiny_experiment.tiers.index(tier)
        if number in folders:
            tree = load_small(task, tier.form, folders[number], tiny_experiment.seed)
        else:
            tree = task.fresh(tier.form, derive(tiny_experiment.seed, "small", client=client))
        expected = task.score(task.module(tier.form, tree), task.dataset.test)
        assert first.loss[client] == pytest.approx(expected.loss, rel=1e-3), "growth kept what the small model computes"
    assert first.loss.nunique() == 3


@pytest.mark.usefixtures("uncounted")
def test_a_checkpoint_as_it_is_costs_no_training(tiny_experiment: Experiment, tmp_path: Path) -> None:
    as_it_is = with_settings(tiny_experiment, ["algorithm.small_epochs=0"])
    experiment = with_checkpoints(as_it_is, {1: checkpoint_of(as_it_is, 1, tmp_path)})
    costs = cost_of(experiment, {}).participants
    assert ["pretrain" in cost.flops_per_step for cost in costs] == [True, False, True]


def test_vocabularies_that_differ_between_participants_are_refused(tmp_path: Path) -> None:
    row = ROWS["gpt2-lm"]
    padded = built(with_task(row, settings=(("vocab_size", 300),)))
    tiers = (
        from_pretrained("a", "gpt2", saved(built(row), tmp_path / "a").path),
        from_pretrained("b", "gpt2", saved(padded, tmp_path / "b").path),
    )
    both = r"^tier 'b': checkpoint\.path='.*b': vocab_size is 300, but 258 in tier 'a': checkpoint\.path='.*a'"
    with pytest.raises(ValueError, match=both):
        Experiment(FedAvg(), row.config, tiers, row.wider, row.wider, participants=30)
    experiment = Experiment(
        FedAvg(), with_task(row, settings=(("vocab_size", 258),)).config, tiers, row.wider, row.wider, participants=30
    )
    owners = [str(number) for number, tier in enumerate(tiers_of(experiment)) if tier.name == "b"]
    named = rf"tier 'b' \(participants {', '.join(owners[:8])}, \.\.\.: 15 in all\)"
    with pytest.raises(ValueError, match=rf"^{named}: checkpoint\.path=.*vocab_size is 300, here it is 258"):
        check_checkpoints(experiment)
    of_b = dataclasses.replace(experiment, task=dataclasses.replace(row.config, settings=(("vocab_size", 300),)))
    with pytest.raises(ValueError, match=r"^tier 'a' .*vocab_size is 258, here it is 300"):
        check_checkpoints(of_b)


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_the_command_line_names_participants_and_field(
    command: str, tiny_experiment: Experiment, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = checkpoint_of(tiny_experiment, 0, tmp_path / "small")
    more = ["--runtime", "inline", "--out", str(tmp_path / "out")] if command == "run" else []
    words = [*tiny_settings, "participants=5", f"tiers.2.checkpoint.path={checkpoint.path}"]
    assert main([command, "benchmarks.suites:tiny", *more, "--set", *words]) == 2
    tier = tiny_experiment.tiers[2]
    experiment = with_settings(tiny_experiment, ["participants=5"])
    owners = ", ".join(str(number) for number, owned in enumerate(tiers_of(experiment)) if owned == tier)
    message = capsys.readouterr().err
    assert f"error: tier {tier.name!r} (participants {owners}): form.width=12: must be 8, as in" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (["tiers.2.form.kv_heads=2"], "form.kv_heads=2: must be form.heads=4"),
        (["tiers.2.form.heads=2", "algorithm.preset=preserving"], "growing 12x2 into 16x2"),
    ],
)
def test_a_tier_whose_form_does_not_fit_is_named(settings: list[str], words: str, tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=f"^tier 'laptop': {words}"):
        with_settings(tiny_experiment, settings)


def test_forms_that_do_not_fit_each_other_are_no_tiers_fault(tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=r"^growing 16x2 into 20x3"):
        with_settings(tiny_experiment, ["algorithm.preset=preserving", "intermediate.heads=2", "target.heads=5"])
