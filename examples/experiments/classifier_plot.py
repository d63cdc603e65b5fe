"""The classifier's loss in training and F1 of what is held out: a line for each seed, a colour for each way to clip."""

from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from plot import BLUE, ORANGE, dress

Records = list[dict[str, Any]]
COLOURS = ("0.25", BLUE, ORANGE, "#009E73")  # of Okabe and Ito, as in plot.py
WINDOW = 10  # steps of which the median loss is shown
HIGHEST = 1e3  # losses above are drawn there


def draw(found: dict[str, list[Records]], file: Path) -> None:
    figure, (loss, f1) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", facecolor="white")
    for (name, runs), colour in zip(found.items(), COLOURS, strict=True):
        for seed, records in enumerate(runs):
            line = {"color": colour, "alpha": 0.75, "linewidth": 1.4, "label": name if seed == 0 else None}
            loss.plot(*smoothed(records), **line)
            looks = [each for each in records if "held_out_f1" in each]
            f1.plot([each["step"] for each in looks], [float(each["held_out_f1"]) for each in looks], **line)
    loss.set_yscale("log")
    loss.set_ylim(1e-2, 1.5 * HIGHEST)
    f1.set_ylim(-0.02, 1)
    finish(loss, "Training loss (median of 10 steps, at most 1000)")
    finish(f1, "F1 of comments in rows held out")
    f1.legend(loc="lower right", bbox_to_anchor=(1, 0.14), frameon=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def smoothed(records: Records) -> tuple[list[int], list[float]]:
    """What is not finite, or above HIGHEST, is drawn at the top."""
    losses = [min(x, HIGHEST) if isfinite(x := float(each["loss"])) else HIGHEST for each in records]
    steps = range(WINDOW, len(losses) + 1)
    return list(steps), [sorted(losses[step - WINDOW : step])[WINDOW // 2] for step in steps]


def finish(axes: Axes, title: str) -> None:
    axes.set_xlabel("step")
    dress(axes, title)
