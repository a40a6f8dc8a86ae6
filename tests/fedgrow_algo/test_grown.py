"""A public model as everyone's start: grown, cut or as it is; every method begins with it; its download counts once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from baselines.fedavg import FedAvg
from baselines.local_only import LocalOnly
from baselines.lora import fedit
from benchmarks.methods import DIGITS, methods
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.grown import Grown
from fedsim.algorithm import Algorithm
from fedsim.core.canonical import revived
from fedsim.core.tree import Tree, sha256
from fedsim.data.config import digits
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment, Tier, with_settings
from fedsim.learning.meter import StepCost
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import Form, get_family
from fedsim.models.checkpoint import Checkpoint
from fedsim.testing import Federation
from tests.support.small_federation import LOCAL, assert_same_bits, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")

PUBLIC, DEEP, WIDER = Form(8, 1, heads=2), Form(8, 4, heads=2), Form(12, 2, heads=2)
TASK = TaskConfig(digits(limit=36), patch_size=4)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(TASK, None)


def public(form: Form, folder: Path, seed: int) -> Checkpoint:
    """A saved model whose every parameter is drawn."""
    module = get_family("vit").build(form, TASK.inputs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    module.save_pretrained(folder / f"{form.width}x{form.depth}")
    return Checkpoint(str(folder / f"{form.width}x{form.depth}"))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """8x1 and 8x4."""
    folder = tmp_path_factory.mktemp("ladder")
    return public(PUBLIC, folder, 1), public(DEEP, folder, 2)


def logits(task: Task, form: Form, tree: Tree) -> torch.Tensor:
    assert task.dataset is not None
    return task.forward(form, tree, task.batch(task.dataset.test, torch.arange(10)))


def test_a_checkpoint_of_the_form_is_taken_as_it_is(task: Task, ladder: tuple[Checkpoint, ...]) -> None:
    start = Grown(ladder)
    for form, folder in ((PUBLIC, ladder[0]), (DEEP, ladder[1])):
        saved = get_family("vit").model_class(task.inputs).from_pretrained(folder.path)
        assert_same_bits(start.parameters(task, form, 0), weights_of(saved))


def test_a_larger_form_is_grown_and_says_what_the_checkpoint_says(task: Task, ladder: tuple[Checkpoint, ...]) -> None:
    small = Grown(ladder[:1])
    before = logits(task, PUBLIC, small.parameters(task, PUBLIC, 0))
    assert torch.allclose(logits(task, WIDER, small.parameters(task, WIDER, 0)), before, atol=1e-4)
    other = dataclasses.replace(small, preset="paper")
    assert not torch.allclose(logits(task, WIDER, other.parameters(task, WIDER, 0)), before, atol=1e-2)


def test_the_largest_checkpoint_that_fits_is_grown(task: Task, ladder: tuple[Checkpoint, ...]) -> None:
    start, large = Grown(ladder), Form(12, 4, heads=2)
    (chosen,) = start.downloads(task, large)
    assert chosen == ladder[1].path
    grown, expected = start.parameters(task, large, 0), start.parameters(task, DEEP, 0)
    assert torch.allclose(logits(task, large, grown), logits(task, DEEP, expected), atol=1e-4)
    (chosen,) = start.downloads(task, WIDER)  # 8x4 is deeper than that
    assert chosen == ladder[0].path


def test_a_shallower_form_has_the_first_blocks(task: Task, ladder: tuple[Checkpoint, ...]) -> None:
    start, two = Grown(ladder[1:]), Form(8, 2, heads=2)
    cut, whole = start.parameters(task, two, 0), start.parameters(task, DEEP, 0)
    assert cut.keys() == task.specs(two).keys() < whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())


def test_a_form_that_no_checkpoint_can_become_is_refused(task: Task, ladder: tuple[Checkpoint, ...]) -> None:
    with pytest.raises(ValueError, match=r"start\.checkpoints=.*no larger than .*4.*there are .*8"):
        Grown(ladder).parameters(task, Form(4, 1, heads=2), 0)
    with pytest.raises(ValueError, match=r"start\.checkpoints=\(\): must be at least one"):
        Grown(())
    with pytest.raises(ValueError, match="preset"):
        Grown(ladder, "no such preset")


# in experiments -------------------------------------------------------------------------------------------------------


def experiment(algorithm: Algorithm, ladder: tuple[Checkpoint, ...] | None, **fields: Any) -> Experiment:
    return Experiment(
        algorithm=algorithm,
        task=TASK,
        tiers=(Tier("phone", PUBLIC), Tier("laptop", WIDER)),
        intermediate=WIDER,
        target=Form(16, 4, heads=2),
        participants=2,
        rounds=2,
        start=None if ladder is None else Grown(ladder[:1]),
        **fields,
    )


ALGORITHMS = {f"{each.name} {each.preset_name}".strip(): each for each in methods(DIGITS)}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_can_begin_with_it(
    name: str, ladder: tuple[Checkpoint, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends as much as without, and is another run."""
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (1, 1))))  # takes much longer
    with_it, without = experiment(ALGORITHMS[name], ladder), experiment(ALGORITHMS[name], None)
    assert cost_of(with_it, {}).mean("upload_params") == cost_of(without, {}).mean("upload_params")
    assert with_it.run_id != without.run_id


def test_models_of_all_methods_begin_as_the_public_one(task: Task, ladder: tuple[Checkpoint, ...]) -> None:
    start = Grown(ladder[:1])
    before = logits(task, PUBLIC, start.parameters(task, PUBLIC, 0))
    grow = FedGrow(preset="preserving", lr=1e-3, small_epochs=0, local_epochs=0)
    for algorithm in (FedAvg(**LOCAL), fedit(**LOCAL, rank=2), LocalOnly(**LOCAL), grow):
        federation = Federation(algorithm, task=task, start=start, sizes=(6, 12, 18))
        model = federation.deployed(0, 1).eval()
        assert task.dataset is not None
        with torch.no_grad():
            batch = task.batch(task.dataset.test, torch.arange(10))
            found = model(pixel_values=batch["pixel_values"]).logits
        assert torch.allclose(found, before, atol=1e-4), algorithm.name
        scratch = Federation(algorithm, task=task, sizes=(6, 12, 18)).deployed(0, 1)
        assert sha256(weights_of(scratch)) != sha256(weights_of(model))


def test_a_tiers_own_checkpoint_comes_first(ladder: tuple[Checkpoint, ...], tmp_path: Path) -> None:
    own = public(PUBLIC, tmp_path, 7)
    base = experiment(LocalOnly(**LOCAL), ladder)
    tiers = (dataclasses.replace(base.tiers[0], checkpoint=own), base.tiers[1])
    results = fedsim.run(dataclasses.replace(base, tiers=tiers), out=tmp_path / "out", runtime="inline")
    plain = fedsim.run(base, out=tmp_path / "plain", runtime="inline")
    begun: Any = [each.clients.query("round == 0").set_index("tier") for each in (results, plain)]
    losses = [frame["loss"].to_dict() for frame in begun]
    assert losses[0]["phone"] != losses[1]["phone"] and losses[0]["laptop"] == losses[1]["laptop"]


def test_a_download_is_counted_once_and_in_total(ladder: tuple[Checkpoint, ...], tmp_path: Path) -> None:
    """Adapters are held beside the public model, which every participant downloads; FedAvg's server sends its own."""
    size = Path(ladder[0].path, "model.safetensors").stat().st_size
    results = fedsim.sweep(
        [experiment(each, ladder) for each in (fedit(**LOCAL, rank=2), FedAvg(**LOCAL))],
        out=tmp_path,
        runtime="inline",
    )
    clients: Any = results.clients
    once = clients.groupby(["algorithm", "round"])["bytes_once"].max().to_dict()
    assert once == {("fedit", 0): size, ("fedit", 1): 0, ("fedit", 2): 0} | {("fedavg", round): 0 for round in range(3)}
    for _, rounds in results.rounds.groupby("algorithm"):
        received = (rounds.bytes_down + rounds.bytes_once).sort_index().cumsum()
        assert list(rounds.bytes_down_total) == list(received)
    assert results.rounds.query("algorithm == 'fedit' and round == 0").bytes_once.item() == 2 * size
    assert (results.rounds.bytes_down == results.rounds.seam_bytes_down).all()


def test_it_is_part_of_the_experiment(ladder: tuple[Checkpoint, ...]) -> None:
    base = experiment(FedAvg(**LOCAL), ladder)
    assert revived(json.loads(base.canonical_json()), Experiment) == base
    changed = with_settings(base, ["start.preset=paper"])
    assert changed.start == Grown(ladder[:1], "paper") and changed.run_id != base.run_id
    assert "start" not in experiment(FedAvg(**LOCAL), None).canonical_json()


def test_content_that_changed_is_another_run(tmp_path: Path) -> None:
    ladder = (public(PUBLIC, tmp_path, 1),)
    base = experiment(FedAvg(**LOCAL), ladder)
    first = fedsim.run(base, out=tmp_path / "out", runtime="inline").runs.checkpoints_sha256.item()
    public(PUBLIC, tmp_path, 2)
    second = fedsim.sweep([base], out=tmp_path / "out", runtime="inline").runs.checkpoints_sha256.item()
    assert isinstance(first, str) and first != second
