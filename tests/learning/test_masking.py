"""Masked tokens: which data have a mask, which tokens are drawn, and that a draw is the generator's alone."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.data.config import DataConfig, pydoc
from fedsim.data.dataset import Split
from fedsim.data.source import load
from fedsim.learning.masking import masked
from fedsim.learning.meter import Meter
from fedsim.learning.task import IGNORED, Task, TaskConfig
from fedsim.models import Form, Inputs
from tests.support.clients import local_train, objective_of
from tests.support.tagged_words import Knows, word_pieces


pytestmark = pytest.mark.usefixtures("one_thread", "read_again")


# data with a mask -----------------------------------------------------------------------------------------------------


def test_masked_pieces_are_those_of_next_token_data() -> None:
    masked_data, next_data = load(pydoc(objective="masked_token", limit=9), None), load(pydoc(limit=9), None)
    assert (masked_data.kind, masked_data.num_classes, masked_data.vocab_size) == ("mlm", 1, 259)
    assert masked_data.fingerprint != next_data.fingerprint, "their vocabularies differ"
    for split in ("train", "test"):
        one, two = (getattr(data, split).inputs for data in (masked_data, next_data))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for objective, mask, vocabulary in (("masked_token", 258, 259), ("next_token", None, 258)):
        inputs = TaskConfig(pydoc(objective=objective), family="gpt2").inputs
        assert (inputs.mask_id, inputs.vocab_size, inputs.padding_id, inputs.end_id) == (mask, vocabulary, 256, 257)


def test_the_mask_of_a_tokenizer(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    pieces = word_pieces(tmp_path / "pieces")
    (tmp_path / "train.csv").write_text("text\ngood goodness bad good\nbad\n")
    (tmp_path / "test.csv").write_text("text\ngood bad\n")
    config = DataConfig(str(tmp_path), objective="masked_token", tokenizer=pieces, max_length=3)
    assert (config.mask_id, config.vocab_size) == (4, 8)
    assert load(config, None).train.inputs["input_ids"].tolist() == [[5, 5, 6], [7, 5, 0]]
    assert replace(config, objective="next_token").mask_id is None
    bare = BertTokenizer.from_pretrained(pieces)
    bare.mask_token = None
    bare.save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(
        ValueError, match=r"task\.data\.tokenizer='.*bare': must be 'bytes' or a tokenizer that has a m"
    ):
        TaskConfig(replace(config, tokenizer=str(tmp_path / "bare")), family="bert").inputs  # noqa: B018


# which tokens are masked ----------------------------------------------------------------------------------------------


BYTES = Inputs("mlm", 1, vocab_size=259, max_length=50, padding_id=256, end_id=257, mask_id=258)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_of_masked_tokens() -> None:
    ids = torch.randint(256, (2000, 50), generator=seeded(1))
    read, labels = masked(ids, torch.ones_like(ids), BYTES, seeded(0))
    predicted = labels != IGNORED
    assert torch.equal(labels[predicted], ids[predicted])
    assert torch.equal(read[~predicted], ids[~predicted])
    total = int(predicted.sum())
    # Five standard deviations of each share, of 100,000 tokens and of about 15,000.
    assert abs(total / ids.numel() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / ids.numel())
    hidden, stayed = (read == 258) & predicted, (read == ids) & predicted
    replaced = predicted & ~hidden & ~stayed
    for share, expected in ((hidden, 0.8 + 0.1 / 259), (stayed, 0.1 + 0.1 / 259), (replaced, 0.1 * 257 / 259)):
        assert abs(int(share.sum()) / total - expected) < 5 * math.sqrt(expected * (1 - expected) / total)
    counts = torch.bincount(read[replaced], minlength=259).double()
    assert counts[258] == 0 and counts[:256].min() >= 0 and counts[:258].gt(0).double().mean() > 0.95
    assert counts.max() < 5 * counts[:258].mean()


def test_ends_and_padding_are_not_to_be_predicted() -> None:
    ids = torch.tensor([[97, 257, 256, 256], [97, 98, 257, 256], [257, 257, 256, 256], [258, 97, 257, 256]])
    mask = (ids != 256).long()
    seen = torch.zeros(4, 4, dtype=torch.bool)
    for seed in range(60):
        labels = masked(ids, mask, BYTES, seeded(seed))[1]
        assert (labels != IGNORED).any(dim=1).all()
        seen |= labels != IGNORED
    # The first example has one token to choose; the third has none but ends, and one of these is chosen.
    assert seen.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, False, False],
        [False, True, False, False],
    ]


def test_padding_that_is_also_the_end_is_told_by_the_attention_mask() -> None:
    inputs = replace(BYTES, padding_id=257)
    ids, mask = torch.tensor([[97, 98, 257, 257]] * 50), torch.tensor([[1, 1, 1, 0]] * 50)
    labels = masked(ids, mask, inputs, seeded(0))[1]
    assert (labels[:, :2] != IGNORED).any(dim=1).all() and (labels[:, 2:] == IGNORED).all()


def test_a_draw_depends_on_the_generator_alone() -> None:
    ids = torch.randint(256, (20, 50), generator=seeded(1))
    mask, before = torch.ones_like(ids), ids.clone()
    torch.manual_seed(0)
    first, again, other = (masked(ids, mask, BYTES, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(ids, before)
    none = masked(ids[:0], mask[:0], BYTES, seeded(0))
    assert none[0].shape == none[1].shape == (0, 50)


@pytest.fixture(scope="module")
def masked_task() -> Task:
    config = pydoc(objective="masked_token", limit=30, max_length=24)
    return Task(TaskConfig(config, family="bert"), load(config, None))


def test_batches_draw_afresh_and_scoring_does_not(masked_task: Task) -> None:
    assert masked_task.dataset is not None
    split, index, drawn = masked_task.dataset.train, torch.arange(5), seeded(0)
    first, second = (masked_task.batch(split, index, generator=drawn) for _ in range(2))
    assert not torch.equal(first["labels"], second["labels"])
    plain, again = (masked_task.batch(split, index) for _ in range(2))
    assert torch.equal(plain["labels"], again["labels"]) and torch.equal(plain["input_ids"], again["input_ids"])
    # Masked once, always masked the same: a split that carries labels is left as it is.
    fixed = Split(plain, split.labels[:5])
    for name, tensor in masked_task.batch(fixed, torch.tensor([3, 1]), generator=drawn).items():
        assert torch.equal(tensor, plain[name][[3, 1]])


class Guesses(nn.Module):
    """Logits that depend on the token read and on its place."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=seeded(0)), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        place = torch.arange(input_ids.shape[1])[:, None] / 10
        return SimpleNamespace(logits=self.table[input_ids] + place * self.table[0])


def test_masked_scores_do_not_depend_on_the_batch_size(masked_task: Task) -> None:
    assert masked_task.dataset is not None
    split, model = masked_task.dataset.test, Guesses(259)
    reference = masked_task.score(model, split)
    whole = masked_task.batch(split, torch.arange(len(split)))
    assert reference.count.tolist() == [int((whole["labels"] != IGNORED).sum())]
    assert reference.count.sum() >= len(split) == 30
    logits = model(whole["input_ids"], whole["attention_mask"]).logits
    assert reference.loss == pytest.approx(float(masked_task.loss(logits, whole)), rel=1e-5)
    for batch_size in (1, 7, 1000):
        other = masked_task.score(model, split, batch_size)
        assert np.array_equal(other.count, reference.count) and np.array_equal(other.correct, reference.correct)
        assert other.loss == pytest.approx(reference.loss, rel=1e-6)
    assert reference.entities is None


def test_a_masked_score_by_hand() -> None:
    ids = torch.full((6, 24), 97)
    split = Split({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(6, dtype=torch.long))
    task = Task(TaskConfig(pydoc(objective="masked_token", max_length=24), family="bert"))
    always = Knows({id_: 97 for id_ in range(259)}, 259)
    result = task.score(always, split)
    assert result.accuracy == 1 and result.loss == pytest.approx(math.log(261 / 3), rel=1e-6)
    labels = task.batch(split, torch.arange(6))["labels"]
    assert result.count.tolist() == [int((labels != IGNORED).sum())]
    # A model that says what it reads is right only where the mask is not.
    copies = Knows({id_: id_ for id_ in range(259)}, 259)
    read = task.batch(split, torch.arange(6))["input_ids"]
    assert task.score(copies, split).correct.tolist() == [int((read[labels != IGNORED] == 97).sum())]


def test_training_masks_afresh_in_each_epoch_and_the_same_in_each_run(masked_task: Task) -> None:
    assert masked_task.dataset is not None
    train = masked_task.dataset.train.select(np.arange(4))
    form = Form(8, 1, heads=2)

    def labels_seen(round: int, purpose: str) -> list[Tensor]:
        seen = []

        def loss(parameters: Any, batch: dict[str, Tensor]) -> Tensor:
            seen.append(batch["labels"])
            return masked_task.loss(parameters["table"][batch["input_ids"]], batch)

        ctx = ClientContext(
            seed=0,
            round=round,
            task=masked_task,
            intermediate=form,
            target=form,
            info=ClientInfo(0, "phone", form, 4),
            train=train,
            device=torch.device("cpu"),
            meter=Meter({}),
        )
        table = {"table": torch.zeros(259, 259)}
        local_train(ctx, objective_of(loss), table, purpose=purpose, lr=1e-3, epochs=2, batch_size=4)
        return seen[-2:]  # the counting of a step came first

    def chosen(batch: Tensor) -> set[tuple[bool, ...]]:
        return {tuple(row) for row in (batch != IGNORED).tolist()}

    one, two = labels_seen(1, "target")
    assert chosen(one) != chosen(two)
    again = labels_seen(1, "target")
    assert torch.equal(one, again[0]) and torch.equal(two, again[1])
    assert chosen(labels_seen(2, "target")[0]) != chosen(one) != chosen(labels_seen(1, "local")[0])
