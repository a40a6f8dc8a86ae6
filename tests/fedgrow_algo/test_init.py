"""Starts common to all: what is alike between participants, what is not, and what averaging makes of it."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.suites import tiny
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.pretrain import common_start
from fedsim.core import tree as trees
from fedsim.core.canonical import revived, with_todays_names
from fedsim.core.tree import Tree
from fedsim.experiment import with_settings
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support.clients import client_init
from tests.support.small_federation import ALIKE, LOCAL, MIDDLE, SMALL, Federation


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")


def staged(init: str, **more) -> FedGrow:
    fields = {"preset": "preserving", "small_epochs": 0, "local_epochs": 0, "init": init}
    return FedGrow(**(LOCAL | fields | more), small_lr=1e-2, local_lr=1e-2)


def middles(algorithm: FedGrow, forms) -> list[Tree]:
    """M_i of every participant, before the first round."""
    federation = Federation(algorithm, forms)
    return [client_init(algorithm, federation.at_client(0, client))["middle"] for client in range(3)]


def test_equal_forms_start_equal_and_other_participants_own_draws_do_not() -> None:
    first, second, third = middles(staged("common"), ALIKE)
    assert trees.sha256(first) == trees.sha256(second) == trees.sha256(third)
    first, second, third = middles(staged("independent"), ALIKE)
    assert len({trees.sha256(tree) for tree in (first, second, third)}) == 3


@pytest.mark.parametrize("preset", ["paper", "preserving"])
def test_training_on_ones_own_shard_makes_them_unlike(preset: str) -> None:
    trained = middles(staged("common", preset=preset, small_epochs=1), ALIKE)
    assert len({trees.sha256(tree) for tree in trained}) == 3
    if preset == "paper":  # Local's random start is common as well
        assert len({trees.sha256(tree) for tree in middles(staged("common", preset=preset), ALIKE)}) == 1


def test_a_smaller_model_is_a_corner_of_a_larger_one() -> None:
    """Widths 8 and 16 with 2 heads of 4 and 8: head h's first four coordinates, and the first block."""
    task = Task(TaskConfig())
    largest = Form(16, 3, heads=2)
    whole = task.fresh(largest, 7)
    small = common_start(task, SMALL, largest, 7)
    assert small.keys() == task.specs(SMALL).keys() and small.keys() < whole.keys()
    name = "vit.layers.0.attention.q_proj.weight"
    heads = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    torch.testing.assert_close(small[name], whole[name][heads][:, :8], rtol=0, atol=0)
    torch.testing.assert_close(small["vit.layers.0.mlp.fc1.weight"], whole["vit.layers.0.mlp.fc1.weight"][:8, :8])
    again = common_start(task, largest, largest, 7)
    assert trees.sha256(again) == trees.sha256(dict(whole))


def test_a_form_that_is_no_corner_is_refused() -> None:
    more_heads = ["tiers.0.form.heads=8", "algorithm.init=common"]
    with pytest.raises(
        ValueError, match=r"algorithm\.init='common': must be 'independent' where .* axis 'head' is larger"
    ):
        with_settings(tiny(), more_heads)
    with_settings(tiny(), more_heads[:1])  # participants who draw for themselves may have more heads
    with pytest.raises(ValueError, match=r"algorithm\.init='both'"):
        with_settings(tiny(), ["algorithm.init=both"])


def test_averaging_what_aligned_participants_learned_is_one_step_of_them_all() -> None:
    """With equal M_i and one full-batch step of gradient descent each, the mean of the Globals is the mean step.

    AdamW's first step is `lr * sign(gradient)` up to eps, so means of steps have every size between -lr and lr.
    """
    federation = Federation(staged("common", batch_size=64), ALIKE)
    before = dict(federation.server)
    federation.run(1)
    moved = torch.cat([(federation.server[name] - before[name]).flatten() for name in before])
    assert float(moved.abs().max()) <= 1e-2 * (1 + 1e-4)
    assert float(moved.abs().max()) > 9e-3  # where all three agree


def test_configs_and_run_ids_have_the_older_words() -> None:
    """`init` was called `draw`, and "independent" "own", when runs were first recorded."""
    independent, common = tiny(), with_settings(tiny(), ["algorithm.init=common"])
    for experiment, word in ((independent, "own"), (common, "common")):
        config = json.loads(experiment.canonical_json())
        assert config["algorithm"]["draw"] == word and "init" not in config["algorithm"]
        assert revived(config).canonical_json() == experiment.canonical_json()
        todays = with_todays_names(config)["algorithm"]
        assert todays["init"] == experiment.algorithm.init and "draw" not in todays  # type: ignore[attr-defined]
        assert revived(with_todays_names(config)).run_id == experiment.run_id
    foreign = {"class": "nowhere.at.All", "draw": "own", "inner": [{"draw": 1}]}
    assert with_todays_names(foreign) == foreign


@pytest.mark.parametrize("algorithm", [staged("common"), FedGrowJoint(preset="preserving", **LOCAL, init="common")])
def test_both_procedures_run_with_unlike_forms(algorithm: FedGrow | FedGrowJoint) -> None:
    federation = Federation(replace(algorithm, small_epochs=1), (SMALL, Form(12, 1, heads=2), MIDDLE))
    before = trees.sha256(federation.server)
    federation.run(1)
    assert trees.sha256(federation.server) != before
