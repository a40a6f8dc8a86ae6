"""Padding changes nothing: in any batch, under any amount of padding, a text's logits are those of the text alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import text
from tests.support.family_rows import LENGTH, ROWS, random_tree
from tests.support.side_tokenizers import WORDS, words_from


pytestmark = pytest.mark.usefixtures("one_thread")

OF_TEXT = [name for name, row in ROWS.items() if row.config.data.kind != "image"]
TOKENS = st.lists(st.integers(0, 255), min_size=1, max_size=11)


@pytest.mark.parametrize("name", OF_TEXT)
@settings(max_examples=12)
@given(batch=st.lists(TOKENS, min_size=1, max_size=4), more=st.integers(0, 5))
def test_logits_are_those_of_the_text_alone(name: str, batch: list[list[int]], more: int) -> None:
    row, task = ROWS[name], ROWS[name].task
    tree = random_tree(task, row.small)
    length = min(max(map(len, batch)) + more, LENGTH)
    given_ids = text.padded([np.asarray(ids) for ids in batch], length, int(task.inputs.padding_id or 0))
    together = task.forward(row.small, tree, given_ids)
    for number, ids in enumerate(batch):
        one = torch.tensor([ids])
        alone = task.forward(row.small, tree, {"input_ids": one, "attention_mask": torch.ones_like(one)})[0]
        found = together[number, : len(ids)] if together.ndim == 3 else together[number]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5 if row.rotary else 1e-10)


LETTERS = st.lists(st.sampled_from(WORDS[4:]), min_size=1, max_size=9)


@pytest.mark.parametrize("framed", [True, False])
@settings(max_examples=20)
@given(texts=st.lists(LETTERS, min_size=1, max_size=4), max_length=st.integers(2, 8))
def test_texts_are_padded_and_cut_at_the_right_whatever_the_tokenizer_says(
    framed: bool, texts: list[list[str]], max_length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"left-{framed}"
    words = str(folder) if Path(folder).is_dir() else words_from(folder, "left", framed)
    joined = [" ".join(letters) for letters in texts]
    end = [WORDS.index("[END]")] if framed else []
    whole = [[WORDS.index(letter) for letter in letters] for letters in texts]
    cut = [(ids[: max_length - len(end)] + end) for ids in whole]
    for inputs in (
        text.tokens(joined, words, max_length, hub=False),
        text.word_tokens(texts, words, max_length, hub=False)[0],
    ):
        for ids, mask, expected in zip(
            *(inputs[n].tolist() for n in ("input_ids", "attention_mask")), cut, strict=True
        ):
            padding = max_length - len(expected)
            assert ids == expected + [0] * padding and mask == [1] * len(expected) + [0] * padding
    pieces, text_of = text.pieces(joined, words, max_length)
    for number, ids in enumerate(whole):
        masks, rows = pieces["attention_mask"][text_of == number], pieces["input_ids"][text_of == number]
        sequence = [*ids, WORDS.index("[END]")]
        kept = [sequence[i : i + max_length] for i in range(0, len(sequence), max_length)]
        assert [row[mask.bool()].tolist() for row, mask in zip(rows, masks, strict=True)] == [
            p for p in kept if len(p) > 1
        ]
