"""What the page draws, as one JSON document: so small that the file stays below 6 MB, however long the runs are."""

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distclip.reporting.advice import Advice, advice_on
from distclip.reporting.analysis import Analysis
from distclip.reporting.comparison import advice_on_all
from distclip.reporting.thin import thinned
from distclip.reporting.words import percent, short
from distclip.runs.run import Floats, Run, Steps

POINTS = 4000  # of a curve, for one run
CELLS = 60_000  # of a heat map
RUNS = 5  # so many have that room each, more share it
BUCKETS = 200  # of steps, for shares
BINS = 60
LAYERS, LISTED = 150, 50  # at most, of layers in a heat map and of spikes and culprits in a table
UNKNOWN = -32768  # in a heat map


def document_of(found: list[Analysis], version: str) -> dict[str, Any]:
    room = min(1.0, RUNS / len(found))
    together = [said(each) for each in advice_on_all(found)]
    return {"version": version, "advice": together, "runs": [part(each, room) for each in found]}


def part(found: Analysis, room: float) -> dict[str, Any]:
    run, most = found.run, max(100, int(POINTS * room))
    return {
        "name": run.name,
        "program": run.program,
        "path": str(run.path),
        "tiles": tiles(found),
        "advice": [said(each) for each in advice_on(found)],
        "norm": norm_curve(run, most),
        "bound": bound_curve(run, most // 2),
        "skipped": points(run.step, run.norm, run.skip & run.finite, most // 4),
        "bad": [[step, run.culprits.get(step, "")] for step in run.step[~run.finite].tolist()[:LISTED]],
        "shares": shares(run) if run.bounded or run.skip.any() else None,
        "loss": points(run.step, run.loss, np.isfinite(run.loss), most // 2),
        "spikes": spikes(found),
        "histogram": histogram(run.norm[run.finite]),
        "candidates": [[each.name, each.bound, each.clipped, each.kept] for each in found.candidates],
        "replays": [
            [each.policy, each.steps, each.clipped, each.skipped, each.bound if np.isfinite(each.bound) else None]
            for each in found.replays
        ],
        "layers": heat_map(run, int(CELLS * room)),
        "notes": list(run.notes),
    }


def said(advice: Advice) -> list[str]:
    return [advice.kind, advice.weight, advice.title, advice.reason]


def tiles(found: Analysis) -> list[list[str]]:
    """The numbers at the top: name, value, and a line below."""
    run = found.run
    bound = "no bound logged" if not np.isfinite(found.bound) else f"bound {short(found.bound)}"
    skips = f"at most {found.longest_skips:,} in a row" if found.longest_skips else "none"
    high = found.spikes[0] if found.spikes else None
    return [
        ["steps", f"{found.steps:,}", f"{run.step[0]:,} to {run.step[-1]:,}" if found.steps else ""],
        ["clipped", "?" if found.clipped is None else percent(found.clipped), bound + ", moving" * found.moves],
        ["skipped", percent(found.skipped), skips],
        ["not finite", f"{found.nonfinite:,}", "NaN or inf"],
        ["median norm", short(found.quantiles[0.5]), f"99 % below {short(found.quantiles[0.99])}"],
        ["largest norm", short(found.largest), f"step {found.largest_step:,}"],
        ["spikes", f"{len(found.spikes):,}", f"up to {short(high.height)} x the norms around" if high else "none"],
    ]


def norm_curve(run: Run, most: int) -> dict[str, Any]:
    """With what happened in each step: 0 nothing, 1 clipped, 2 skipped."""
    rows = np.flatnonzero(run.finite)
    rows = rows[thinned(run.norm[rows], most)]
    what = np.where(run.skip[rows], 2, run.clipped[rows])
    return {"x": whole(run.step[rows]), "y": packed(run.norm[rows], "f4"), "what": packed(what, "u1")}


def bound_curve(run: Run, most: int) -> dict[str, Any] | None:
    rows = np.flatnonzero(np.isfinite(run.max_norm))
    if not len(rows):
        return None
    bound = run.max_norm[rows]
    turns = np.flatnonzero(np.append(True, bound[1:] != bound[:-1]))
    rows = np.append(rows[turns[thinned(bound[turns], most)]], rows[-1])
    return {"x": whole(run.step[rows]), "y": packed(run.max_norm[rows], "f4")}


def points(step: Steps, values: Floats, use: NDArray[np.bool_], most: int) -> dict[str, Any] | None:
    rows = np.flatnonzero(use)
    if not len(rows):
        return None
    rows = rows[thinned(values[rows], max(most, 4))]
    return {"x": whole(step[rows]), "y": packed(values[rows], "f4")}


def shares(run: Run) -> dict[str, Any]:
    """Which part of the steps around was clipped and skipped, in percent."""
    starts = np.unique(np.linspace(0, len(run.step), BUCKETS + 1).astype(np.int64)[:-1])
    sizes = np.diff(np.append(starts, len(run.step)))
    clipped, skipped = (
        100 * np.add.reduceat(flags.astype(np.int64), starts) / sizes for flags in (run.clipped, run.skip)
    )
    middle = run.step[starts + sizes // 2]
    return {"x": whole(middle), "clipped": packed(clipped, "f4"), "skipped": packed(skipped, "f4")}


def spikes(found: Analysis) -> list[list[Any]]:
    run = found.run
    return [
        [
            int(run.step[each.row]),
            float(run.norm[each.row]),
            each.height,
            "skipped" if run.skip[each.row] else "clipped" if run.clipped[each.row] else "",
            [list(layer) for layer in each.layers],
        ]
        for each in found.spikes[:LISTED]
    ]


def histogram(finite: Floats) -> dict[str, Any] | None:
    """Bins of equal width on a log scale, and the share of norms above each edge of finer ones."""
    positive = finite[finite > 0]
    if not len(positive):
        return None
    low, high = float(positive.min()), float(positive.max()) * (1 + 1e-9)
    low, high = (low / 1.5, high * 1.5) if high / low < 1.1 else (low, high)
    edges = np.geomspace(low, high, BINS + 1)
    counts, _ = np.histogram(positive, edges)
    limits = np.geomspace(low / 1.05, high * 1.05, 4 * BINS)
    above = 100 * (1 - np.searchsorted(np.sort(finite), limits, side="right") / len(finite))
    return {
        "edges": packed(edges, "f4"),
        "counts": packed(counts, "i4"),
        "x": packed(limits, "f4"),
        "above": packed(above, "f4"),
    }


def heat_map(run: Run, cells: int) -> dict[str, Any] | None:
    """The largest norm of each layer in each bucket of steps: 1000 log10, for the layers with the largest norms."""
    layers = run.layers
    if not layers.names:
        return None
    norms = np.where(np.isfinite(layers.norms) & (layers.norms > 0), layers.norms, 0)
    kept = np.sort(np.argsort(-norms.max(axis=0), kind="stable")[:LAYERS])
    columns = min(len(layers.rows), max(20, cells // len(kept)), 600)
    starts = np.unique(np.linspace(0, len(layers.rows), columns + 1).astype(np.int64)[:-1])
    highest = np.maximum.reduceat(norms[:, kept], starts, axis=0).T
    with np.errstate(divide="ignore"):
        logs = np.where(highest > 0, np.rint(1000 * np.log10(highest)), UNKNOWN)
    return {
        "x": whole(run.step[layers.rows[starts]]),
        "names": [layers.names[k] for k in kept],
        "all": len(layers.names),
        "z": packed(logs.clip(UNKNOWN, 32767), "i2"),
    }


def whole(steps: Steps) -> dict[str, str]:
    return packed(steps, "i4" if not len(steps) or steps[-1] < 2**31 else "f8")


def packed(values: NDArray[Any], dtype: str) -> dict[str, str]:
    """Numbers in base64, a quarter of their size as text; float32 has no number above 3.4e38."""
    if dtype == "f4":
        values = np.clip(values, -3.4e38, 3.4e38)
    return {"dtype": dtype, "base64": base64.b64encode(values.astype(f"<{dtype}").tobytes()).decode()}
