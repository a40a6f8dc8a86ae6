"""The report's figures. Drawn without pyplot, so nothing global is touched and no display is needed."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.tables import MEGABYTE, sent_bytes


LINE_STYLES = ["-", "--", ":", "-."]  # of ten colours each
MOST_PARTICIPANTS = 100  # bars beyond this are too thin to tell apart
MOST_CLASSES = 20  # in a legend
LOG_FROM = 10  # a logarithmic axis where the methods' totals differ by more than this factor

Row = Mapping[str, Any]


def accuracy_figure(
    runs: Sequence[Row], histories: Mapping[str, Sequence[Row]], *, against: str, budget_mb: float | None = None
) -> Figure:
    """Accuracy against what it took: the mean over seeds, and the range over seeds as a band.

    **Arguments:**

    - `runs`: finished runs of one setting (`readings` or `finished_runs`), in the legend's order.
    - `histories`: each run's rounds by run id.
    - `against`: `"rounds"`, or `"MB"` sent and received by all participants so far.
    - `budget_mb`: drawn as a vertical line, where methods are read at equal bytes.
    """
    by_method = defaultdict(list)
    for run in runs:
        by_method[run["method"]].append(histories[run["run_id"]])
    emphasised = {run["method"] for run in runs if run["algorithm"] == "fedgrow"}
    figure = Figure(figsize=(9.5, 4.6))
    axes = figure.subplots()
    ends = []
    for number, (method, seeds) in enumerate(by_method.items()):
        xs, means, lows, highs = _curve(seeds, against)
        if not xs:
            continue
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": LINE_STYLES[number // 10 % len(LINE_STYLES)]}
        if against == "MB" and xs[-1] == 0:
            axes.axhline(means[-1], label=f"{method}, sends nothing", alpha=0.7, linewidth=1.0, **style)
            continue
        width = 2.4 if method in emphasised else 1.4
        axes.plot(xs, means, label=method, linewidth=width, marker="o", markersize=3 if len(xs) <= 30 else 0, **style)
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        ends += [x for x in xs if x > 0][:1] + xs[-1:]
    if against == "MB":
        _megabyte_axis(axes, ends, budget_mb)
    else:
        axes.set_xlabel("federated rounds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("accuracy, mean over participants (%)")
    axes.grid(alpha=0.25)
    if by_method:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def _curve(seeds: Sequence[Sequence[Row]], against: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Of one method: x, and the mean, lowest and highest accuracy over its seeds, at each evaluated round."""
    points = defaultdict(list)
    for history in seeds:
        for row in history:
            if row["accuracy_mean"] == row["accuracy_mean"]:  # nan: not evaluated
                x = row["round"] if against == "rounds" else sent_bytes(row) / MEGABYTE
                points[row["round"]].append((x, 100 * row["accuracy_mean"]))
    columns: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
    for _, found in sorted(points.items()):
        accuracies = [accuracy for _, accuracy in found]
        mean_x = sum(x for x, _ in found) / len(found)
        values = (mean_x, sum(accuracies) / len(found), min(accuracies), max(accuracies))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns


def _megabyte_axis(axes: Axes, ends: Sequence[float], budget_mb: float | None) -> None:
    """Linear up to the first byte sent, so that round 0 has a place, and logarithmic from there where totals differ."""
    label = "MB sent and received by all participants so far (1 MB = 10$^6$ bytes)"
    if ends and max(ends) > LOG_FROM * min(ends):
        axes.set_xscale("symlog", linthresh=min(ends), linscale=0.5)
        axes.set_xlim(left=0)
        label += ", log scale"
    if budget_mb is not None:
        axes.axvline(budget_mb, color="black", linestyle=(0, (1, 2)), linewidth=1.2, label="equal bytes are read here")
    axes.set_xlabel(label)


def labels_figure(histograms: Sequence[Sequence[int]]) -> Figure:
    """Who holds what: one bar a participant, one colour a class.

    - `histograms`: examples by class, `(participants, classes)`.
    """
    shown = histograms[:MOST_PARTICIPANTS]
    classes = max(len(histogram) for histogram in shown)
    rows = [[*histogram, *[0] * (classes - len(histogram))] for histogram in shown]
    colours = mpl.colormaps["tab10" if classes <= 10 else "tab20" if classes <= 20 else "nipy_spectral"]
    figure = Figure(figsize=(9.5, 3.2))
    axes = figure.subplots()
    bottoms = [0] * len(rows)
    for label in range(classes):
        heights = [row[label] for row in rows]
        colour = colours(label) if classes <= MOST_CLASSES else colours(label / (classes - 1))
        axes.bar(range(len(rows)), heights, bottom=bottoms, color=colour, label=str(label), width=0.85)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xlabel("participant" if len(shown) == len(histograms) else f"participant (the first {len(shown)})")
    axes.set_ylabel("examples")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if classes <= MOST_CLASSES:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, ncols=2)
    return figure


def data_uri(figure: Figure) -> str:
    """A figure as text that an HTML page can hold: the same bytes for the same figure, and no reference to any file."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fedsim"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
