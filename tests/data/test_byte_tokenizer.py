"""The tokens "bytes" as a Hugging Face tokenizer: as in training, whatever the text."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedsim.data import text
from fedsim.data.byte_tokenizer import END, MASK, PADDING, byte_characters, byte_tokenizer
from tests.support.exported import ONE_OF_A_KIND, task_of
from tests.support.family_rows import LENGTH


@pytest.fixture(scope="module")
def byte_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One for each kind of text, as a user loads it."""
    folder, tokenizers = tmp_path_factory.mktemp("bytes"), {}
    for kind in ("text", "tokens", "lm", "mlm"):
        byte_tokenizer(kind, LENGTH).save_pretrained(folder / kind)
        tokenizers[kind] = AutoTokenizer.from_pretrained(folder / kind)
    return tokenizers


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=2 * LENGTH)  # surrogates have no UTF-8
FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_bytes_are_written_as_the_library_writes_them() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_characters()[ord("a")] == "a" and byte_characters()[ord(" ")] == "\u0120"
    assert not {PADDING, END, MASK} & {*byte_characters()}


@given(ANY_TEXT)
@example("")
@example(END + PADDING + MASK)
@example(" \n\t\r\u0000\ufeff\u00a0 ")
@example("\U0010ffff\ue000")
@FEW
def test_tokens_are_those_that_training_saw(byte_tokenizers: dict[str, Any], some: str) -> None:
    expected = text.byte_ids(some).tolist()
    for kind, tokenizer in byte_tokenizers.items():
        if kind == "mlm" and any(sign in some for sign in (PADDING, END, MASK)):
            continue
        given_ids = tokenizer(some, verbose=False)["input_ids"]
        if kind in ("text", "tokens") and not some:
            assert given_ids == []  # the one text whose end cannot be told
            continue
        assert given_ids == expected, kind
        assert tokenizer.decode(given_ids, skip_special_tokens=True) == some


@given(st.lists(ANY_TEXT.filter(bool), min_size=1, max_size=3))
@example(["a" * LENGTH, "a" * (LENGTH - 1), "\u00e9" * LENGTH])
@FEW
def test_texts_are_cut_and_padded_as_in_training(byte_tokenizers: dict[str, Any], some: list[str]) -> None:
    expected = text.tokens(some, "bytes", LENGTH, hub=False)
    for kind in ("text", "tokens"):
        batch = byte_tokenizers[kind](some, truncation=True, padding="max_length", return_tensors="pt")
        assert {*batch} == {*expected}
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@given(ANY_TEXT)
@FEW
def test_a_prompt_is_the_text_without_its_end(byte_tokenizers: dict[str, Any], some: str) -> None:
    assume(not any(sign in some for sign in (PADDING, END, MASK)))
    for kind in ("lm", "mlm"):
        ids = byte_tokenizers[kind](some, add_special_tokens=False, verbose=False)["input_ids"]
        assert ids == text.byte_ids(some)[:-1].tolist()
        pieces = text.pieces([some], "bytes", LENGTH)[0]["input_ids"]
        closed = torch.tensor([*ids, text.BYTE_END])
        alone = len(closed) % LENGTH == 1  # a last piece of one token, which leaves nothing to predict
        assert torch.equal(pieces[pieces != text.BYTE_PADDING], closed[: len(closed) - alone])


def test_special_tokens_have_the_ids_of_training(byte_tokenizers: dict[str, Any]) -> None:
    for kind, tokenizer in byte_tokenizers.items():
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == text.special_ids("bytes", False)
        assert tokenizer.mask_token_id == (text.mask_id("bytes", False) if kind == "mlm" else None)
        assert len(tokenizer) == task_of(ONE_OF_A_KIND[kind]).inputs.vocab_size
        assert tokenizer.model_max_length == LENGTH
    marked = byte_tokenizers["mlm"](f"a{MASK}c")["input_ids"]
    assert marked == [97, text.BYTE_MASK, 99, text.BYTE_END]
