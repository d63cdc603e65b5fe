"""Who decides whether what was measured on a GPU is right: numbers in, faults out. Needs neither torch nor a GPU.

A part of the check yields readings, ``{"kind": ..., "what": ..., "got": ..., "right": ...}``. Its kind says how ``got``
must stand to ``right``; the judge holds all limits, so that no part can be lenient with itself. A part that has
measured too little, ended in any way but well, or never began, is a fault too.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, isnan
from typing import Any

Reading = Mapping[str, Any]

NORM = 2e-7  # relative error of a norm
LEFT = {"float32": 2e-6, "bfloat16": 2e-3, "float16": 1e-3, "mixed": 2e-3}  # of what clipping leaves, by dtype
COPY = 0.8  # of a copy's bandwidth
NOISE = 1.03  # "not slower": medians of interleaved rounds are known to so much
STEP = 1.05  # a training step with clipping, by one without
COMPILE = 60.0  # seconds until the first call of a kernel returns
BYTES, BYTES_EACH = 1 << 20, 64  # that a call may allocate, and for each parameter more
CONVERTED = 1 << 25  # of float64, where torch's kernels have to convert a part of a gradient
LAUNCHES = {
    "clip_": 20,
    "step": 20,
    "values": 25,
    "autoclip": 36,
    "function": 15,
}  # small kernels beside the work on tensors


def norm(got: float, right: float) -> bool:
    if isnan(right):
        return isnan(got)
    return got == right or abs(got - right) <= NORM * right < float("inf")


def left(got: float, right: float, dtype: str, times: int = 1) -> bool:
    return abs(got - right) <= times * LEFT[dtype] * right


def positive(number: float) -> bool:
    return isfinite(number) and number > 0


RULES: dict[str, Callable[[Reading], bool]] = {
    "norm": lambda r: norm(r["got"], r["right"]),
    "left": lambda r: left(r["got"], r["right"], r["dtype"]),
    "bits": lambda r: r["got"] == 0 and r["of"] > 0,  # elements unlike
    "true": lambda r: r["got"] is True,
    "silent": lambda r: r["got"] == "",  # what an error said
    "lines": lambda r: r["got"] == [],  # of a case that says what is wrong
    "launches": lambda r: 0 <= r["got"] <= LAUNCHES[r["right"]] and r["work"] > 0,
    "bytes": lambda r: 0 <= r["got"] <= BYTES + BYTES_EACH * r["parameters"] + CONVERTED * bool(r.get("converts")),
    "bandwidth": lambda r: r["got"] >= COPY * r["right"] > 0,
    "times": lambda r: 0 < r["got"] <= NOISE * r["right"],
    "step": lambda r: 0 < r["got"] <= STEP * r["right"],
    "seconds": lambda r: 0 < r["got"] <= COMPILE,
    "fact": lambda r: True,
}
REHEARSED: dict[str, Callable[[Reading], bool]] = {  # what a rehearsal on a CPU can ask of what only a GPU decides
    "bandwidth": lambda r: positive(r["got"]) and positive(r["right"]),
    "times": lambda r: positive(r["got"]) and positive(r["right"]),
    "step": lambda r: positive(r["got"]) and positive(r["right"]),
    "seconds": lambda r: positive(r["got"]),
    "bytes": lambda r: r["got"] >= 0,
    "left": lambda r: left(r["got"], r["right"], r["dtype"], 3),  # Triton's interpreter cuts bf16 off
}


def fault_of(reading: Reading, rehearsal: bool = False) -> str | None:
    """What is wrong with one reading; None if nothing is. One that cannot be judged is wrong."""
    kind = reading.get("kind")
    rule = (REHEARSED.get(kind) if rehearsal else None) or RULES.get(kind)
    if rule is None:
        return f"no rule for {dict(reading)}"
    try:
        good = rule(reading)
    except (KeyError, TypeError) as error:
        return f"cannot be judged ({type(error).__name__}: {error}): {dict(reading)}"
    if good:
        return None
    rest = {key: value for key, value in reading.items() if key not in ("kind", "what")}
    return f"{kind}: {reading.get('what')}: {rest}"


def faults_of(run: Mapping[str, Any], needs: Mapping[str, int], rehearsal: bool = False) -> list[str]:
    """What is wrong with the run of one part: ``ended`` and ``readings``; ``needs``: how many of each kind prove it."""
    readings: Sequence[Reading] = run.get("readings", ())
    found = [] if run.get("ended") == "well" else [f"ended: {run.get('ended', 'never began')}"]
    found += [fault for reading in readings if (fault := fault_of(reading, rehearsal)) is not None]
    counts = Counter(reading.get("kind") for reading in readings)
    found += [
        f"measured too little: {counts[kind]} readings of {kind}, {least} are needed"
        for kind, least in needs.items()
        if counts[kind] < least
    ]
    return found


def verdict(
    runs: Mapping[str, Mapping[str, Any]], asked: Mapping[str, Mapping[str, int]], rehearsal: bool = False
) -> dict[str, list[str]]:
    """For every part that was ``asked`` for, with its needs, what is wrong with it; all empty if the proof holds."""
    return {name: faults_of(runs.get(name, {}), needs, rehearsal) for name, needs in asked.items()}
