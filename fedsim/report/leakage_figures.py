"""The figures of what attacks measured, beside those of `fedsim.report.figures`.

`narrow`: drawn for a phone.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedsim.report.drawing import (
    NARROW,
    WIDE,
    Drawn,
    canvas,
    colour_of,
    label_of,
    legend_below,
    of_method,
    style_of,
    wrapped,
)
from fedsim.report.figures import MOST_LINES
from fedsim.report.leakage import GUESSING, Points


MARKERS = "osD^vP*X"
PANELS = 3  # in a row


def roc_figure(
    curves: Mapping[str, Mapping[str, Sequence[Points]]], places: Mapping[str, int], *, narrow: bool = False
) -> Drawn | None:
    """True-positive against false-positive rate, both logarithmic: a panel an attack, a colour and dash a method, a
    line a seed; dotted, by guessing. What has no false positive stands at the left edge. None without curves.

    - `curves`: of `fedsim.report.leakage.curves`. - `places`: of `fedsim.report.figures.places_of`.
    """
    if not curves:
        return None
    methods = [*dict.fromkeys(method for of_attack in curves.values() for method in of_attack)][:MOST_LINES]
    columns = min(1 if narrow else PANELS, len(curves))
    rows = math.ceil(len(curves) / columns)
    width = NARROW if narrow else min(WIDE, 3.1 * columns + 0.4)
    figure = Figure(figsize=(width, 2.9 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    found = []
    for axes, (attack, of_attack) in zip(grid.flat, curves.items(), strict=False):
        seeds = [(method, points) for method in methods for points in of_attack.get(method, ())]
        rates = [rate for _, points in seeds for point in points for rate in point if rate > 0]
        least = min([*rates, 0.1]) / 2
        axes.plot([least, 1], [least, 1], color="black", linestyle=(0, (1, 2)), linewidth=1.0)
        for number, (method, points) in enumerate(seeds):
            x, y = zip(*((max(fpr, least), max(tpr, least)) for fpr, tpr in points), strict=True)
            (line,) = axes.step(x, y, where="post", linewidth=1.4, alpha=0.85, **style_of(places[method]))
            line.set_gid(of_method(places[method]))
            found += [(attack, method, number, fpr, tpr) for fpr, tpr in points]
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.1))
        axes.set_title(label_of(attack), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[max(len(curves) - columns, 0) : len(curves)]:  # the lowest of each column
        axes.set_xlabel("share of others taken for members", fontsize=8)
    figure.supylabel("share of members found", fontsize=9)
    legend_below(figure, [Line2D([], [], label=label_of(method), **style_of(places[method])) for method in methods])
    columns_of = ["attack", "method", "line", "false positive rate", "true positive rate"]
    return Drawn(figure, pd.DataFrame(found, columns=columns_of))


def trade_off_figure(points: Mapping[str, Sequence[tuple[str, float, float]]], *, narrow: bool = False) -> Drawn | None:
    """Accuracy against leakage: a line a method, a point an epsilon, named beside it. None without any.

    - `points`: of `fedsim.report.leakage.trade_off`.
    """
    if not points:
        return None
    figure, axes = canvas(3.4 if narrow else 4.2, narrow)
    handles, found = [], []
    for place, (method, variants) in enumerate([*points.items()][:MOST_LINES]):
        names, x, y = zip(*variants, strict=True)
        heights = [100 * value for value in y]
        marks = {"marker": MARKERS[place % len(MARKERS)], "markersize": 5}
        handles += axes.plot(x, heights, label=label_of(method), linewidth=1.4, **marks, **style_of(place))
        for name, auc, height in zip(names, x, heights, strict=True):
            axes.annotate(
                name, (auc, height), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour_of(place)
            )
            found.append((method, name, auc, height))
    axes.axvline(GUESSING, color="black", linestyle=(0, (1, 2)), linewidth=1.0)
    axes.set_xlabel("AUC of membership" if narrow else "AUC of membership in the deployed models (dotted: by guessing)")
    axes.set_ylabel("accuracy, mean over\nparticipants (%)" if narrow else "accuracy, mean over participants (%)")
    axes.grid(alpha=0.25)
    legend_below(figure, handles)
    return Drawn(figure, pd.DataFrame(found, columns=["method", "epsilon", "AUC", "accuracy, %"]))


def pictures_figure(found: Mapping[str, Mapping[str, np.ndarray]], *, narrow: bool = False) -> Drawn | None:
    """The true image of a method, and what each attack made of it; in a row, where it is not narrow. None without any.

    - `found`: of `fedsim.report.leakage.pictures`.
    """
    if not found:
        return None
    shown = [*found.items()][:MOST_LINES]
    most = max(len(images) for _, images in shown)
    columns = min(3 if narrow else most, most)
    lines = [
        (label_of(wrapped(method)) if not first else "", [*images.items()][first : first + columns])
        for method, images in shown
        for first in range(0, len(images), columns)
    ]
    side = 1.05 if narrow else 1.25
    figure = Figure(figsize=(min(WIDE, side * columns + 1.3), (side + 0.35) * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    for line, (method, images) in zip(grid, lines, strict=True):
        line[0].set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
        for axes, (name, image) in zip(line, images, strict=False):
            axes.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(label_of(name.replace("/", "\n")), fontsize=7)
    return Drawn(figure, pd.DataFrame())
