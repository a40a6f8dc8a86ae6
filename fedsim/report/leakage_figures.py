"""The figures of what attacks measured, beside those of `fedsim.report.figures`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedsim.report.figures import LINE_STYLES, MOST_LINES, label_of
from fedsim.report.leakage import GUESSING, Points


MARKERS = "osD^vP*X"
PANELS = 3  # in a row


def roc_figure(curves: Mapping[str, Mapping[str, Sequence[Points]]]) -> Figure | None:
    """True-positive against false-positive rate, both logarithmic: a panel an attack, a colour and dash a method, a
    line a seed; dotted, by guessing. What has no false positive stands at the left edge. None without curves.

    - `curves`: of `fedsim.report.leakage.curves`.
    """
    if not curves:
        return None
    methods = list(dict.fromkeys(method for of_attack in curves.values() for method in of_attack))[:MOST_LINES]
    columns, rows = min(PANELS, len(curves)), math.ceil(len(curves) / PANELS)
    figure = Figure(figsize=(3.1 * columns + 0.4, 2.9 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (attack, of_attack) in zip(grid.flat, curves.items(), strict=False):
        seeds = [(method, points) for method in methods for points in of_attack.get(method, ())]
        rates = [rate for _, points in seeds for point in points for rate in point if rate > 0]
        least = min([*rates, 0.1]) / 2
        axes.plot([least, 1], [least, 1], color="black", linestyle=(0, (1, 2)), linewidth=1.0)
        for method, points in seeds:
            x, y = zip(*((max(fpr, least), max(tpr, least)) for fpr, tpr in points), strict=True)
            axes.step(x, y, where="post", linewidth=1.4, alpha=0.85, **_style(methods.index(method)))
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.1))
        axes.set_title(label_of(attack), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_axis_off()
    figure.supxlabel("share of others taken for members", fontsize=9)
    figure.supylabel("share of members found", fontsize=9)
    handles = [Line2D([], [], label=label_of(method), **_style(place)) for place, method in enumerate(methods)]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 0.98), frameon=False, fontsize=8)
    return figure


def trade_off_figure(points: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure | None:
    """Accuracy against leakage: a line a method, a point an epsilon, named beside it. None without any.

    - `points`: of `fedsim.report.leakage.trade_off`.
    """
    if not points:
        return None
    figure = Figure(figsize=(9.5, 4.6))
    axes = figure.subplots()
    for place, (method, of_method) in enumerate([*points.items()][:MOST_LINES]):
        names, x, y = zip(*of_method, strict=True)
        heights = [100 * value for value in y]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(x, heights, label=label_of(method), marker=marker, markersize=5, linewidth=1.4, **_style(place))
        for name, auc, height in zip(names, x, heights, strict=True):
            axes.annotate(
                name, (auc, height), xytext=(5, 4), textcoords="offset points", fontsize=8, color=f"C{place % 10}"
            )
    axes.axvline(GUESSING, color="black", linestyle=(0, (1, 2)), linewidth=1.0)
    axes.set_xlabel("AUC of membership in the deployed models (dotted: by guessing)")
    axes.set_ylabel("accuracy, mean over participants (%)")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def pictures_figure(found: Mapping[str, Mapping[str, np.ndarray]]) -> Figure | None:
    """A row a method: the true image, and what each attack made of it. None without any.

    - `found`: of `fedsim.report.leakage.pictures`.
    """
    if not found:
        return None
    shown = [*found.items()][:MOST_LINES]
    columns = max(len(images) for _, images in shown)
    figure = Figure(figsize=(1.25 * columns + 1.6, 1.6 * len(shown) + 0.2))
    grid = figure.subplots(len(shown), columns, squeeze=False, gridspec_kw={"hspace": 0.5})  # names may be long
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    for line, (method, images) in zip(grid, shown, strict=True):
        line[0].set_ylabel(label_of(method), rotation=0, ha="right", va="center", fontsize=8)
        for axes, (name, image) in zip(line, images.items(), strict=False):
            axes.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(label_of(name.replace("/", "\n")), fontsize=7)
    return figure


def _style(place: int) -> dict[str, Any]:
    """Told apart without colours, too."""
    return {"color": f"C{place % 10}", "linestyle": LINE_STYLES[place % len(LINE_STYLES)]}
