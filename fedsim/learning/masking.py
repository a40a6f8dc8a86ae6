"""Masked language modelling (BERT, Devlin et al., arXiv 1810.04805, section 3.1): which tokens are to be predicted.

Shape legend: N examples, L tokens.
"""

import torch
from torch import Tensor

from fedsim.data.text import IGNORED
from fedsim.models import Inputs


PREDICTED = 0.15  # share of the tokens that are to be predicted; of these:
HIDDEN = 0.8  # become the mask
REPLACED = 0.1  # become any token of the vocabulary, each as likely; the rest stay as they are


def masked(ids_NL: Tensor, mask_NL: Tensor, inputs: Inputs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the tokens to predict, at least one an example, so that no example is without a loss.

    Ends of texts and masks are not drawn; padding never is. An example of nothing but ends has one of these drawn.

    **Arguments:**

    - `ids_NL`, `mask_NL`: int64 `(N, L)`; tokens, and 1 where they are no padding, at least one an example.

    **Returns:** what the model reads, and what it is to say there (`IGNORED` elsewhere), both int64 `(N, L)`.
    """
    assert inputs.mask_id is not None and inputs.vocab_size is not None
    shape = ids_NL.shape
    choice, fate = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    anything = torch.randint(inputs.vocab_size, shape, generator=generator)

    special = [id_ for id_ in (inputs.padding_id, inputs.end_id, inputs.mask_id) if id_ is not None]
    real = mask_NL == 1
    # Draws lie in [0, 1): tokens that should not be chosen move behind all that may be, padding behind everything.
    rank = choice + (torch.isin(ids_NL, torch.tensor(special)) | ~real) + (~real).int()
    first = torch.zeros_like(real).scatter(1, rank.argmin(dim=1, keepdim=True), True)
    predicted = (rank < PREDICTED) | first

    read = torch.where(predicted & (fate < HIDDEN), inputs.mask_id, ids_NL)
    read = torch.where(predicted & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED), anything, read)
    return read, ids_NL.masked_fill(~predicted, IGNORED)
