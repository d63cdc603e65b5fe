"""`distclip diff`: read two runs, say where they part."""

import json
from collections.abc import Callable
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from distclip.errors import and_more, counted, printable
from distclip.runs.difference import Difference, Drift, Parting, difference
from distclip.runs.names import Names
from distclip.runs.recognise import open_runs
from distclip.runs.refusals import several_runs
from distclip.runs.run import Run

SAME, DIFFER = 0, 1  # exit codes


def diff(one: Path, other: Path, names: Names, as_json: bool, say: Callable[[str], object]) -> int:
    """Compare the runs at two paths and say what was found; return the exit code.

    Raises:
        RunError: why they cannot be compared, in one line.
    """
    runs = only_run(one, names), only_run(other, names)
    found = difference(*runs)
    for line in (
        [json.dumps(document_of(found), allow_nan=False)] if as_json else map(printable, lines_of(found, *runs))
    ):
        say(line)
    return SAME if found.parting is None else DIFFER


def only_run(path: Path, names: Names) -> Run:
    runs = open_runs(path, names)
    if len(runs) > 1:
        raise several_runs(path, [run.name for run in runs])
    return runs[0]


def document_of(found: Difference) -> dict[str, Any]:
    """What was found as JSON has it: what is not finite is a text."""
    document = {"same": found.parting is None, **asdict(found)}
    for each in document["parting"]["drifts"].values() if found.parting else ():
        each["by_step"] = {str(step): spelled(apart) for step, apart in each["by_step"].items()}
        each["largest"] = spelled(each["largest"])
    return document


def spelled(number: float) -> float | str:
    return number if isfinite(number) else "Infinity"


def lines_of(found: Difference, one: Run, other: Run) -> list[str]:
    """The same for a person."""
    lines = [f"A  {one.path}", f"B  {other.path}", f"compared: {compared(found)}"]
    for letter, count in zip("AB", found.alone, strict=True):
        lines += [f"left out: {counted(count, 'step')} that only {letter} has"] if count else []
    if found.parting is None:
        return [*lines, "the same"]
    return [*lines, *said_of(found.parting)]


def compared(found: Difference) -> str:
    """Steps and columns."""
    steps = f"{found.steps:,} steps, {found.first:,} to {found.last:,}" if found.steps > 1 else f"step {found.first:,}"
    prints = f"; fingerprints in {found.prints:,} of them" if found.prints else ""
    return f"{steps}: {', '.join(found.columns)}{prints}"


def said_of(parting: Parting) -> list[str]:
    lines = [f"they part at step {parting.step:,}: {', '.join(parting.columns)}"]
    if parting.parameters:
        odd, of = len(parting.parameters), parting.of
        which = f"all {of}" if 1 < odd == of else f"{and_more(parting.parameters)} ({odd} of {of})"
        when = "" if parting.parameters_step == parting.step else f" of step {parting.parameters_step:,}"
        lines.append(f"parameters that differ, by the {parting.by}s{when}: {which}")
    if parting.drifts:
        lines.append("how far they drift, relative to the larger number:")
        lines += [f"  {name:5} {spread(each)}" for name, each in parting.drifts.items()]
    return lines


def spread(drift: Drift) -> str:
    steps = ", ".join(f"{apart:.2g} at step {step:,}" for step, apart in drift.by_step.items())
    return f"{steps}; largest {drift.largest:.2g} at step {drift.largest_step:,}"
