"""The page's template, rendered twice: as one self-contained HTML file, and as Markdown with its pictures beside it.

`templates/report.j2` says what is on the page; `html.j2` and `markdown.j2` say how, each with the same macros.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedsim.core.text import printable
from fedsim.report.drawing import inline


CODE = ("config", "hardware", "versions", "commands")  # what blocks of code are made of


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, for a wide screen and for a narrow one, its numbers, and the name of its file."""

    name: str
    wide: bytes
    narrow: bytes
    data: pd.DataFrame

    def inline(self, width: Literal["wide", "narrow"]) -> Markup:
        """As a part of a page."""
        return Markup(inline(getattr(self, width), f"{self.name}-{width}"))

    @property
    def csv(self) -> str | None:
        """Its numbers as a URL that holds them; None where there are none."""
        if self.data.empty:
            return None
        text = self.data.to_csv(index=False, float_format="%.6g")
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")


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
    script = files("fedsim.report").joinpath("templates/page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    content = _plain(content, form == "markdown") | {"script": Markup(script), "script_sha256": digest}
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
        (folder / f"{picture.name}.svg").write_bytes(picture.wide)
