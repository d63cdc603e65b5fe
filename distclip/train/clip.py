"""The Clipper that a config asks for."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from distclip import AutoClip, MaxNorm, ValueClip
from distclip.errors import and_more
from distclip.step.options import Options, Watch
from distclip.train.config import Clip
from distclip.train.problem import require


def build_policy(clip: Clip) -> MaxNorm | ValueClip | AutoClip:
    if clip.policy == "value":
        assert clip.clip_value is not None  # checked by Clip
        return ValueClip(clip.clip_value)
    if clip.policy == "autoclip":
        ceiling = math.inf if clip.max_norm is None else clip.max_norm
        return AutoClip(percentile=clip.percentile, window=clip.window, max_norm=ceiling)
    if clip.policy == "none":
        return MaxNorm(math.inf)  # the norm is still measured
    assert clip.max_norm is not None  # checked by Clip
    return MaxNorm(clip.max_norm)


def options_of(clip: Clip) -> Options:
    return {
        "nonfinite": clip.nonfinite,
        "max_consecutive_skips": clip.max_consecutive_skips,
        "watch": watch_of(clip),
    }


def watch_of(clip: Clip) -> Watch | None:
    return {each: each for each in patterns_of(clip)} or ("parameters" if clip.watch else None)


def patterns_of(clip: Clip) -> tuple[str, ...]:
    """What is watched by pattern: each has a column of its name."""
    return clip.watch if isinstance(clip.watch, tuple) else ()


def check_watch(clip: Clip, names: Sequence[str]) -> None:
    """Check that each pattern is of some of these parameters of the whole model."""
    for pattern in patterns_of(clip):
        there = any(fnmatchcase(name, pattern) for name in names)
        require(there, "clip.watch", f"no parameter matches {pattern!r}: choose among {and_more(names)}")
