"""How the report's figures look: colours, legends, sizes; and a figure as SVG, as a file or as a part of a page.

A page draws each figure twice, for a wide screen and for a narrow one, and shows the one that fits: no figure is
shrunk. In a page, black and white of a figure are those of the page, which may be dark.
"""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedsim.core.text import printable


# Told apart with any of the usual kinds of colour blindness, on white and on black: Okabe, Ito 2008, without yellow.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
LINE_STYLES = ("-", "--", ":", "-.")  # of all colours each
LONGEST = 120  # characters of a name
WIDE, NARROW = 9.5, 4.2  # inches: what fits a screen, and a phone
LETTER, LINE = 0.083, 0.2  # inches that a legend takes
FADED = {"alpha": 0.15, "linewidth": 0}  # bands of intervals


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure, and the numbers that it shows."""

    figure: Figure
    data: pd.DataFrame


def style_of(place: int) -> dict[str, Any]:
    """Colour and dashes of the line of a method."""
    styles = len(LINE_STYLES)
    return {"color": colour_of(place), "linestyle": LINE_STYLES[place // len(PALETTE) % styles]}


def colour_of(place: int) -> str:
    return PALETTE[place % len(PALETTE)]


def label_of(name: str) -> str:
    """A name as text in a figure: dollars are no mathematics, and a very long one is cut."""
    return printable(name if len(name) <= LONGEST else f"{name[:LONGEST]}...").replace("$", r"\$")


def wrapped(method: str) -> str:
    """A method, and on a line below what of it varies."""
    first, _, rest = method.partition(" ")
    return f"{first}\n{rest}" if len(method) > 18 and rest else method


def of_method(place: int) -> str:
    """The `gid` of what is drawn of a method, which a page shows and hides."""
    return f"method-{place}"


def canvas(height: float, narrow: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(NARROW if narrow else WIDE, height), layout="constrained")
    return figure, figure.subplots()


def name_rows(axes: Axes, methods: Sequence[str], narrow: bool) -> None:
    """Names of methods at the left of bars or points, the first one at place 0."""
    names = [label_of(wrapped(name) if narrow else name) for name in methods]
    axes.set_yticks(range(len(names)), names, fontsize=8)


def legend_below(figure: Figure, handles: Sequence[Line2D | Patch], title: str | None = None) -> None:
    """A legend under the axes, where it covers no line; the figure becomes as much taller."""
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width / (0.55 + LETTER * longest))))
    rows = -(-len(handles) // columns) + (title is not None)
    figure.set_size_inches(width, height + LINE * rows + 0.1)
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, title=title,
        title_fontsize=8, alignment="left", columnspacing=1.2,
    )  # fmt: skip


# as SVG ---------------------------------------------------------------------------------------------------------------


def svg(figure: Figure) -> bytes:
    """A figure as SVG: the same bytes for the same figure, and no reference to any file."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fedsim", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def inline(drawn: bytes, name: str) -> str:
    """SVG as a part of a page: its ids are its own, its black and white are the page's.

    - `name`: of letters, digits and hyphens, once in the page.
    """
    text = drawn.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#000000\b", "currentColor", text)
    text = re.sub(r"#ffffff\b", "var(--page)", text)
    return re.sub(r'^<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
