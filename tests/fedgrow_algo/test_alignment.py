"""Common coordinates for strangers: a rotation on public examples, and heads that read what is turned."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

import fedsim
from fedgrow_algo.alignment import ROTATION, SHIFT, features_of, procrustes, turned_head
from fedgrow_algo.analytic import FedGrowAnalytic
from fedgrow_algo.grown import Grown
from fedsim.data.config import DataConfig, digits, pydoc
from fedsim.data.partition import Partition
from fedsim.engine.content import content_of, pinned
from fedsim.experiment import Experiment, Tier
from fedsim.learning.task import TaskConfig, load_task
from fedsim.models.checkpoint import Checkpoint
from fedsim.testing import MIDDLE, SMALL, TARGET, Federation
from tests.support.checkpoints import saved
from tests.support.procedures import ROUND
from tests.support.small_federation import ALIKE as STRANGERS
from tests.support.small_federation import assert_close, distance, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")

TASK = load_task(TaskConfig(digits(skip=40, limit=60), patch_size=4), None)
PUBLIC = digits(first=40)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def method(**changes: Any) -> FedGrowAnalytic:
    fields: dict[str, Any] = ROUND | {"local_epochs": 1, "preset": "preserving", "rank": 2, "align": PUBLIC} | changes
    return FedGrowAnalytic(**fields)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("public")
    saved(TASK.module(SMALL, TASK.fresh(SMALL, 9)), folder)
    return Grown((Checkpoint(str(folder)),))


# on paper -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_a_rotation_is_found_again(centred: bool) -> None:
    own, (turn, _) = drawn(50, 4), torch.linalg.qr(drawn(4, 4, seed=1))
    public = own @ turn + (3.0 if centred else 0.0)
    found = procrustes(own, public, centred)
    torch.testing.assert_close(own @ found[ROTATION] + found[SHIFT], public, rtol=0, atol=0.05)
    torch.testing.assert_close(found[ROTATION] @ found[ROTATION].T, torch.eye(4).double(), rtol=0, atol=1e-12)
    assert found[SHIFT].any() == centred


def test_quarter_turn_by_hand_and_what_public_examples_do_not_say() -> None:
    """Three coordinates, of which examples say two: (1, 0) is (0, 1) there, and (0, 1) is (-1, 0). The third stays."""
    own = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]).double()
    public = torch.tensor([[0.0, 1, 0], [0, -1, 0], [-1, 0, 0], [1, 0, 0]]).double()
    wanted = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]).double()
    torch.testing.assert_close(procrustes(own, public)[ROTATION], wanted, rtol=0, atol=2e-3)


def test_a_turned_head_reads_features_as_the_head_reads_turned_ones() -> None:
    turn, f = procrustes(drawn(9, 4), drawn(9, 4, seed=1)), drawn(5, 4, seed=2)
    head = {"classifier.weight": drawn(3, 4, seed=3), "classifier.bias": drawn(3, seed=4)}
    own = turned_head(head, turn)
    wanted = (f @ turn[ROTATION] + turn[SHIFT]) @ head["classifier.weight"].T + head["classifier.bias"]
    torch.testing.assert_close(f @ own["classifier.weight"].T + own["classifier.bias"], wanted, rtol=0, atol=1e-12)


# rounds ---------------------------------------------------------------------------------------------------------------


def test_what_is_summed_and_what_is_deployed_are_turned_to_the_public_model(start: Grown) -> None:
    federation = Federation(method(lr=0.0), STRANGERS, task=TASK, start=start)
    examples = load_task(TaskConfig(PUBLIC, patch_size=4), None).dataset
    assert examples is not None
    model = start.parameters(TASK, TARGET, 0)
    public = features_of(TASK, TARGET, model, examples.train, 7, torch.device("cpu"))
    update = federation.run(1)[1]
    deployed, shard = weights_of(federation.deployed(1, 1)), federation.shards[1]
    own = features_of(TASK, TARGET, deployed, examples.train, 7, torch.device("cpu"))
    turn = procrustes(own, public)
    f = features_of(TASK, TARGET, deployed, shard, 7, torch.device("cpu")) @ turn[ROTATION] + turn[SHIFT]
    phi = torch.cat([f, torch.ones(len(f), 1)], 1)
    torch.testing.assert_close(len(f) * update.tree["g"], phi.T @ phi, rtol=1e-4, atol=1e-4)
    head = {name: deployed[name] for name in federation.server["head"]}
    assert_close(head, {n: t.float() for n, t in turned_head(federation.server["head"], turn).items()}, 1e-4)
    assert distance(head, {n: t.float() for n, t in federation.server["head"].items()}) > 1e-3
    asked = federation.at_client(1, 1)
    assert asked.meter.downloads == {}, "public features are made of what everyone downloads at the start"


def test_strangers_have_more_in_common_when_turned(start: Grown) -> None:
    """Sums over everyone, of models that share nothing: their mean features of a class lie nearer each other."""
    spread = {}
    for align in (None, PUBLIC):
        federation = Federation(method(lr=0.0, align=align), STRANGERS, task=TASK, start=start)
        means = []
        for update in federation.run(1):
            g, h = update.tree["g"], update.tree["h"]
            means.append((h / h[-1:].clamp(min=1e-9))[:-1] - g[:-1, -1:])  # of each class, less the mean of all
        held = torch.stack(means)
        spread[align] = float(held.var(0).sum() / held.square().sum())
    assert spread[PUBLIC] < spread[None]


def test_no_part_of_the_rotation_leaves(start: Grown) -> None:
    federations = [Federation(method(align=align), STRANGERS, task=TASK, start=start) for align in (None, PUBLIC)]
    names = [{*federation.run(1)[0].tree} for federation in federations]
    assert names[0] == names[1] and {"turn", "public"} <= federations[1].state(0).keys()


# in experiments -------------------------------------------------------------------------------------------------------


def experiment(tiny: Experiment, start: Grown | None, algorithm: FedGrowAnalytic | None = None) -> Experiment:
    task = TaskConfig(digits(skip=40, limit=60), patch_size=4)
    return dataclasses.replace(
        tiny,
        task=task,
        algorithm=algorithm or method(),
        start=start,
        tiers=(Tier("phone", SMALL),),
        intermediate=MIDDLE,
        target=TARGET,
        partition=Partition("iid"),
        rounds=2,
    )


def test_public_examples_are_read_by_content(tiny_experiment: Experiment, start: Grown) -> None:
    mine = experiment(tiny_experiment, start)
    algorithm: Any = pinned(mine, None).algorithm
    assert algorithm.align.sha256 is not None and pinned(mine, None).run_id == mine.run_id
    fewer = dataclasses.replace(method(), align=digits(first=30))
    assert content_of(mine, None).change_from(content_of(experiment(tiny_experiment, start, algorithm=fewer), None))


def test_what_is_exported_is_turned(tiny_experiment: Experiment, start: Grown, tmp_path: Path) -> None:
    """The rotation lies in the private state: who exports has neither the shard nor the public examples."""
    mine = experiment(tiny_experiment, start)
    results = fedsim.run(mine, out=tmp_path / "out")
    fedsim.export(tmp_path / "out", 0, tmp_path / "grown")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "grown")
    task = load_task(mine.task, None)
    assert task.dataset is not None
    scored = results.clients
    last = scored[(scored["round"] == 2) & (scored.client == 0)]
    assert task.score(model, task.dataset.test).accuracy == pytest.approx(last.accuracy.iloc[0], abs=1e-9)


@pytest.mark.parametrize(
    ("align", "text"),
    [
        (digits(), r"algorithm\.align\.first=None: must be at most task\.data\.skip=40"),
        (digits(first=41), r"algorithm\.align\.first=41: must be at most task\.data\.skip=40"),
        (digits(first=40, image_size=16), r"algorithm\.align\.image_size=16: must be task\.data\.image_size=8"),
        (pydoc(), r"algorithm\.align\.kind='lm': must be task\.data\.kind='image'"),
    ],
)
def test_examples_that_are_private_or_of_another_kind_are_refused(
    tiny_experiment: Experiment, start: Grown, align: DataConfig, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        experiment(tiny_experiment, start, algorithm=method(align=align))


def test_without_a_public_model_there_are_no_coordinates(tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=r"start=None: must be a public model"):
        experiment(tiny_experiment, None)
