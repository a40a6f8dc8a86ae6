"""The page's template, rendered twice: as one self-contained HTML file, and as Markdown with its pictures beside it.

`templates/report.j2` says what is on the page; `html.j2` and `markdown.j2` say how, each with the same macros.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, and the name of its file where it is one."""

    name: str
    svg: bytes

    @property
    def embedded(self) -> str:
        """As a URL that holds it."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


def rendered(form: Literal["html", "markdown"], content: Mapping[str, Any]) -> str:
    """The whole page. In HTML everything that is not the template's own is escaped."""
    environment = Environment(
        loader=PackageLoader("fedsim.report"),
        autoescape=form == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"marked": _marked, "cells": _cells, "pretty": _pretty}
    environment.tests["alarming"] = _alarming
    page = environment.get_template("report.j2").render(content, blocks=environment.get_template(f"{form}.j2"))
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _marked(text: str) -> Markup:
    """Escaped text with its `**bold**`, `*italic*` and code in backticks as HTML."""
    for pattern, tag in ((r"\*\*(.+?)\*\*", "b"), (r"\*(.+?)\*", "i"), (r"`(.+?)`", "code")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", str(text), flags=re.DOTALL)
    return Markup(text)


def _cells(cells: Sequence[str], strong: bool = False) -> str:
    """A line of a Markdown table."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(f'**{cell}**' if strong else cell for cell in escaped)} |"


def _pretty(text: str) -> str:
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False)


def _alarming(note: str) -> bool:
    return note.startswith(("Failed", "Not ")) or ": Not " in note


def write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    """The pictures of a page as files, for its Markdown; those of an earlier page go."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        path.unlink()
    for picture in pictures:
        (folder / f"{picture.name}.svg").write_bytes(picture.svg)
