"""Text to token tensors, by bytes or by a Hugging Face tokenizer.

Shape legend: N texts, L = max_length tokens. Byte ids 0..255 are the bytes of the UTF-8 text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


BYTE_PADDING = 256
BYTE_END = 257
BYTE_VOCABULARY = 258


def joined(table: Any, columns: Sequence[str]) -> list[str]:
    """One text an example: its text columns joined with a space, cells without a value left out."""
    cells = [list(table[column]) for column in columns]
    return [" ".join(str(cell) for cell in row if cell is not None) for row in zip(*cells, strict=True)]


def padded(sequences: Sequence[np.ndarray], max_length: int) -> dict[str, Tensor]:
    """Pad byte-token sequences, none longer than L, to one length.

    **Returns:** `input_ids` and `attention_mask` (1 on tokens, 0 on padding), both int64 `(N, L)`.
    """
    ids_NL = np.full((len(sequences), max_length), BYTE_PADDING, dtype=np.int64)
    mask_NL = np.zeros((len(sequences), max_length), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_NL[row, : len(sequence)] = sequence
        mask_NL[row, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids_NL), "attention_mask": torch.from_numpy(mask_NL)}


def byte_ids(text: str) -> np.ndarray:
    """The bytes of `text` followed by the end token, int64 `(bytes + 1,)`."""
    return np.append(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64), BYTE_END)


def tokens(texts: Sequence[str], tokenizer: str, max_length: int, hub: bool) -> tuple[dict[str, Tensor], int]:
    """Tokenize, cut to L and pad to L.

    **Arguments:**

    - `tokenizer`: "bytes", a folder, or a hub name. A name is fetched only when `hub` is True.

    **Returns:** (`{"input_ids", "attention_mask"}`, both int64 `(N, L)`, vocabulary size). A text cut short loses its
    end token under "bytes".
    """
    if tokenizer == "bytes":
        return padded([byte_ids(text)[:max_length] for text in texts], max_length), BYTE_VOCABULARY

    # Asking the library to look for a name in its local cache still sends requests, so a name is not even asked for.
    if not hub and not Path(tokenizer).is_dir():
        raise ValueError(
            f"task.data.tokenizer={tokenizer!r}: no such folder; 'bytes', the folder of a tokenizer, or a hub name "
            "together with --set task.data.hub=true are accepted"
        )
    from transformers import AutoTokenizer

    try:
        pretrained: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=not hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"task.data.tokenizer={tokenizer!r}: could not be loaded ({error})") from error
    if pretrained.pad_token is None:
        if pretrained.eos_token is None:
            raise ValueError(f"task.data.tokenizer={tokenizer!r}: has neither a padding nor an end token to pad with")
        pretrained.pad_token = pretrained.eos_token  # the attention mask keeps padding apart from real ends
    encoded = pretrained(list(texts), truncation=True, padding="max_length", max_length=max_length, return_tensors="pt")
    return {name: encoded[name].to(torch.int64) for name in ("input_ids", "attention_mask")}, len(pretrained)
