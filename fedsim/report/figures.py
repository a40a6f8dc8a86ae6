"""The report's figures. Drawn without pyplot, so nothing global is touched and no display is needed."""

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedsim.core.text import printable
from fedsim.report.comparison import interval
from fedsim.report.readings import MEGABYTE, by_method, sent_bytes


LINE_STYLES = ["-", "--", ":", "-."]  # of ten colours each
MOST_PARTICIPANTS = 100  # bars beyond this are too thin to tell apart
MOST_CLASSES = 20  # in a legend
MOST_LINES = 14  # in one figure
LONGEST = 120  # characters of a name
LOG_FROM = 10  # a logarithmic axis where the methods' totals differ by more than this factor
PUBLISHED = {"trainable": 59.25, "communication": 73.01}  # % saved: Fed-Grow's abstract, arXiv 2406.13450
AGAINST = {"rounds": "federated rounds", "MB": "MB sent and received by all participants so far", "FLOPs": "FLOPs"}
AMOUNTS = {  # of a round
    "rounds": lambda row: row["round"],
    "MB": lambda row: sent_bytes(row) / MEGABYTE,
    "FLOPs": lambda row: row["flops_total"],
}

Row = Mapping[str, Any]
Curve = tuple[list[float], list[float], list[float], list[float]]


def label_of(name: str) -> str:
    """A name as text in a figure: dollars are no mathematics, and a very long one is cut."""
    return printable(name if len(name) <= LONGEST else f"{name[:LONGEST]}...").replace("$", r"\$")


def shown_methods(runs: Sequence[Row]) -> list[str]:
    """Methods that a figure has room for: Fed-Grow's, then the most accurate; in the order of the runs."""
    methods = by_method(runs)
    ranked = sorted(methods, key=lambda name: _rank(methods[name]))
    kept = set(ranked[:MOST_LINES])
    return [name for name in methods if name in kept]


def _rank(runs: Sequence[Row]) -> tuple[bool, float]:
    known = [run["accuracy"] for run in runs if not math.isnan(run["accuracy"])]
    return runs[0]["algorithm"] != "fedgrow" or "=" in runs[0]["method"], -sum(known) / max(len(known), 1)


def accuracy_figure(
    runs: Sequence[Row], histories: Mapping[str, Sequence[Row]], *, against: str, budget: float | None = None
) -> Figure:
    """Accuracy against what it took: the mean over seeds, and its 95 % confidence interval as a band.

    **Arguments:**

    - `runs`: finished runs of one setting, in the legend's order.
    - `histories`: each run's rounds by run id.
    - `against`: `"rounds"`, `"MB"` sent and received by all participants so far, or `"FLOPs"` they computed so far.
    - `budget`: drawn as a vertical line, where methods are read.
    """
    groups, shown = by_method(runs), shown_methods(runs)
    figure = Figure(figsize=(9.5, 4.6))
    axes = figure.subplots()
    ends = []
    for number, method in enumerate(shown):
        seeds = [histories[run["run_id"]] for run in groups[method]]
        xs, means, lows, highs = curve(seeds, against, percent=True)
        if not xs:
            continue
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": LINE_STYLES[number // 10 % len(LINE_STYLES)]}
        if against == "MB" and xs[-1] == 0:
            axes.axhline(means[-1], label=f"{label_of(method)}, sends nothing", alpha=0.7, linewidth=1.0, **style)
            continue
        width = 2.4 if groups[method][0]["algorithm"] == "fedgrow" else 1.4
        axes.plot(
            xs,
            means,
            label=label_of(method),
            linewidth=width,
            marker="o",
            markersize=3 if len(xs) <= 30 else 0,
            **style,
        )
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        ends += [x for x in xs if x > 0][:1] + xs[-1:]
    if against == "rounds":
        axes.set_xlabel(AGAINST[against])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        _amount_axis(axes, ends, budget, against)
    axes.set_ylabel("accuracy, mean over participants (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))  # intervals of two or three seeds reach beyond any accuracy
    axes.grid(alpha=0.25)
    if groups:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def curve(seeds: Sequence[Sequence[Row]], against: str, y: str = "accuracy_mean", percent: bool = False) -> Curve:
    """Of one method, at each round in which a column of `rounds` has a number.

    - `seeds`: the rounds of each run. - `against`: one of `AMOUNTS`. - `percent`: of a column of fractions.

    **Returns:** x, and the mean of the column over seeds, and both ends of its interval.
    """
    points, unit = defaultdict(list), 100 if percent else 1
    for history in seeds:
        for row in history:
            if not math.isnan(row[y]):
                points[row["round"]].append((AMOUNTS[against](row), unit * row[y]))
    columns: Curve = ([], [], [], [])
    for _, found in sorted(points.items()):
        mean = interval([value for _, value in found])
        half = 0.0 if math.isnan(mean.half) else mean.half
        values = (sum(x for x, _ in found) / len(found), mean.mean, mean.mean - half, mean.mean + half)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns


def _amount_axis(axes: Axes, ends: Sequence[float], budget: float | None, against: str) -> None:
    """Linear up to the first amount, so that round 0 has a place, and logarithmic from there where totals differ."""
    label = AGAINST[against] + (" (1 MB = 10$^6$ bytes)" if against == "MB" else ", all participants, so far")
    known = [end for end in ends if end > 0]  # a method may compute nothing
    if known and max(known) > LOG_FROM * min(known):
        axes.set_xscale("symlog", linthresh=min(known), linscale=0.5)
        axes.set_xlim(left=0)
        label += ", log scale"
    if budget is not None:
        axes.axvline(
            budget, color="black", linestyle=(0, (1, 2)), linewidth=1.2, label=f"equal {_short(against)}: here"
        )
    axes.set_xlabel(label)


def _short(against: str) -> str:
    return {"MB": "bytes"}.get(against, against)


def spread_figure(runs: Sequence[Row], deployed: pd.DataFrame) -> Figure | None:
    """What every participant of every seed ends up with: one panel a method, sorted bars coloured by tier.

    - `deployed`: `Results.deployed`. **Returns:** None if nobody was scored.
    """
    groups, shown = by_method(runs), shown_methods(runs)
    of_run = {run_id: frame for run_id, frame in deployed.groupby("run_id")}
    panels = {
        method: pd.concat(frames).sort_values("accuracy")
        for method in shown
        if (frames := [of_run[run["run_id"]] for run in groups[method] if run["run_id"] in of_run])
    }
    if not panels:
        return None
    tiers = list(
        dict.fromkeys(tier for frame in panels.values() for tier in sorted(frame["tier"].fillna("-").unique()))
    )
    colours = {tier: f"C{number}" for number, tier in enumerate(tiers)}
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.4 * columns + 0.6, 1.7 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (method, frame) in zip(grid.flat, panels.items(), strict=False):
        heights = 100 * frame["accuracy"]
        axes.bar(range(len(frame)), heights, width=1.0, color=[colours[tier] for tier in frame["tier"].fillna("-")])
        axes.set_title(label_of(_wrapped(method)), fontsize=8)
        axes.set_xticks([])
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 100)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.supylabel("accuracy (%)", fontsize=9)
    handles = [Patch(color=colour, label=label_of(tier)) for tier, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, title="tier", title_fontsize=8)
    return figure


def _wrapped(method: str) -> str:
    first, _, rest = method.partition(" ")
    return f"{first}\n{rest}" if len(method) > 18 and rest else method


def savings_figure(rows: Sequence[Row]) -> Figure | None:
    """What each method saves against FedAvg of the target, per upload and in trained parameters; the published figures
    are marked.

    - `rows`: of `summary`, one setting. **Returns:** None without a run of FedAvg.
    """
    known = [row for row in rows if not math.isnan(row["saved"])]
    known = [row for row in known if row["method"] in set(shown_methods([_as_run(row) for row in known]))]
    if not known:
        return None
    figure = Figure(figsize=(9.5, 0.34 * len(known) + 1.2))
    axes = figure.subplots()
    places = list(range(len(known)))[::-1]
    lowest = 0.0
    measures = (("communication", "saved", 0.2, "C0"), ("trainable", "trainable_share", -0.2, "C1"))
    for name, column, offset, colour in measures:
        values = [100 * (row[column] if column == "saved" else 1 - row[column]) for row in known]
        shown = [max(value, -100.0) for value in values]
        lowest = min(lowest, *shown)
        axes.barh([place + offset for place in places], shown, height=0.36, color=colour, label=f"{name} saved")
        axes.axvline(PUBLISHED[name], color=colour, linestyle=(0, (4, 2)), linewidth=1.2)
        side = "right" if name == "trainable" else "left"
        axes.text(PUBLISHED[name], len(known) - 0.1, f" {PUBLISHED[name]} % ", color=colour, fontsize=8, ha=side)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [label_of(row["method"]) for row in known], fontsize=8)
    axes.set_ylim(-0.7, len(known) - 0.2)
    axes.set_xlim(min(-5.0, 1.05 * lowest), 105)
    axes.set_xlabel("% saved against FedAvg of the target (left of 0: more than FedAvg; cut off at -100)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def _as_run(row: Row) -> Row:
    return {name: row[name] for name in ("method", "algorithm", "accuracy")}


def difference_figure(rows: Sequence[Row], reading: str) -> Figure | None:
    """How far each method is from the reference at one budget, with 95 % intervals. None where nothing is known."""
    known = [row for row in rows if not math.isnan(row[f"{reading}_difference"])]
    if not known:
        return None
    known.sort(key=lambda row: row[f"{reading}_difference"])
    figure = Figure(figsize=(9.5, 0.26 * len(known) + 1.0))
    axes = figure.subplots()
    for place, row in enumerate(known):
        mean, half = (100 * row[f"{reading}_{name}"] for name in ("difference", "difference_ci"))
        half = 0.0 if math.isnan(half) else half
        clear = row[f"{reading}_p"] < 0.05
        axes.errorbar(mean, place, xerr=half, fmt="o", markersize=5, color="C0", mfc="C0" if clear else "white")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(known)), [label_of(row["method"]) for row in known], fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(f"percentage points against {label_of(known[0]['reference'])}")
    return figure


def time_figure(rows: Sequence[Row]) -> Figure | None:
    """Where the time of a run went: before the first federated round, and in federated rounds. None where unknown."""
    known = [row for row in rows if not math.isnan(row["seconds"])]
    if not known:
        return None
    figure = Figure(figsize=(9.5, 0.26 * len(known) + 1.0))
    axes = figure.subplots()
    places = list(range(len(known)))[::-1]
    local = [row["local_seconds"] for row in known]
    rest = [row["seconds"] - row["local_seconds"] for row in known]
    axes.barh(places, local, color="C1", label="round 0: what participants\ndo alone, and scoring")
    axes.barh(places, rest, left=local, color="C0", label="federated rounds")
    axes.set_yticks(places, [label_of(row["method"]) for row in known], fontsize=8)
    axes.set_xlabel("seconds a run (wall time, mean over seeds)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


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
    if 1 < classes <= MOST_CLASSES:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, ncols=2)
    return figure


def svg(figure: Figure) -> bytes:
    """A figure as SVG: the same bytes for the same figure, and no reference to any file."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fedsim"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()
