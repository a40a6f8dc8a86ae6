"""A page as a list of blocks, written once and rendered twice: as one self-contained HTML file, and as Markdown."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
p, ul { max-width: 52rem; } h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 3rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; } .wide { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #888; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
tr.strong td { font-weight: 600; } code { font-size: .9em; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
figure { margin: 1rem 0 2rem; } figcaption { color: #555; font-size: .9rem; max-width: 52rem; } .failed { color: #a00; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text in which `**bold**`, `*italic*` and code in backticks are marked as in Markdown."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Plain text, a line each; those in `alarming` are set in red where there is colour."""

    lines: Sequence[str]
    alarming: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Grid:
    """A table of plain text, numbers to the right; rows whose first cell is in `strong` are emphasised."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A figure: SVG, and what it shows in words."""

    name: str
    svg: bytes
    caption: str


@dataclass(frozen=True)
class Code:
    """Verbatim text; with a `title` it is folded away where that is possible."""

    text: str
    title: str = ""


Block = Heading | Paragraph | Bullets | Grid | Picture | Code


# HTML -----------------------------------------------------------------------------------------------------------------


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page. Nothing is fetched and nothing runs in it."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><style>{STYLE}</style>"
    start = f"<!doctype html>\n<html lang='en'><head>{head}<title>{html.escape(title)}</title></head>\n<body>"
    body = [f"<h1>{html.escape(title)}</h1>", *map(_html, blocks)]
    return "\n".join([start, *body, "</body></html>\n"])


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_marked(text)}</p>"
        case Bullets(lines, alarming):
            items = (f"<li{_failed(line in alarming)}>{html.escape(line)}</li>" for line in lines)
            return f"<ul>{''.join(items)}</ul>"
        case Grid(columns, rows, strong):
            heading = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
            lines = (
                f"<tr{' class=strong' if row[0] in strong else ''}>"
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
                + "</tr>"
                for row in rows
            )
            body = "\n".join(lines)
            return f"<div class='wide'><table>\n<thead><tr>{heading}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        case Picture(_, svg, caption):
            source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
            text = html.escape(caption)
            return f"<figure><img alt='{text}' src='{source}'><figcaption>{text}</figcaption></figure>"
        case Code(text, title):
            verbatim = f"<pre>{html.escape(text)}</pre>"
            return f"<details><summary>{html.escape(title)}</summary>{verbatim}</details>" if title else verbatim


def _failed(alarming: bool) -> str:
    return " class='failed'" if alarming else ""


def _marked(text: str) -> str:
    text = html.escape(text, quote=False)
    for pattern, tag in ((r"\*\*(.+?)\*\*", "b"), (r"\*(.+?)\*", "i"), (r"`(.+?)`", "code")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


# Markdown -------------------------------------------------------------------------------------------------------------


def as_markdown(title: str, blocks: Sequence[Block], figures: str) -> str:
    """The whole page; pictures are referred to as `<figures>/<name>.svg`."""
    return "\n\n".join([f"# {title}", *(_markdown(block, figures) for block in blocks)]) + "\n"


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(lines, _):
            return "\n".join(f"* {line}" for line in lines)
        case Grid(columns, rows, strong):
            marked = [[f"**{cell}**" if row[0] in strong else cell for cell in row] for row in rows]
            lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *marked]
            return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        case Picture(name, _, caption):
            return f"![{caption}]({figures}/{name}.svg)\n\n{caption}"
        case Code(text, title):
            verbatim = f"```\n{text}\n```"
            return f"<details><summary>{title}</summary>\n\n{verbatim}\n\n</details>" if title else verbatim


def write_figures(folder: Path, blocks: Sequence[Block]) -> None:
    """The pictures of a page as files, for its Markdown; those of an earlier page go."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Picture)}
    for path in folder.glob("*.svg"):
        if path.name not in kept:
            path.unlink()
    for name, svg in kept.items():
        (folder / name).write_bytes(svg)
