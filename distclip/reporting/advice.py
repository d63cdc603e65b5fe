"""Advice in words: what to do, why, and the numbers behind it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distclip.reporting.analysis import ENOUGH, Analysis
from distclip.reporting.spikes import shares_at
from distclip.reporting.words import counted, percent, short

NORMALISES, OFTEN = 0.9, 0.5  # shares of ordinary steps that are clipped
FAR = 3.0  # times the largest norm: a bound there bounds nothing
DRIVES = 0.5  # share of the squared norm in spikes
PILED = 0.1  # share of norms at their maximum: measured after clipping
OFTEN_SKIPPED = 0.05
DRIFTS = 0.3  # change of the share of ordinary steps that are clipped
SEVERAL = 2  # spikes, to blame a layer for them


@dataclass(frozen=True, slots=True)
class Advice:
    """``kind`` is a word for programs; ``title`` says what is so, ``reason`` why, with numbers, and what to do."""

    kind: str
    weight: Literal["problem", "warning", "good", "note"]
    title: str
    reason: str


def advice_on(found: Analysis) -> list[Advice]:
    """All there is to say, what is gravest first."""
    order = ("problem", "warning", "good", "note")
    every = (not_finite, skips, after_clipping, bound, shift, drift, layer, spikes, adaptive)
    return sorted((each for rule in every for each in rule(found)), key=lambda each: order.index(each.weight))


def not_finite(found: Analysis) -> Iterator[Advice]:
    run = found.run
    if not found.nonfinite:
        return
    rows = np.flatnonzero(~run.finite)
    first = int(run.step[rows[0]])
    texts = [run.culprits[step] for step in run.step[rows].tolist() if step in run.culprits]
    who = f"{texts[0]}." if texts else "The log does not say where: distclip's report.culprit names parameter and rank."
    for_good = bool(rows[-1] == len(run.norm) - 1 and len(rows) == len(run.norm) - rows[0] and len(rows) > 1)
    title = f"The norm is not finite in {counted(len(rows), 'step')}, first in step {first:,}"
    ending = " From there on it never is again: the parameters are lost, go back to a checkpoint before." * for_good
    yield Advice("nonfinite", "problem", title, f"Step {first:,}: {who}{ending}")


def skips(found: Analysis) -> Iterator[Advice]:
    if found.skipped >= OFTEN_SKIPPED:
        title = f"{percent(found.skipped)} of the steps are skipped"
        reason = f"Up to {counted(found.longest_skips, 'step')} in a row. What is skipped is never learnt from: "
        yield Advice("skips", "warning", title, reason + "look at the data of these steps, or clip them instead.")


def after_clipping(found: Analysis) -> Iterator[Advice]:
    finite = found.run.norm[found.run.finite]
    piled = float((finite >= found.largest * (1 - 1e-3)).mean()) if len(finite) > 1 else 0.0
    if piled >= PILED and found.clipped in (None, 0.0) and finite.min() < 0.9 * found.largest:
        title = "These norms look as if they were measured after clipping"
        reason = (
            f"{percent(piled)} of them lie at {short(found.largest)}, and none above. Log the norm before clipping:"
        )
        yield Advice("after-clipping", "problem", title, f"{reason} only it shows spikes and what a bound would do.")


def bound(found: Analysis) -> Iterator[Advice]:
    """Whether the run's bound is a good one."""
    if found.clipped is None or (np.isnan(found.bound) and found.clipped == 0):
        yield from without_bound(found)
    elif found.moves:
        yield from moving_bound(found, found.clipped)
    elif np.isfinite(found.bound) and found.quantiles[0.5] > 0:
        yield from fixed_bound(found, found.clipped)


def without_bound(found: Analysis) -> Iterator[Advice]:
    if np.isfinite(found.suggested):
        title = f"A bound to begin with: max_norm={short(found.suggested)}"
        usual = " Transformers clips at 1.0 if not told otherwise." * (found.run.program == "Transformers")
        unknown = f"The log has no bound of its own: --max-norm says which it was.{usual}"
        why = unknown if found.clipped is None else "Nothing bounded the norm of this run."
        reason = f"{suggestion(found)} {why}"
        yield Advice("suggested", "note", title, reason)


def moving_bound(found: Analysis, clipped: float) -> Iterator[Advice]:
    bounds = found.run.max_norm[np.isfinite(found.run.max_norm)]
    low, middle, high = np.quantile(bounds, [0, 0.5, 1]).tolist()
    title = f"The bound moves between {short(low)} and {short(high)}, and clips {percent(clipped)} of the steps"
    reason = f"Its median is {short(middle)}, that of the norms {short(found.quantiles[0.5])}."
    if clipped >= NORMALISES:
        reason += f" Clipped steps keep {percent(found.kept)} of their length: this normalises. A policy of a quantile "
        reason += "clips as many steps as lie above it: AutoClip(percentile=90) one in ten."
    yield Advice("moves", "warning" if clipped >= NORMALISES else "good", title, reason)


def fixed_bound(found: Analysis, clipped: float) -> Iterator[Advice]:
    """Judged by ordinary steps: those after the start and the last change of level, without spikes."""
    acts = share_above(found, found.bound) if len(found.settled) else clipped
    since = f" since step {int(found.run.step[found.shift.row]):,}" if found.shift else ""
    is_at, median = short(found.bound), float(np.median(found.settled)) if len(found.settled) else found.quantiles[0.5]
    numbers = f"The usual norm is {short(median)}, {short(median / found.bound)} times the bound of {is_at}"
    if acts >= NORMALISES:
        title = f"{percent(acts if since else clipped)} of the steps{since} are clipped: this normalises"
        reason = (
            f"{numbers}, and clipped steps keep {percent(found.kept)} of their length. So all steps are as long as "
        )
        reason += "the learning rate says, and the bound is a part of it."
        yield Advice("normalises", "warning", title, f"{reason} {suggestion(found)}")
    elif acts >= OFTEN:
        title = (
            f"{percent(acts if since else clipped)} of the steps{since} are clipped: the bound is below the usual norm"
        )
        yield Advice("often", "warning", title, f"{numbers}. {suggestion(found)}")
    elif clipped == 0 and found.bound > FAR * found.largest:
        title = f"The bound of {is_at} never acts"
        reason = f"The largest norm of {counted(found.steps, 'step')} is {short(found.largest)}, "
        reason += f"{percent(found.largest / found.bound)} of it: only a spike of {short(found.bound / median)} times "
        yield Advice("never", "warning", title, f"{reason}the usual norm would be clipped. {suggestion(found)}")
    else:
        title = f"The bound of {is_at} suits this run: it clips {percent(clipped)} of the steps"
        reason = f"{percent(acts)} of ordinary steps, those after the start and without spikes, lie above it. "
        yield Advice("suits", "good", title, f"{reason}{numbers}.")


def suggestion(found: Analysis) -> str:
    if not np.isfinite(found.suggested):
        return "There are too few norms to suggest another."
    share = share_above(found, found.suggested)
    return (
        f"Try max_norm={short(found.suggested)}: {percent(share)} of {counted(len(found.settled), 'ordinary norm')} "
        "(after the start, without spikes) lie above it, so that it clips spikes and leaves nearly all else as it is."
    )


def share_above(found: Analysis, limit: float) -> float:
    return float((found.settled > limit).mean()) if len(found.settled) else 0.0


def shift(found: Analysis) -> Iterator[Advice]:
    """A level that changes, to which no fixed bound fits."""
    change = found.shift
    if change is None:
        return
    rises = change.after > change.before
    step = int(found.run.step[change.row])
    title = f"The level of the norm {'rises' if rises else 'falls'} from {short(change.before)} to "
    title += f"{short(change.after)} at about step {step:,}"
    reason = "A fixed bound fits one side of it only."
    if np.isfinite(found.bound) and not found.moves:
        sides = (found.run.norm[: change.row], found.run.norm[change.row :])
        before, after = (percent(float((side > found.bound).mean())) for side in sides)
        reason += f" That of {short(found.bound)} lies below {before} of the norms before, and {after} after."
    reason += " Look for what changed there (data, learning rate, a resumed run). AutoClip, QuantileTracker and ZClip "
    yield Advice("shift", "warning", title, f"{reason}follow such a change by themselves.")


def drift(found: Analysis) -> Iterator[Advice]:
    """A level that moves slowly, so that a fixed bound does more and more, or less and less."""
    third = len(found.settled) // 3
    if found.shift or third < ENOUGH or found.moves or not np.isfinite(found.bound):
        return
    first, last = found.settled[:third], found.settled[-third:]
    before, after = (float((part > found.bound).mean()) for part in (first, last))
    if abs(after - before) >= DRIFTS:
        title = f"The bound of {short(found.bound)} acts on {percent(before)} of the first ordinary steps and on "
        title += f"{percent(after)} of the last"
        reason = f"The usual norm goes from {short(float(np.median(first)))} in their first third to "
        reason += f"{short(float(np.median(last)))} in the last, while the bound stays. AutoClip and QuantileTracker "
        yield Advice("drift", "warning", title, f"{reason}follow it, and MaxNorm takes a schedule (Warmup, Cosine).")


def layer(found: Analysis) -> Iterator[Advice]:
    """One layer that makes the norm of spikes."""
    run, rows = found.run, np.array([spike.row for spike in found.spikes], np.int64)
    places = np.flatnonzero(np.isin(run.layers.rows, rows))
    if len(places) < SEVERAL:
        return
    usual = np.median(shares_at(run, np.arange(len(run.layers.rows))[:: max(1, len(run.layers.rows) // 2000)]), axis=0)
    shares = np.where(usual < 0.9, shares_at(run, places).mean(axis=0), 0.0)  # a group of all is none
    top = int(shares.argmax())
    if shares[top] >= DRIVES and shares[top] > 1.5 * usual[top]:
        name = run.layers.names[top]
        title = f"{name} makes {percent(float(shares[top]))} of the norm in spikes"
        reason = f"Mean share of the squared norm in {counted(len(places), 'spike')}; "
        reason += f"in ordinary steps it is {percent(float(usual[top]))}. A global bound shrinks all other layers with "
        reason += "it: PerGroup gives it a bound of its own, PerParameter(AutoClip()) and AdaGC every layer one."
        yield Advice("layer", "warning", title, reason)


def spikes(found: Analysis) -> Iterator[Advice]:
    if found.spikes:
        steepest, run = found.spikes[0], found.run
        title = f"{counted(len(found.spikes), 'spike')} in {counted(found.steps, 'step')}"
        reason = f"The steepest is in step {int(run.step[steepest.row]):,}, with a norm of "
        reason += f"{short(float(run.norm[steepest.row]))}: {short(steepest.height)} times the norms around it. "
        caught = sum(bool(run.clipped[spike.row] or run.skip[spike.row]) for spike in found.spikes)
        reason += f"Clipped or skipped: {caught:,} of {len(found.spikes):,}. " if run.bounded else ""
        skipping = next((each for each in found.replays if each.policy.startswith("SkipSpikes")), None)
        if skipping is not None:
            reason += f"SkipSpikes would have skipped {percent(skipping.skipped)} of the last {skipping.steps:,} steps."
        yield Advice("spikes", "note", title, reason.strip())


def adaptive(found: Analysis) -> Iterator[Advice]:
    """What AutoClip would have done."""
    chosen = next((each for each in found.replays if "percentile=90" in each.policy), None)
    if chosen is not None:
        title = f"AutoClip(percentile=90) would have clipped {percent(chosen.clipped)}"
        reason = f"Replayed over the last {counted(chosen.steps, 'norm')} that were logged; its bound is "
        reason += f"{short(chosen.bound)} in the median. A run clipped by it would have had other norms."
        yield Advice("autoclip", "note", title, reason)
