"""The results as a table and as JSON: for each policy, by column, a number for each seed."""

import json
import platform
import time
from collections.abc import Sequence
from math import isfinite
from statistics import mean

import torch

from distclip.bench.machine import cpu_model

Results = dict[str, dict[str, list[float]]]
HEADS = ("policy", "order solved", "digits right (lowest)", "loss", "poisoned")


def row(name: str, found: dict[str, list[float]]) -> tuple[str, ...]:
    solved, right = sum(wrong < 0.01 for wrong in found["order"]), found["digits"]
    losses = (f"{found[column][0]:.3f}" for column in ("clean", "poisoned"))
    return (name, f"{solved}/{len(found['order'])}", f"{mean(right):.3f} ({min(right):.3f})", *losses)


def table(results: Results) -> str:
    """In Markdown."""
    rows: list[Sequence[str]] = [HEADS, *(row(name, found) for name, found in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, each, widths))} |" for each in rows)


def as_json(results: Results, seeds: dict[str, list[int]], seconds: dict[str, float]) -> str:
    """With null for NaN and inf, which JSON lacks."""
    numbers = {
        name: {column: [x if isfinite(x) else None for x in each] for column, each in found.items()}
        for name, found in results.items()
    }
    made = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_model(), "python": platform.python_version()}
    about = {**made, "torch": torch.__version__, "seconds": seconds, "seeds": seeds, "results": numbers}
    return json.dumps(about, indent=1) + "\n"
