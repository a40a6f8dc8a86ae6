"""How participants of partial training train: labels and tokens they lack, scalers, ordered dropout, distillation."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL
from fedsim.core.submodel import Cut
from fedsim.core.tree import Tree, nbytes, numel, sha256
from fedsim.data.dataset import Split
from fedsim.data.text import BYTE_END, BYTE_MASK, BYTE_PADDING, IGNORED
from fedsim.learning.coverage import covered_of
from fedsim.learning.rates import cut_at, sub_form
from fedsim.learning.task import Batch, Task, load_task
from fedsim.models import Form
from tests.support.clients import asked_of
from tests.support.family_rows import ROWS, batch_of, examples, random_tree
from tests.support.sub_models import LOCAL, METHODS, TARGET, VIT, Federation, close, local, masks_of, of_row


# labels and tokens ----------------------------------------------------------------------------------------------------


def of_classes(task: Task, *classes: int) -> Split:
    assert task.dataset is not None
    labels = task.dataset.train.labels
    return task.dataset.train.select(torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0].numpy())


def test_classes_that_nobody_has_stay_and_others_are_of_those_who_have_them() -> None:
    task = load_task(VIT, None)
    shards = [of_classes(task, 0, 1), of_classes(task, 1, 2)]
    federation = Federation(HeteroFL(**LOCAL, weight_decay=0.5), (1.0, 1.0), task, shards=shards)
    before = federation.model()
    one, two = federation.run(1)
    after = federation.model()
    assert one.tree["rows"]["class"].tolist() == [True, True] + [False] * 8
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(after[name][3:], before[name][3:])
        assert torch.equal(after[name][0], one.tree[name][0])
        assert torch.equal(after[name][2], two.tree[name][2])
        assert torch.allclose(after[name][1], (one.tree[name][1] + two.tree[name][1]) / 2, rtol=0, atol=1e-7)
    assert not torch.equal(one.tree["classifier.weight"][3:], before["classifier.weight"][3:]), "decayed, not vouched"
    covered = federation.algorithm.server_covered(federation.server)
    assert covered is not None and covered["classifier.bias"].tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("row", ["gpt2-lm", "bert-mlm", "bert-text", "llama-lm", "gpt2-text", "bert-tokens"])
def test_tokens_that_nobody_has_stay_and_special_ones_are_trained(row: str) -> None:
    task = ROWS[row].task
    shards = [examples(task, size) for size in (7, 4)]
    federation = of_row(row, HeteroFL(**LOCAL, weight_decay=0.5), (1 / 2, 1 / 2), shards=shards)
    before, updates = federation.model(), federation.run(1)
    after = federation.model()
    seen = torch.cat([shard.inputs["input_ids"].flatten() for shard in shards]).unique().tolist()
    special = [BYTE_PADDING, BYTE_END, *([BYTE_MASK] if row == "bert-mlm" else [])]
    names = [n for n, spec in task.specs(federation.target).items() if spec.dims[0] == "=token"]
    assert names
    for name in names:
        unseen = torch.ones(len(after[name]), dtype=torch.bool)
        unseen[[*seen, *special]] = False
        assert unseen.sum() > 100
        assert torch.equal(after[name][unseen], before[name][unseen])
        assert not torch.equal(updates[0].tree[name][unseen], federation.payloads(1)[0][name][unseen]) or "bias" in name
    table, covered = names[0], covered_of(federation.server)
    assert covered[table][special].any(1).all(), "the row of padding too, though it may have no gradient"
    for id_ in special[1:]:
        assert not torch.equal(after[table][id_], before[table][id_]), id_
    for shard, update in zip(shards, updates, strict=True):
        mine = {*shard.inputs["input_ids"].flatten().tolist(), *special}
        assert {*update.tree["rows"]["token"].nonzero()[:, 0].tolist()} == mine
    if row == "bert-tokens":
        labels = shards[0].inputs["labels"]
        assert {*updates[0].tree["rows"]["class"].nonzero()[:, 0].tolist()} == {*labels[labels != IGNORED].tolist()}


@pytest.mark.parametrize("masks", [True, False])
def test_the_logit_of_an_absent_class_is_exactly_0(masks: bool) -> None:
    """It still counts as exp(0) in what probabilities are divided by."""
    task = load_task(VIT, None)
    shard = of_classes(task, 3, 5)
    algorithm = HeteroFL(**local(lr=0.0, batch_size=64), masks=masks)
    federation = Federation(algorithm, (1.0,), task, shards=[shard])
    for name in ("classifier.weight", "classifier.bias"):
        federation.server["model"][name] = 3 * torch.randn(
            federation.model()[name].shape, generator=torch.Generator().manual_seed(0)
        )
    federation.update(1, 0)
    batch = task.batch(shard, torch.arange(len(shard)))
    logits = task.forward(TARGET, federation.model(), batch).double()
    if masks:
        partition = logits[:, 3].exp() + logits[:, 5].exp() + 8 * math.exp(0)
        expected = (partition.log() - logits.gather(1, batch["labels"][:, None])[:, 0]).mean()
    else:
        expected = F.cross_entropy(logits, batch["labels"])
    assert federation.work[0].work[-1].loss == pytest.approx(float(expected), abs=1e-5)


def test_label_sets_are_counted_in_bytes() -> None:
    federation = of_row("bert-text", METHODS["heterofl"], (1 / 2,))
    clean = of_row("bert-text", METHODS["heterofl_clean"], (1 / 2,))
    with_sets, without = federation.update(1, 0).tree, clean.update(1, 0).tree
    assert {tensor.dtype for tensor in with_sets["rows"].values()} == {torch.bool}
    inputs = federation.task.inputs
    assert nbytes(without) == 4 * numel(federation.payloads(1)[0])
    assert nbytes(with_sets) - nbytes(without) == len(with_sets["rows"]["token"]) + inputs.num_classes
    assert {*with_sets} - {*without} == {"rows"} and {*with_sets["rows"]} == {"token", "class"}
    assert numel(with_sets) == numel(without), "they are no parameters"


# how participants train -----------------------------------------------------------------------------------------------


def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Form, Tree]]:
    """Every model that is run from here on: its form and parameters."""
    runs: list[tuple[Form, Tree]] = []
    real = Task.forward

    def noted(task: Task, form: Form, tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
        runs.append((form, {name: tensor.detach().clone() for name, tensor in tree.items()}))
        return real(task, form, tree, batch)

    monkeypatch.setattr(Task, "forward", noted)
    return runs


@pytest.mark.parametrize("row", ["vit", "gpt2-lm", "gpt2-text", "bert-mlm", "llama-lm", "llama-lm-tied"])
def test_the_scaler_divides_what_width_layers_compute(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and when deployed, where it is another function without; not norms, not heads: a head that is the
    embedding has it back from the norm before it."""
    federation = of_row(row, HeteroFL(**LOCAL), (1 / 4,))
    payload, runs = federation.payloads(1)[0], forwarded(monkeypatch)
    federation.update(1, 0)
    form, first = runs[0]
    specs = federation.task.specs(form)
    factors: dict[str, float] = {}
    for name, tensor in payload.items():
        texts = " ".join(specs[name].dims)
        own = [text for text in specs[name].dims if text and text[0] not in "<*+="]
        back = "*<" in texts or "+<" in texts
        factors[name] = 0.25 if back else 4.0 if own else 1.0
        assert torch.allclose(first[name], factors[name] * tensor, rtol=1e-6, atol=0), name
    tied = row in ("gpt2-lm", "bert-mlm", "llama-lm-tied")
    assert {*factors.values()} == ({0.25, 1.0, 4.0} if tied else {1.0, 4.0})
    heads = [n for n, spec in specs.items() if spec.dims[0] in ("=class", "=token") and "<" in "".join(spec.dims)]
    assert all(factors[name] == 1.0 for name in heads)
    if tied:
        (table,) = [n for n, spec in specs.items() if spec.dims == ("=token", "embed")]
        assert factors[table] == 4.0
    model = federation.algorithm.client_model(payload, {}, federation.at_client(1, 0))
    assert close(dict(model.named_parameters()), first, atol=0.0), "deployed as it is trained"
    plain = of_row(row, HeteroFL(**LOCAL, scaler=False), (1 / 4,))
    unscaled = plain.algorithm.client_model(payload, {}, plain.at_client(1, 0))
    assert sha256(dict(unscaled.named_parameters())) == sha256(payload)


def test_the_scaler_divides_the_output_of_each_layer() -> None:
    """`(W / r) x + b / r = (W x + b) / r`, and at rate 1 nothing happens, bit by bit."""
    scaled, plain = (Federation(HeteroFL(**LOCAL, scaler=s, masks=False), (1.0, 1 / 2)) for s in (True, False))
    assert sha256(scaled.update(1, 0).tree) == sha256(plain.update(1, 0).tree)
    assert sha256(scaled.update(1, 1).tree) != sha256(plain.update(1, 1).tree)


@pytest.mark.parametrize("row", ["vit", "gpt2-lm", "bert-text", "bert-mlm", "llama-lm", "llama-lm-tied"])
def test_dropout_divides_what_is_read_by_the_share_kept(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and where it is deployed: weights by the share of what they read, biases and embeddings by 1."""
    federation = of_row(row, METHODS["federated_dropout"], (1 / 4,))
    payload, runs = federation.payloads(1)[0], forwarded(monkeypatch)
    federation.update(1, 0)
    form, first = runs[0]
    for name, spec in federation.task.specs(form).items():
        reads = any(text[0] == "<" or text[:2] in ("*<", "+<") for text in " + ".join(spec.dims).split(" + ") if text)
        assert torch.allclose(first[name], payload[name] * (4.0 if reads else 1.0), rtol=1e-6, atol=0), name
    model = federation.algorithm.client_model(payload, {}, federation.at_client(1, 0))
    assert close(dict(model.named_parameters()), first, atol=0.0)


@pytest.mark.parametrize("distillation", [True, False])
def test_ordered_dropout_draws_among_the_rates_up_to_its_own(
    distillation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All alike, as a function of the seed."""
    algorithm = FjORD(**local(epochs=12, batch_size=4), distillation=distillation)
    runs = forwarded(monkeypatch)

    def drawn(seed: int, client: int, round: int = 1) -> list[int]:
        """The width of the sub-model of each step."""
        federation = Federation(algorithm, seed=seed)
        runs.clear()
        federation.update(round, client)
        widths = [form.width for form, _ in runs]
        whole, steps = federation.form(client).width, []
        while widths:
            first = widths.pop(0)
            taught = distillation and first == whole and widths and widths[0] != whole  # the teacher is run first
            steps.append(widths.pop(0) if taught else first)
        return steps

    middle = drawn(0, 1)
    assert drawn(0, 1) == middle, "the seed decides"
    assert len(middle) == 12 * 3 and {*middle} == {8, 4}
    assert 10 <= middle.count(8) <= 26
    assert middle not in (drawn(1, 1), drawn(0, 1, round=2))
    largest = drawn(0, 0)
    assert len(largest) == 12 * 2 and {*largest} == {16, 8, 4}
    assert {*drawn(0, 2)} == {4}


def objectives_of(federation: Federation, client: int) -> list:
    """What a client asks to be trained."""
    context = federation.at_client(1, client)
    return list(asked_of(federation.algorithm, federation.payloads(1, [client])[client], {}, context).objectives)


def test_distillation_leaves_the_teacher_alone() -> None:
    """Beyond the student's coordinates the gradient is that of the teacher's own loss."""
    federation = of_row("gpt2-text", FjORD(**LOCAL), (1 / 2,))
    task, form, batch = federation.task, federation.form(0), batch_of(federation.task)
    own, student = objectives_of(federation, 0)
    tree = {n: t.float() for n, t in random_tree(task, form).items()}

    def gradient(objective: Any) -> Tree:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tree.items()}
        objective(leaves, {}, batch).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    alone, with_student = gradient(own), gradient(student)
    cut = cut_at(task, federation.target, 1 / 4)  # the quarter of the target is the first half of the half
    inside = Cut(task.specs(form), form.axes, {axis: kept for axis, kept in cut.lists.items()})
    mask = masks_of(inside, {name: tensor.double() for name, tensor in tree.items()})
    outside = max(float(((alone[n] - with_student[n]) * (1 - mask[n])).abs().max()) for n in tree)
    within = max(float(((alone[n] - with_student[n]) * mask[n]).abs().max()) for n in tree)
    assert outside < 1e-6
    assert within > 1e-2

    small = sub_form(task, federation.target, 1 / 4)
    teacher = task.forward(form, tree, batch).double()
    logits = task.forward(small, inside.extract(tree), batch).double()
    soft = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    expected = F.cross_entropy(teacher, batch["labels"]) + soft
    assert float(student(tree, {}, batch)) == pytest.approx(float(expected), abs=1e-5)


def test_without_distillation_a_step_is_the_loss_of_the_sub_model_alone() -> None:
    federation = of_row("gpt2-text", FjORD(**LOCAL, distillation=False), (1 / 2,))
    task, form, batch = federation.task, federation.form(0), batch_of(federation.task)
    _, student = objectives_of(federation, 0)
    tree = {n: t.float() for n, t in random_tree(task, form).items()}
    small = cut_at(task, federation.target, 1 / 4)
    inside = Cut(task.specs(form), form.axes, small.lists)
    logits = task.forward(sub_form(task, federation.target, 1 / 4), inside.extract(tree), batch)
    assert float(student(tree, {}, batch)) == float(task.loss(logits, batch))
