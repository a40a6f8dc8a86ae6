"""The report's figures. Drawn without pyplot, so nothing global is touched and no display is needed.

`narrow`: drawn for a phone.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedsim.report.comparison import interval
from fedsim.report.drawing import (
    FADED,
    NARROW,
    PALETTE,
    WIDE,
    Drawn,
    canvas,
    colour_of,
    label_of,
    legend_below,
    name_rows,
    of_method,
    style_of,
    wrapped,
)
from fedsim.report.readings import MEGABYTE, by_method, sent_bytes


MOST_PARTICIPANTS = 100  # bars beyond this are too thin to tell apart
MOST_CLASSES = 20  # in a legend
MOST_LINES = 14  # in one figure
LOG_FROM = 10  # a logarithmic axis where the methods' totals differ by more than this factor
PUBLISHED = {"trainable": 59.25, "communication": 73.01}  # % saved: Fed-Grow's abstract, arXiv 2406.13450
AGAINST = {"rounds": "federated rounds", "MB": "MB sent and received", "FLOPs": "FLOPs"}
AMOUNTS = {  # of a round
    "rounds": lambda row: row["round"],
    "MB": lambda row: sent_bytes(row) / MEGABYTE,
    "FLOPs": lambda row: row["flops_total"],
}

Row = Mapping[str, Any]
Curve = tuple[list[float], list[float], list[float], list[float]]


def shown_methods(runs: Sequence[Row]) -> list[str]:
    """Methods that a figure has room for: Fed-Grow's, then the most accurate; in the order of the runs."""
    methods = by_method(runs)
    ranked = sorted(methods, key=lambda name: _rank(methods[name]))
    kept = set(ranked[:MOST_LINES])
    return [name for name in methods if name in kept]


def places_of(runs: Sequence[Row]) -> dict[str, int]:
    """Every method's place among those of its setting, which is its colour in all figures."""
    return {method: place for place, method in enumerate(by_method(runs))}


def _rank(runs: Sequence[Row]) -> tuple[bool, float]:
    known = [run["accuracy"] for run in runs if not math.isnan(run["accuracy"])]
    return runs[0]["algorithm"] != "fedgrow" or "=" in runs[0]["method"], -sum(known) / max(len(known), 1)


def accuracy_figure(
    runs: Sequence[Row],
    histories: Mapping[str, Sequence[Row]],
    *,
    against: str,
    budget: float | None = None,
    narrow: bool = False,
) -> Drawn:
    """Accuracy against what it took: the mean over seeds, and its 95 % confidence interval as a band.

    **Arguments:**

    - `runs`: finished runs of one setting, in the legend's order.
    - `histories`: each run's rounds by run id.
    - `against`: `"rounds"`, `"MB"` sent and received by all participants so far, or `"FLOPs"` they computed so far.
    - `budget`: drawn as a vertical line, where methods are read.
    """
    groups, places = by_method(runs), places_of(runs)
    figure, axes = canvas(3.4 if narrow else 4.2, narrow)
    ends, handles, found = [], [], []
    for method in shown_methods(runs):
        place = places[method]
        seeds = [histories[run["run_id"]] for run in groups[method]]
        xs, means, lows, highs = curve(seeds, against, percent=True)
        if not xs:
            continue
        found += [(method, *point) for point in zip(xs, means, lows, highs, strict=True)]
        own = groups[method][0]["algorithm"] == "fedgrow"
        style: dict[str, Any] = style_of(place) | {"linewidth": 2.4 if own else 1.4}
        if against == "MB" and xs[-1] == 0:
            label = f"{label_of(method)}, sends nothing"
            handles.append(axes.axhline(means[-1], label=label, alpha=0.7, **style))
        else:
            marks: dict[str, Any] = {"marker": "o", "markersize": 3 if len(xs) <= 30 else 0}
            handles += axes.plot(xs, means, label=label_of(method), **marks, **style)
            band = axes.fill_between(xs, lows, highs, color=style["color"], **FADED)
            band.set_gid(f"{of_method(place)}-band")
            ends += [x for x in xs if x > 0][:1] + xs[-1:]
        handles[-1].set_gid(of_method(place))
    if against == "rounds":
        axes.set_xlabel(AGAINST[against])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        handles += _amount_axis(axes, ends, budget, against)
    axes.set_ylabel("accuracy, mean over\nparticipants (%)" if narrow else "accuracy, mean over participants (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))  # intervals of two or three seeds reach beyond any accuracy
    axes.grid(alpha=0.25)
    legend_below(figure, handles)
    columns = ["method", against, "accuracy, %", "from", "to"]
    return Drawn(figure, pd.DataFrame(found, columns=columns))


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


def _amount_axis(axes: Axes, ends: Sequence[float], budget: float | None, against: str) -> list[Line2D]:
    """Linear up to the first amount, so that round 0 has a place, and logarithmic from there where totals differ."""
    label = f"{AGAINST[against]}, all participants, so far"
    known = [end for end in ends if end > 0]  # a method may compute nothing
    if known and max(known) > LOG_FROM * min(known):
        axes.set_xscale("symlog", linthresh=min(known), linscale=0.5)
        axes.set_xlim(left=0)
        label += " (log)"
    axes.set_xlabel(label)
    if budget is None:
        return []
    named = f"equal {'bytes' if against == 'MB' else against}: here"
    return [axes.axvline(budget, color="black", linestyle=(0, (1, 2)), linewidth=1.2, label=named)]


def spread_figure(runs: Sequence[Row], deployed: pd.DataFrame, *, narrow: bool = False) -> Drawn | None:
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
    tiers = [*dict.fromkeys(tier for frame in panels.values() for tier in sorted(frame["tier"].fillna("-").unique()))]
    colours = {tier: colour_of(number) for number, tier in enumerate(tiers)}
    columns = min(2 if narrow else 4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = min(NARROW if narrow else WIDE, 2.4 * columns + 0.6)
    figure = Figure(figsize=(width, 1.7 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (method, frame) in zip(grid.flat, panels.items(), strict=False):
        heights = 100 * frame["accuracy"]
        axes.bar(range(len(frame)), heights, width=1.0, color=[colours[tier] for tier in frame["tier"].fillna("-")])
        axes.set_title(label_of(wrapped(method)), fontsize=8)
        axes.set_xticks([])
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 100)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.supylabel("accuracy (%)", fontsize=9)
    legend_below(figure, [Patch(color=colour, label=label_of(tier)) for tier, colour in colours.items()], "tier")
    kept = [name for name in ("run_id", "client", "tier", "accuracy") if name in deployed]
    data = pd.concat([frame.assign(method=method) for method, frame in panels.items()])
    return Drawn(figure, data.filter(["method", *kept]))


def savings_figure(rows: Sequence[Row], *, narrow: bool = False) -> Drawn | None:
    """What each method saves against FedAvg of the target, per upload and in trained parameters; the published figures
    are marked.

    - `rows`: of `summary`, one setting. **Returns:** None without a run of FedAvg.
    """
    known = [row for row in rows if not math.isnan(row["saved"])]
    names = set(shown_methods([{name: row[name] for name in ("method", "algorithm", "accuracy")} for row in known]))
    known = [row for row in known if row["method"] in names][::-1]
    if not known:
        return None
    figure, axes = canvas(0.34 * len(known) + 1.0, narrow)
    saved = {
        "communication": [100 * row["saved"] for row in known],
        "trainable": [100 * (1 - row["trainable_share"]) for row in known],
    }
    handles: list[Any] = []
    for (name, values), offset, colour in zip(saved.items(), (0.2, -0.2), PALETTE, strict=False):
        places = [place + offset for place in range(len(known))]
        bars = [max(value, -100.0) for value in values]
        axes.barh(places, bars, height=0.36, color=colour)
        handles.append(Patch(color=colour, label=f"{name} saved"))
        published = f"published: {PUBLISHED[name]} %"
        handles.append(
            axes.axvline(PUBLISHED[name], color=colour, linestyle=(0, (4, 2)), linewidth=1.2, label=published)
        )
    lowest = min(0.0, *(max(value, -100.0) for values in saved.values() for value in values))
    axes.axvline(0, color="black", linewidth=0.8)
    name_rows(axes, [row["method"] for row in known], narrow)
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.set_xlim(min(-5.0, 1.05 * lowest), 105)
    axes.set_xlabel("% saved against FedAvg" if narrow else "% saved against FedAvg of the target (cut off at -100)")
    legend_below(figure, handles)
    data = {"method": [row["method"] for row in known]} | {f"{name} saved, %": each for name, each in saved.items()}
    return Drawn(figure, pd.DataFrame(data).iloc[::-1])


def difference_figure(rows: Sequence[Row], reading: str, *, narrow: bool = False) -> Drawn | None:
    """How far each method is from the reference at one budget, with 95 % intervals. None where nothing is known."""
    known = [row for row in rows if not math.isnan(row[f"{reading}_difference"])]
    if not known:
        return None
    known.sort(key=lambda row: row[f"{reading}_difference"])
    figure, axes = canvas((0.32 if narrow else 0.26) * len(known) + 1.0, narrow)
    found = []
    for place, row in enumerate(known):
        mean, half = (100 * row[f"{reading}_{name}"] for name in ("difference", "difference_ci"))
        clear = row[f"{reading}_p"] < 0.05
        shown = 0.0 if math.isnan(half) else half
        axes.errorbar(mean, place, xerr=shown, fmt="o", markersize=5, color=PALETTE[0], mfc=None if clear else "white")
        found.append((row["method"], mean, half, row[f"{reading}_p"]))
    axes.axvline(0, color="black", linewidth=0.8)
    name_rows(axes, [row["method"] for row in known], narrow)
    axes.grid(axis="x", alpha=0.25)
    reference = label_of(known[0]["reference"])
    axes.set_xlabel(f"percentage points against{chr(10) if narrow else ' '}{reference}")
    return Drawn(figure, pd.DataFrame(found, columns=["method", "difference, points", "half interval", "p (Holm)"]))


def time_figure(rows: Sequence[Row], *, narrow: bool = False) -> Drawn | None:
    """Where the time of a run went: before the first federated round, and in federated rounds. None where unknown."""
    known = [row for row in rows if not math.isnan(row["seconds"])][::-1]
    if not known:
        return None
    figure, axes = canvas((0.32 if narrow else 0.26) * len(known) + 1.0, narrow)
    before = [row["local_seconds"] for row in known]
    rounds = [row["seconds"] - row["local_seconds"] for row in known]
    axes.barh(range(len(known)), before, color=PALETTE[1])
    axes.barh(range(len(known)), rounds, left=before, color=PALETTE[0])
    name_rows(axes, [row["method"] for row in known], narrow)
    axes.set_xlabel("seconds a run (mean over seeds)" if narrow else "seconds a run (wall time, mean over seeds)")
    labels = ("round 0: what participants do alone, and scoring", "federated rounds")
    legend_below(figure, [Patch(color=PALETTE[1 - n], label=label) for n, label in enumerate(labels)])
    data = {"method": [row["method"] for row in known], "round 0, seconds": before, "rounds, seconds": rounds}
    return Drawn(figure, pd.DataFrame(data).iloc[::-1])


def labels_figure(histograms: Sequence[Sequence[int]], *, narrow: bool = False) -> Drawn | None:
    """Who holds what: one bar a participant, one colour a class. None where that is not known.

    - `histograms`: examples by class, `(participants, classes)`.
    """
    if not histograms:
        return None
    shown = histograms[:MOST_PARTICIPANTS]
    classes = max(len(histogram) for histogram in shown)
    rows = [[*histogram, *[0] * (classes - len(histogram))] for histogram in shown]
    colours = mpl.colormaps["viridis"]  # in order of lightness: neighbours in a bar are told apart without colours
    figure, axes = canvas(3.0, narrow)
    bottoms, handles = [0] * len(rows), []
    for label in range(classes):
        heights = [row[label] for row in rows]
        colour = colours(0.2 + 0.7 * label / max(classes - 1, 1))  # its ends are black or white on some page
        axes.bar(range(len(rows)), heights, bottom=bottoms, color=colour, width=0.85)
        handles.append(Patch(color=colour, label=str(label)))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xlabel("participant" if len(shown) == len(histograms) else f"participant (the first {len(shown)})")
    axes.set_ylabel("examples")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 1 < classes <= MOST_CLASSES:
        legend_below(figure, handles, "class")
    return Drawn(figure, pd.DataFrame(rows).rename_axis("participant").reset_index())
