"""The summary of a results folder on the terminal."""

import itertools
import textwrap

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim.core.terminal import shown
from fedsim.report.notes import notes
from fedsim.report.readings import by_setting, read, records
from fedsim.report.tables import COMPACT, LEGEND, cells, summary
from fedsim.results.tables import Results
from fedsim.storage.place import Place


def print_summary(
    results: Results,
    *,
    directory: Place | None = None,
    report: Place | None = None,
    console: Console | None = None,
    reference: str | None = None,
) -> None:
    """The summary on the terminal, in 120 columns, then the notes and where the tables and the report lie."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    readings = read(results, reference=reference)
    for setting, rows in by_setting(records(summary(readings))).items():
        grid = Table(
            title=_text(setting, console), box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left", title_style="bold"
        )
        grid.add_column("method", overflow="fold")
        columns = {heading: cell for heading, cell in COMPACT.items() if heading != "leaves"}  # what groups them
        for heading in list(columns)[1:]:
            narrow = "\n".join(textwrap.wrap(heading, 8, break_long_words=False))
            grid.add_column(_text(narrow, console), justify="right", no_wrap=True)
        for leaves, group in itertools.groupby(rows, lambda row: row["leaves"]):
            grid.add_row(
                _text(f"{leaves or 'what'} leaves{'' if leaves else ': not said'}", console), style="italic dim"
            )
            for row in cells(group, columns):
                grid.add_row(*(_text(cell, console) for cell in row))
        console.print(grid)
    for column, meaning in LEGEND.items():
        console.print(_text(f"{column}: {meaning}.", console), style="dim")
    for note in notes(results, readings):
        console.print(_text(note, console), style="red" if note.startswith("Failed") else None)
    if directory is not None:
        folders = "  ".join(str(directory / name) for name in ("runs", "rounds", "clients"))
        console.print(_text(f"Tables (Parquet): {folders}", console), soft_wrap=True)
    if report is not None:
        console.print(_text(f"Report: {report}", console), soft_wrap=True)


def _text(line: str, console: Console) -> Text:
    """Without markup (labels may hold brackets), and as terminals that know ASCII only can show it."""
    if not console.encoding.lower().startswith("utf"):
        line = line.replace("±", "+-").encode("ascii", "replace").decode()
    return shown(line)
