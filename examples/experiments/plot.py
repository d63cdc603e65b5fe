"""The results as a picture: a row for each policy, a dot for each seed, in colours that all eyes tell apart."""

from math import isfinite
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from table import Results

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito


def draw(results: Results, file: Path) -> None:
    figure, (order, digits, text) = pyplot.subplots(
        1, 3, sharey=True, figsize=(11, 0.8 + 0.36 * len(results)), layout="constrained", facecolor="white"
    )
    dots(order, results, "order", "Temporal order: wrong (4 seeds)")
    order.set_xlim(-0.04, 1)
    dots(digits, results, "digits", "Digits: right (3 seeds)")
    digits.set_xlim(0, 1.03)
    losses(text, results)
    order.set_yticks(range(len(results)), list(results))
    order.invert_yaxis()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def dots(axes: Axes, results: Results, column: str, title: str) -> None:
    for place, found in enumerate(results.values()):
        axes.plot(found[column], [place] * len(found[column]), "o", color=BLUE, alpha=0.6)
    dress(axes, title)


def losses(axes: Axes, results: Results) -> None:
    """Clean and poisoned, joined by a line; a run that ended in NaN has no dot."""
    for place, found in enumerate(results.values()):
        (clean,), (poisoned,) = found["clean"], found["poisoned"]
        if isfinite(clean) and isfinite(poisoned):
            axes.plot([clean, poisoned], [place, place], "-", color="0.6", zorder=0)
        axes.plot(clean, place, "o", color=BLUE, label="clean" if not place else None)
        axes.plot(poisoned, place, "D", color=ORANGE, markersize=5, label="3 poisoned batches" if not place else None)
    axes.legend(loc="center right", frameon=True)
    dress(axes, "Text: held-out loss")


def dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
