"""The Clipper that a config asks for."""

import math

from distclip import AutoClip, MaxNorm, ValueClip
from distclip.step.options import Options
from distclip.train.config import Clip


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
    return {"nonfinite": clip.nonfinite, "max_consecutive_skips": clip.max_consecutive_skips}
