"""A form that is given by what differs from the forms beside it."""

import dataclasses
import math
from collections.abc import Sequence

from fedsim.core.fields import matches, refuse
from fedsim.models.family import Family, Form, Inputs


class Like(Form):
    """An intermediate form or a target like the tiers' forms: `Like(depth=12)`, `Like(width=512, depth=12)`.

    An experiment that is given one has a complete `Form` in its place: heads of one size and an FFN ratio as in the
    widest of the tiers' forms.

    - `width`: None: that of the widest. - `depth`: None: that of the deepest.
    """

    def __init__(self, *, width: int | None = None, depth: int | None = None) -> None:
        for name, value in (("width", width), ("depth", depth)):
            if value is not None and (not matches(value, int) or value < 1):
                refuse(f"form.{name}", value, "a whole number of at least 1, or left out")
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Like(width={self.width}, depth={self.depth})"

    def beside(self, forms: Sequence[Form], family: Family, inputs: Inputs, field: str) -> Form:
        """The form itself.

        - `forms`: the tiers'. - `field`: what it is in the experiment, for messages.

        **Raises:** `ValueError` for a width that is not so many whole heads, or no whole inner width.
        """
        widest = max(forms, key=lambda form: (form.width, form.inner, form.depth))
        width = self.width or widest.width
        depth = self.depth or max(form.depth for form in forms)
        kv_heads = widest.kv_heads or widest.heads
        step = widest.width // math.gcd(widest.width, widest.heads, kv_heads, widest.inner)
        if width % step:
            accepted = f"a multiple of {step}, for whole heads of {widest.head_size} and an FFN of "
            refuse(f"{field}.width", width, f"{accepted}{widest.inner}/{widest.width} the width, as in {widest!r}")

        def scaled(size: int | None) -> int | None:
            return None if size is None else size * width // widest.width

        wider = dataclasses.replace(
            widest,
            width=width,
            depth=depth,
            heads=widest.heads * width // widest.width,
            mlp=scaled(widest.mlp),
            kv_heads=scaled(widest.kv_heads),
        )
        if widest.norm_eps is None or width == widest.width:
            return wider
        # What is added to a variance goes with the width as the family's own does (docs/growth.md).
        own = [_own_epsilon(form, family, inputs) for form in (wider, widest)]
        return dataclasses.replace(wider, norm_eps=widest.norm_eps * own[0] / own[1] if own[1] else widest.norm_eps)


def _own_epsilon(form: Form, family: Family, inputs: Inputs) -> float:
    found = family.form(family.config(dataclasses.replace(form, norm_eps=None), inputs)).norm_eps
    assert found is not None
    return found
