"""The procedures of Fed-Grow: staged, joint and as released; what moves, what stays, what travels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.suites import quick, released_ladder, tiny
from fedgrow_algo.dual_ligo import GrownLoss, grown, operator_between
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint, JointLoss
from fedgrow_algo.ligo import Operator
from fedgrow_algo.low_rank import LowRank
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedsim.algorithm import Algorithm, ClientContext, ClientInfo, ClientUpdate
from fedsim.core.seeding import generator
from fedsim.core.tree import State, Tree, clone, mapped, nbytes, numel, sha256, tensors
from fedsim.data.dataset import Split
from fedsim.experiment import Experiment
from fedsim.learning.meter import Meter, step_cost
from fedsim.learning.objectives import TaskLoss
from fedsim.learning.task import Task
from fedsim.models.checkpoint import Checkpoint
from fedsim.testing import MIDDLE, SMALL
from tests.support import small_federation
from tests.support.clients import client_init, client_update
from tests.support.growing import multiplied_out
from tests.support.procedures import TARGET, Federation, assert_equal, joint, released, shared_operator, staged
from tests.support.small_federation import assert_close


pytestmark = pytest.mark.usefixtures("one_thread", "uncounted")


def mean(updates: Sequence[ClientUpdate]) -> State:
    """The mean weighted by examples, written out."""
    return small_federation.mean([update.tree for update in updates], [update.weight for update in updates])


# what learns ----------------------------------------------------------------------------------------------------------


def test_a_round_moves_every_tensor_of_global() -> None:
    """A schedule that leaves the operator where it started would report its start as its result."""
    federation = Federation(staged())
    before = federation.server
    federation.run(1)
    moved = {name: float((tensor - before[name]).norm()) for name, tensor in federation.server.items()}
    for name, distance in moved.items():
        assert distance > 0.005 * float(before[name].norm()), f"{name} moved by {distance}"
    whole = sum(distance**2 for distance in moved.values()) ** 0.5
    assert whole > 0.02 * sum(float(tensor.norm()) ** 2 for tensor in before.values()) ** 0.5


# Without federation the grid's validation scores chose a rate that all but stands still, between two that scored lower:
# that is the control's finding, not a schedule to be mended. Whatever is averaged must be able to move.
FEDERATED = [e for e in (tiny(), *quick()) if isinstance(e.algorithm, FedGrow) and e.algorithm.federate]
GROWING = [e for e in FEDERATED if e.start is None]  # public models stay as they are brought, untrained


@pytest.mark.parametrize("experiment", GROWING, ids=lambda experiment: experiment.run_id)
def test_schedules_of_the_suites_can_move_an_operator(experiment: Experiment) -> None:
    """A step of AdamW is about as long as its rate: what the rates of all steps add up to bounds every coefficient."""
    algorithm = experiment.algorithm
    assert isinstance(algorithm, FedGrow)
    examples = int(experiment.partition.min_size * (1 - experiment.validation_share))  # nobody has fewer
    steps = -(-examples // algorithm.batch_size)
    assert algorithm.lr * steps * algorithm.epochs * experiment.rounds >= 0.01
    assert algorithm.local_lr * steps * algorithm.local_epochs >= 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", [staged(), joint(), released()], ids=lambda a: a.name)
def test_nothing_but_operators_has_a_gradient(algorithm: Algorithm, precision: str) -> None:
    federation = Federation(algorithm)
    federation.run(1)
    shapes = shared_operator(federation.task).shapes
    if algorithm.name == "fedgrow_joint":
        local = operator_between("paper", federation.task, SMALL, MIDDLE).shapes
        shapes = {f"{part}.{n}": s for part, of in (("global", shapes), ("local", local)) for n, s in of.items()}
    trained: set[tuple[int, ...]] = set()
    numbers: set[int] = set()

    def note(optimizer: torch.optim.Optimizer, *arguments: Any, **fields: Any) -> None:
        leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
        assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype == torch.float32 for leaf in leaves)
        trained.update(tuple(leaf.shape) for leaf in leaves)
        numbers.add(len(leaves))

    payload, state = federation.payload(2, 0), federation.state(0)
    hook = register_optimizer_step_pre_hook(note)
    try:
        context = dataclasses.replace(federation.at_client(2, 0), precision=precision)
        update, kept = client_update(algorithm, payload, state, context)
    finally:
        hook.remove()
    assert numbers == {len(shapes)} and trained == {tuple(shape) for shape in shapes.values()}
    skeletons = [federation.task.skeleton(form) for form in (SMALL, MIDDLE, TARGET)]
    others = [tensor for each in (payload, state, update.tree, kept) for tensor in tensors(each)]
    others += [parameter for skeleton in skeletons for parameter in skeleton.parameters()]
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in others)
    assert all(tensor.dtype == torch.float32 for tensor in others)


@pytest.mark.parametrize("procedure", [staged, joint, released])
def test_growing_again_in_the_backward_pass_changes_no_bit(procedure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    growths: list[bool] = []
    real = Operator.grow

    def counted(operator: Operator, *trees: Any) -> Tree:
        growths.append(True)
        return real(operator, *trees)

    monkeypatch.setattr(Operator, "grow", counted)
    ends, calls = [], []
    for checkpoint in (False, True):
        growths.clear()
        federation = Federation(procedure(checkpoint_growth=checkpoint))
        federation.run(1, [0])
        federation.run(2, [0])
        ends.append(sha256(federation.server) + sha256(federation.state(0)))
        calls.append(len(growths))
    assert ends[0] == ends[1]
    assert calls[0] < calls[1], "the setting reaches the growth"


def test_growing_again_costs_operations_and_saves_memory() -> None:
    federation = Federation(staged())
    context, operator = federation.at_client(1, 0), shared_operator(federation.task)
    stacked = operator.stack(federation.task.fresh(MIDDLE, 0))
    losses = [GrownLoss(federation.task, "paper", MIDDLE, TARGET, flag) for flag in (False, True)]
    federation.task.skeleton(TARGET)  # built once: not while it is counted
    kept, again = (step_cost(context, loss, federation.server, {"small": stacked}, 2) for loss in losses)
    assert again[0] > kept[0]
    assert again[1] < kept[1]


# joint ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen, moving", [("local_lr", "global"), ("lr", "local")])
def test_joint_operators_learn_at_rates_of_their_own(frozen: str, moving: str) -> None:
    federation = Federation(joint(**{frozen: 0.0}))
    before, start = clone(federation.state(0)), federation.server
    update = federation.update(1, 0)
    assert (sha256(update.tree) != sha256(start)) == (moving == "global")
    after = federation.state(0)
    assert (sha256(after["local"]) != sha256(before["local"])) == (moving == "local")
    assert_equal(after["small"], before["small"])


def test_joint_with_local_frozen_is_staged_with_local_untrained() -> None:
    """Both then train Global through T_i = Global(Local_i(S_i)); whole shards as batches, for orders differ."""
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 64, "clip": None}
    untrained = Federation(staged(**settings, local_epochs=0)).update(1, 0)
    frozen = Federation(joint(**settings, local_lr=0.0)).update(1, 0)
    both = Federation(joint(**settings)).update(1, 0)
    assert_close(untrained.tree, frozen.tree, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_close(untrained.tree, both.tree, atol=1e-3)


def test_joint_grows_the_target_from_the_small_model_through_both_operators() -> None:
    federation = Federation(joint())
    federation.run(1)
    state, task = federation.state(0), federation.task
    local, shared = operator_between("paper", task, SMALL, MIDDLE), shared_operator(task)
    middle = grown(local, state["local"], state["small"])
    expected = grown(shared, federation.server, shared.stack(middle))
    assert_close(federation.model(1, 0), expected, atol=1e-7)
    batch = task.batch(federation.shards[0], torch.arange(4))
    tensors = {"local": state["local"]} | {"global": federation.server}
    frozen = {"small": state["small"], "drawn": {}}
    loss = JointLoss(GrownLoss(task, "paper", MIDDLE, TARGET), SMALL)(tensors, frozen, batch)
    torch.testing.assert_close(loss, TaskLoss(task, TARGET)(expected, {}, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("epochs, held", [(0, set()), (1, {"small"})])
def test_joint_holds_a_checkpoint_that_it_does_not_train_once_for_all(
    epochs: int, held: set[str], tmp_path: Path
) -> None:
    """As it is, it is no part of a private state; what is computed is the same as if it were."""
    federation = Federation(joint(small_epochs=epochs))
    task = federation.task
    small = task.fresh(SMALL, seed=3)
    module: Any = task.module(SMALL, small)
    module.save_pretrained(tmp_path)
    brought = [dataclasses.replace(info, checkpoint=Checkpoint(str(tmp_path))) for info in federation.clients]
    federation.clients = brought
    assert {name.partition(".")[0] for name in federation.state(0)} == {"local"} | held
    federation.update(1, 0)
    model = federation.model(1, 0)
    state = federation.state(0)
    local = operator_between("paper", task, SMALL, MIDDLE)
    expected = grown(
        shared_operator(task),
        federation.server,
        shared_operator(task).stack(grown(local, state["local"], local.stack(small))),
    )
    assert (sha256(model) == sha256(expected)) == (epochs == 0)


def test_joint_of_full_rank_is_joint_to_rounding() -> None:
    """B0 + U: a step moves U as it moves B. Of `ligo`'s starts, which differ by block, low rank has one."""
    settings: dict[str, Any] = {"preset": "preserving", "weight_decay": 0.0}
    whole, low = Federation(joint(**settings)), Federation(joint(**settings, rank=10**6))
    for round in (1, 2):
        expected, found = whole.run(round), low.run(round)
        assert {n: t.shape for n, t in expected[0].tree.items()} == {n: t.shape for n, t in found[0].tree.items()}
        assert_close(whole.model(round, 0), low.model(round, 0), atol=1e-4)
    with pytest.raises(AssertionError):
        assert_close(whole.model(2, 0), Federation(joint(**settings)).model(0, 0), atol=1e-2)


def test_joint_of_low_rank_grows_through_both_products_and_sends_one_factor(tmp_path: Path) -> None:
    """T = Global(Local(S)) where each map is B0 + U V^T, multiplied out here; U alone is trained, and Global's sent."""
    federation = Federation(joint(preset="preserving", rank=2, small_epochs=0))
    task = federation.task
    small = task.fresh(SMALL, seed=3)
    module: Any = task.module(SMALL, small)
    module.save_pretrained(tmp_path)
    federation.clients = [dataclasses.replace(c, checkpoint=Checkpoint(str(tmp_path))) for c in federation.clients]
    own = federation.at_client(0, 0).generator("local")
    (update,) = federation.run(1, [0])
    middle, target = (
        LowRank(operator_between("preserving", task, *forms), 2) for forms in ((SMALL, MIDDLE), (MIDDLE, TARGET))
    )
    local = federation.state(0)["local"]
    for low, tree in ((middle, local), (target, update.tree)):
        assert {name: tuple(tensor.shape) for name, tensor in tree.items()} == low.shapes
    drawn = middle.drawn(own)
    first = multiplied_out(middle, local, drawn)
    second = multiplied_out(target, update.tree, target.drawn(generator(federation.seed, "global")))
    assert_close(federation.model(1, 0), target.full(second, middle.full(first, small)), atol=1e-5)
    begun = {name: 0 * tensor if name.startswith("width.") else tensor for name, tensor in local.items()}
    start = multiplied_out(middle, begun, drawn)
    with pytest.raises(AssertionError):
        assert_close(federation.model(1, 0), target.full(second, middle.full(start, small)), atol=1e-3)


def test_joint_clips_the_gradient_of_both_operators_together() -> None:
    norms: list[list[float]] = []

    def note(optimizer: torch.optim.Optimizer, *arguments: Any, **fields: Any) -> None:
        squares = [sum(float(leaf.grad.square().sum()) for leaf in g["params"]) for g in optimizer.param_groups]
        norms.append(squares)

    federation = Federation(joint(clip=0.01, local_lr=2e-2))
    federation.state(0)
    hook = register_optimizer_step_pre_hook(note)
    try:
        federation.update(1, 0)
    finally:
        hook.remove()
    assert all(len(squares) == 2 and min(squares) > 0 for squares in norms)
    assert all(sum(squares) ** 0.5 == pytest.approx(0.01, rel=1e-3) for squares in norms)


@pytest.mark.parametrize("algorithm", [staged(), joint()], ids=lambda a: a.name)
def test_what_travels_is_global_and_the_server_takes_its_weighted_mean(algorithm: Algorithm) -> None:
    federation = Federation(algorithm)
    shapes = shared_operator(federation.task).shapes
    assert federation.payload(1, 0).keys() == shapes.keys()
    updates = federation.run(1)
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert [nbytes(update.tree) for update in updates] == [size] * 3
    assert [update.weight for update in updates] == [6, 12, 18]
    expected = mean(updates)
    for name, tensor in federation.server.items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-6, atol=1e-7)
    assert federation.server.keys() == shapes.keys()


@pytest.mark.parametrize("kind", [FedGrow, FedGrowJoint])
@pytest.mark.parametrize(
    "field, value", [("finetune_after", -1), ("finetune_lr", -0.1), ("finetune_epochs", 0), ("checkpoint_growth", 1)]
)
def test_bad_settings_are_named(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"algorithm\.{field}={value}"):
        kind(**{field: value})


# as the released code does --------------------------------------------------------------------------------------------


def test_released_codes_upload_on_the_released_ladder() -> None:
    """CIFAR-100: target 5,742,052, operator 2,089,152 and the intermediate model, 1.85 times FedAvg's upload."""
    experiment = released_ladder()
    task, algorithm = Task(experiment.task), FedGrowReleasedCode()
    nothing = Split({}, torch.zeros(0, dtype=torch.long))
    info = ClientInfo(0, "2 layers", experiment.forms[0], 0)
    context = ClientContext(
        0, 1, task, experiment.middle, experiment.target, info, nothing, torch.device("cpu"), Meter({})
    )
    update, _ = client_update(algorithm, {}, client_init(algorithm, context), context)
    sizes = {part: numel(update.tree[part]) for part in ("middle", "target", "global")}
    assert sizes == {"middle": 2_812_580, "target": 5_742_052, "global": 2_089_152}
    assert nbytes(update.tree) == 4 * (5_742_052 + 2_089_152 + 2_812_580)
    assert f"{nbytes(update.tree) / 1e6:.2f}" == "42.58"
    assert f"{nbytes(update.tree) / (4 * 5_742_052):.2f}" == "1.85"


def test_released_codes_first_round_only_averages_what_each_made_alone() -> None:
    federation = Federation(released())
    assert federation.server == {} == federation.payload(1, 0)
    alone = [clone(federation.state(client)) for client in range(3)]
    assert len({sha256(state["global"]) for state in alone}) == 3, "everyone draws a Global of its own"
    before = federation.model(0, 1)
    middle = alone[1]["middle"]
    assert_equal(before, grown(shared_operator(federation.task), alone[1]["global"], middle))
    updates = federation.run(1)
    for update, state in zip(updates, alone, strict=True):
        assert_equal(update.tree, state)
    assert all(meter.loss is None and meter.flops == 0 for meter in federation.work.values())
    assert_close(federation.server, mean(updates), atol=1e-6)
    assert {tensor.dtype for tensor in tensors(federation.server)} == {torch.float32}


def test_released_codes_participants_hold_one_model_after_the_first_round() -> None:
    federation = Federation(released())
    assert len({sha256(federation.model(0, client)) for client in range(3)}) == 3
    federation.run(1)
    first = federation.server
    assert len({sha256(federation.model(1, client)) for client in range(3)}) == 1
    assert federation.private == {0: {}, 1: {}, 2: {}}, "nothing of its own is left to a participant"
    updates = federation.run(2)
    assert_equal(federation.server["middle"], first["middle"])
    assert len({sha256(update.tree["global"]) for update in updates}) == 3
    assert len({sha256(federation.model(2, client)) for client in range(3)}) == 1
    model = federation.algorithm.server_model(federation.server, federation.at_server(2))
    assert model is not None
    assert_equal(dict(model.named_parameters()), federation.model(2, 0))


def test_released_codes_copy_of_the_target_has_no_effect() -> None:
    federation = Federation(released())
    federation.run(1)
    payload, context = federation.payload(2, 0), federation.at_client(2, 0)
    spoiled = payload | {"target": mapped(lambda tensor: tensor + 1, payload["target"])}
    update, _ = client_update(federation.algorithm, payload, {}, context)
    again, _ = client_update(federation.algorithm, spoiled, {}, context)
    assert_equal(update.tree, again.tree)
    shared = shared_operator(federation.task)
    expected = grown(shared, update.tree["global"], update.tree["middle"])
    assert_equal(update.tree["target"], expected)
    other = payload | {"middle": mapped(lambda tensor: tensor + 1, payload["middle"])}
    assert sha256(client_update(federation.algorithm, other, {}, context)[0].tree) != sha256(update.tree)


def test_released_codes_latecomer_trains_what_the_server_sends() -> None:
    federation = Federation(released())
    federation.run(1, [0, 1])
    (update,) = federation.run(2, [2])
    assert federation.work[2].loss is not None
    assert_equal(update.tree["middle"], mean_of_middles(federation))
    assert federation.private[2] == {}


def mean_of_middles(federation: Federation) -> Tree:
    """The mean of what participants 0 and 1 made alone, made again."""
    fresh = Federation(federation.algorithm)
    fresh.run(1, [0, 1])
    return fresh.server["middle"]


# fine-tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("procedure", [staged, joint, released])
def test_what_a_participant_makes_is_on_its_device(procedure: Any) -> None:
    """A meta device has no values, so nothing can be trained on it, but it shows where tensors are put."""
    epochs: dict[str, Any] = {} if procedure is joint else {"local_epochs": 0}
    algorithms = [procedure(small_epochs=0, **epochs)]
    if procedure is staged:
        algorithms.append(dataclasses.replace(algorithms[0], federate=False))
    for algorithm in algorithms:
        context = Federation(algorithm).at_client(0, 0, device="meta")
        state = client_init(algorithm, context)
        assert {tensor.device.type for tensor in tensors(state)} == {"meta"}
