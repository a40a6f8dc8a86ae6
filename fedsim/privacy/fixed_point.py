"""Numbers that add up without rounding: whole multiples of a small step, modulo a power of two."""

import dataclasses
from typing import Literal

import numpy as np

from fedsim.core.fields import check_range, check_types, refuse


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """Numbers as whole multiples of 2**-fraction modulo 2**bits, the upper half of which is negative.

    - `clip`: numbers beyond it are cut to it. - `fraction`: binary places. - `bits`: of a word, which is what is sent.
    """

    clip: float = 64.0
    fraction: int = 24
    bits: Literal[16, 32, 64] = 64

    def __post_init__(self) -> None:
        check_types(self, "numbers")
        check_range(self, "numbers", "clip", above=0)
        check_range(self, "numbers", "fraction", least=0, most=48)
        step = 2.0**-self.fraction
        if not 1 <= self.largest <= 2**53:
            refuse("numbers.clip", self.clip, f"from {step:g} (2**-fraction) to {2**53 * step:g}")
        self.check(1)

    @property
    def largest(self) -> int:
        """`clip`, as it is encoded."""
        return round(self.clip * 2**self.fraction)

    @property
    def word(self) -> np.dtype:
        return np.dtype(f"<u{self.bits // 8}")

    def check(self, total: int, field: str = "numbers.bits") -> None:
        """**Raises:** `ValueError` if a sum of numbers whose weights sum to `total` may leave the range."""
        if (needed := (total * self.largest).bit_length() + 1) > self.bits:
            accepted = f"at least {needed} for a sum of weight {total} of numbers up to clip={self.clip:g} with"
            refuse(field, self.bits, f"{accepted} fraction={self.fraction} (or a smaller clip or fraction)")

    def encode(self, values: np.ndarray, weight: int = 1) -> np.ndarray:
        """`weight` times the nearest multiples. `values`: floats of any shape; the result has `word`s.

        **Raises:** `ValueError` for NaN and infinity.
        """
        scaled = np.multiply(values, 2.0**self.fraction, dtype=np.float64)
        if not np.isfinite(scaled).all():
            refuse("numbers", "NaN or infinity", "finite; a training that diverges ends so")
        np.rint(np.clip(scaled, -self.largest, self.largest, out=scaled), out=scaled)
        return (scaled.astype(np.int64) * weight).astype(self.word)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The numbers of a sum, in float64."""
        return total.view(f"<i{self.bits // 8}").astype(np.float64) / 2**self.fraction
