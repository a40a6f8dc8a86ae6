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

from fedsim.core.text import printable


CODE = ("config", "hardware", "versions", "commands")  # what blocks of code are made of


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
    """The whole page. Everything that is not the template's own is text: tags in it are shown, and do nothing."""
    environment = Environment(
        loader=PackageLoader("fedsim.report"),
        autoescape=form == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"marked": _marked, "cells": _cells, "pretty": _pretty}
    environment.tests["alarming"] = _alarming
    content = _plain(content, form == "markdown")
    page = environment.get_template("report.j2").render(content, blocks=environment.get_template(f"{form}.j2"))
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _plain(value: Any, escaped: bool) -> Any:
    """The same with texts that are printable; `escaped`: and in which Markdown finds neither tags nor lines,
    but for `CODE`."""
    if isinstance(value, str):
        return printable(value).replace("<", "&lt;").replace("\n", " ") if escaped else printable(value)
    if isinstance(value, Mapping):
        return {_plain(name, escaped): _plain(item, escaped and name not in CODE) for name, item in value.items()}
    return [_plain(item, escaped) for item in value] if isinstance(value, list | tuple) else value


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
    """JSON, a line a value, none of which ends a block of code."""
    try:
        return printable(json.dumps(json.loads(text), indent=2, ensure_ascii=False))
    except (ValueError, RecursionError):
        return json.dumps(text)


def _alarming(note: str) -> bool:
    return note.startswith(("Failed", "Not ")) or ": Not " in note


def write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    """The pictures of a page as files, for its Markdown; those of an earlier page go."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        path.unlink()
    for picture in pictures:
        (folder / f"{picture.name}.svg").write_bytes(picture.svg)
