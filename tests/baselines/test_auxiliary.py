"""FedKD and FedMRL: a small common model is averaged, and a private one beside it is deployed and stays."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.fedkd import MENTEE, MENTOR, FedKD, MutualLoss
from baselines.fedmrl import COMMON, OWN, PROJECTION, FedMRL, NestedLoss
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.tree import Tree, clone, mapped, nbytes, tensors
from fedsim.learning.features import features
from fedsim.learning.rates import parameter_count
from fedsim.learning.task import Task, TaskConfig
from fedsim.models import Form
from tests.support.family_rows import NEXT_TOKEN, TAGS
from tests.support.small_federation import (
    LOCAL,
    MEDIUM,
    MIDDLE,
    SMALL,
    TARGET,
    UNLIKE,
    Federation,
    assert_close,
    assert_same_bits,
    distance,
    mean,
    weights_of,
)


METHODS: dict[str, Algorithm] = {"fedkd": FedKD(**LOCAL), "fedmrl": FedMRL(**LOCAL)}
STEP: dict[str, Any] = {"lr": 0.1, "epochs": 1, "batch_size": 64, "optimizer": "sgd", "clip": None}


@pytest.fixture(params=METHODS)
def federation(request: pytest.FixtureRequest) -> Federation:
    return Federation(METHODS[request.param], UNLIKE)


# both -----------------------------------------------------------------------------------------------------------------


def test_two_clients_on_paper(federation: Federation) -> None:
    """The auxiliary model is 1 at one client, of 1 example, and 5 at another, of 3: (1 + 15) / 4 = 4."""
    sent = [mapped(lambda t, value=value: torch.full_like(t, value), federation.server) for value in (1.0, 5.0)]
    state = federation.aggregate(1, [ClientUpdate(0, sent[0], 1), ClientUpdate(1, sent[1], 3)])
    assert all(torch.equal(tensor, torch.full_like(tensor, 4.0)) for tensor in tensors(state))


def test_what_travels_is_the_smallest_form_and_nothing_else(federation: Federation) -> None:
    updates = federation.run(1)
    shapes = {name: tensor.shape for name, tensor in federation.task.fresh(SMALL, 0).items()}
    for sent in (federation.payload(2, 2), *(update.tree for update in updates)):
        assert {name: tensor.shape for name, tensor in sent.items()} == shapes
        assert nbytes(sent) == 4 * parameter_count(federation.task, SMALL)
    assert_close(federation.server, mean([update.tree for update in updates], [6, 12, 18]), atol=1e-7)
    assert federation.algorithm.leaves == "auxiliary model"


def test_private_models_move_on_and_are_nobody_elses(federation: Federation) -> None:
    before = [clone(federation.state(client)) for client in range(3)]
    alike = Federation(federation.algorithm)
    assert_same_bits(alike.state(0), alike.state(1))  # of one form, all begin alike
    alike.run(1)
    assert distance(alike.state(0), alike.state(1)) > 1e-3
    federation.run(1, [0, 2])
    assert distance(federation.state(0), before[0]) > 1e-3 < distance(federation.state(2), before[2])
    assert_same_bits(federation.state(1), before[1])


def test_the_common_model_reaches_what_others_deploy(federation: Federation) -> None:
    """Client 0 takes part; client 1 learns of it in its next round."""
    alone = Federation(federation.algorithm, UNLIKE)
    federation.run(1, [0])
    for each in (federation, alone):
        each.run(2, [1])
    assert distance(weights_of(federation.deployed(2, 1)), weights_of(alone.deployed(2, 1))) > 1e-4


def test_a_rate_of_zero_moves_nobody() -> None:
    still: dict[str, Any] = LOCAL | {"lr": 0.0}
    for make in (FedKD, FedMRL):
        federation = Federation(make(**still), UNLIKE)
        before, held = federation.server, clone(federation.state(1))
        federation.run(1)
        assert_same_bits(federation.server, before)
        assert_same_bits(federation.state(1), held)


# FedKD ----------------------------------------------------------------------------------------------------------------


class Said(Task):
    """A task whose models say what their one parameter is, for every example."""

    def forward(self, form: Form, tree: Any, batch: Any) -> Tensor:
        return tree["logits"].expand(len(batch["labels"]), 2)


def test_mutual_distillation_on_paper() -> None:
    """Two classes, label 0. The mentor says (1/2, 1/2), the mentee (3/4, 1/4): losses ln 2 and ln(4/3), together
    ln(8/3). KL(mentee || mentor) = 3/4 ln(3/2) + 1/4 ln(1/2); KL(mentor || mentee) = 1/2 ln(2/3) + 1/2 ln 2.

    Gradients of cross-entropy are p - q. Mentor: (1/2 - 1) + (1/2 - 3/4) / ln(8/3) of the first logit; mentee:
    (3/4 - 1) + (3/4 - 1/2) / ln(8/3).
    """
    task = Said(TaskConfig())
    said = {MENTOR: [0.0, 0.0], MENTEE: [math.log(3), 0.0]}
    parameters = {part: {"logits": torch.tensor(logits).requires_grad_()} for part, logits in said.items()}
    loss = MutualLoss(task, SMALL, SMALL)(parameters, {}, {"labels": torch.zeros(3, dtype=torch.long)})
    apart = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    both = math.log(8 / 3)
    assert loss.item() == pytest.approx(both + apart / both, abs=1e-6)
    loss.backward()
    for part, first in ((MENTOR, -0.5 - 0.25 / both), (MENTEE, -0.25 + 0.25 / both)):
        gradient = parameters[part]["logits"].grad
        assert gradient is not None
        assert gradient.tolist() == pytest.approx([first, -first], abs=1e-6)


def test_models_that_agree_do_not_teach_each_other() -> None:
    """Then the loss is that of two models alone, and so are the gradients."""
    federation = Federation(FedKD(**STEP))
    task, batch = federation.task, federation.task.batch(federation.shards[0], torch.arange(6))
    both = {part: mapped(lambda t: t.clone().requires_grad_(), federation.server) for part in (MENTOR, MENTEE)}
    MutualLoss(task, SMALL, SMALL)(both, {}, batch).backward()
    alone = mapped(lambda t: t.clone().requires_grad_(), federation.server)
    task.loss(task.forward(SMALL, alone, batch), batch).backward()
    for part in both.values():
        for name, tensor in part.items():
            torch.testing.assert_close(tensor.grad, alone[name].grad, rtol=0, atol=1e-6)


def test_a_step_of_both_models_by_hand() -> None:
    federation = Federation(FedKD(**STEP), UNLIKE)
    task, start, mentee = federation.task, clone(federation.state(1)), federation.payload(1, 1)
    batch = task.batch(federation.shards[1], torch.arange(12))
    leaves = [mapped(lambda t: t.clone().requires_grad_(), tree) for tree in (start, mentee)]
    logits = [task.forward(form, tree, batch) for form, tree in zip((MEDIUM, SMALL), leaves, strict=True)]
    losses = [F.cross_entropy(each, batch["labels"]) for each in logits]
    divisor = float(losses[0].detach() + losses[1].detach())
    for own, other in ((0, 1), (1, 0)):
        student, teacher = logits[own].log_softmax(-1), logits[other].log_softmax(-1).detach()
        taught = F.kl_div(student, teacher, log_target=True, reduction="batchmean") / divisor
        moved = torch.autograd.grad(losses[own] + taught, list(leaves[own].values()), retain_graph=True)
        leaves[own] = dict(zip(leaves[own], moved, strict=True))
    update = federation.update(1, 1)
    for after, before, gradients in ((federation.state(1), start, leaves[0]), (update.tree, mentee, leaves[1])):
        assert_close(after, {name: before[name] - 0.1 * gradients[name] for name in before}, atol=1e-6)


def test_the_mentor_is_deployed_as_it_is() -> None:
    federation = Federation(FedKD(**LOCAL), UNLIKE)
    federation.run(1)
    for client in range(3):
        assert_same_bits(weights_of(federation.deployed(1, client)), federation.state(client))
    assert_same_bits(weights_of(federation.served(1)), federation.server)


# FedMRL ---------------------------------------------------------------------------------------------------------------


def parts_of(federation: Federation, client: int) -> dict[str, Tree]:
    return {COMMON: federation.payload(1, client), **clone(federation.state(client))}


def both_logits(task: Task, form: Form, parts: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Written out: concatenate, project, and read the first eight numbers, or all."""
    f = torch.cat([features(task, SMALL, parts[COMMON], batch), features(task, form, parts[OWN], batch)], 1)
    z = f @ parts[PROJECTION]["weight"].T + parts[PROJECTION]["bias"]
    common = z[:, :8] @ parts[COMMON]["classifier.weight"].T + parts[COMMON]["classifier.bias"]
    return common, z @ parts[OWN]["classifier.weight"].T + parts[OWN]["classifier.bias"]


def test_a_step_of_nested_losses_by_hand() -> None:
    federation = Federation(FedMRL(**STEP), UNLIKE)
    task, start = federation.task, parts_of(federation, 1)
    batch = task.batch(federation.shards[1], torch.arange(12))
    leaves = mapped(lambda t: t.clone().requires_grad_(), start)
    losses = [F.cross_entropy(logits, batch["labels"]) for logits in both_logits(task, MEDIUM, leaves, batch)]
    found = NestedLoss(task, SMALL, MEDIUM)(start, {}, batch)
    assert float(found) == pytest.approx(sum(float(loss.detach()) for loss in losses), abs=1e-6)
    torch.stack(losses).sum().backward()
    update = federation.update(1, 1)
    after = {COMMON: update.tree, **federation.state(1)}
    assert_close(after, mapped(lambda t: t.detach() - 0.1 * t.grad, leaves), atol=1e-6)  # type: ignore[operator]
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in leaves[COMMON].values())


def test_what_is_deployed_reads_both_models_and_not_the_common_head() -> None:
    federation = Federation(FedMRL(**LOCAL), UNLIKE)
    parts, batch = parts_of(federation, 1), {"pixel_values": federation.pixels}
    model = federation.deployed(1, 1)
    said = model(**batch).logits
    torch.testing.assert_close(said, both_logits(federation.task, MEDIUM, parts, batch)[1], rtol=0, atol=1e-6)
    for part, matters in (("classifier.weight", False), ("vit.layernorm.weight", True)):
        federation.server = {**federation.server, part: federation.server[part] + 1}
        other = federation.deployed(1, 1)(**batch).logits
        assert torch.equal(other, said) != matters
    assert not isinstance(federation.algorithm.server_model(federation.server, federation.at_server(1)), nn.Module)


def test_a_projection_is_private_and_drawn_for_its_form() -> None:
    federation = Federation(FedMRL(**LOCAL), UNLIKE)
    for client, form in enumerate(UNLIKE):
        projection = federation.state(client)[PROJECTION]
        assert projection["weight"].shape == (form.width, 8 + form.width)
        assert projection["bias"].shape == (form.width,)
        assert float(projection["weight"].abs().max()) <= (8 + form.width) ** -0.5
    alike = Federation(FedMRL(**LOCAL))
    assert_same_bits(alike.state(0), alike.state(1))
    assert not {*federation.update(1, 1).tree} & {PROJECTION, OWN}


def test_no_model_is_narrower_than_the_common_one() -> None:
    """The smallest has the fewest parameters, and is not the narrowest where another is much deeper."""
    wide, deep = Form(10, 1, heads=2), Form(8, 6, heads=2)
    with pytest.raises(ValueError, match=r"form\.width=8: must be at least 10, that of the smallest form 10x1"):
        Federation(FedMRL(**LOCAL), (deep, wide, deep))
    Federation(FedKD(**LOCAL), (deep, wide, deep)).run(1)


@pytest.mark.parametrize("data, family", [(NEXT_TOKEN, "gpt2"), (TAGS, "bert")], ids=["lm", "tokens"])
def test_nested_representations_are_of_examples(data: Any, family: str) -> None:
    with pytest.raises(ValueError, match=r"task\.data='(lm|tokens)': must be of kind 'image' or 'text'"):
        FedMRL().check(Task(TaskConfig(data, family)), [SMALL], MIDDLE, TARGET)
    FedKD().check(Task(TaskConfig(data, family)), [SMALL], MIDDLE, TARGET)
