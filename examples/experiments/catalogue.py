"""The rows of the table: every policy of the catalogue with its defaults, or with a bound of 1 where it needs one."""

from math import inf

from distclip import (
    AGC,
    AdaGC,
    AutoClip,
    Chain,
    MaxNorm,
    MaxRMS,
    Normalize,
    PerParameter,
    Policy,
    QuantileTracker,
    SkipSpikes,
    Smooth,
    ValueClip,
    ZClip,
)

POLICIES: dict[str, Policy | None] = {
    "none": None,  # a plain optimizer.step()
    "MaxNorm(1.0)": MaxNorm(1.0),
    "MaxNorm(100.0)": MaxNorm(100.0),  # mis-set: far above the norms of a healthy run
    "ValueClip(0.1)": ValueClip(0.1),
    "Smooth(1.0)": Smooth(1.0),
    "Normalize(1.0)": Normalize(1.0),
    "AutoClip()": AutoClip(),
    "QuantileTracker()": QuantileTracker(),
    "ZClip()": ZClip(),
    "ZClip(max_norm=inf)": ZClip(max_norm=inf),
    "SkipSpikes()": SkipSpikes(),
    "Chain(SkipSpikes(), 1.0)": Chain(SkipSpikes(), 1.0),
    "PerParameter(1.0)": PerParameter(1.0),
    "MaxRMS()": MaxRMS(),
    "MaxRMS(0.01)": MaxRMS(0.01),
    "AdaGC()": AdaGC(),
    "AGC()": AGC(),  # whose 0.01 is for batches of 4096
    "AGC(0.05)": AGC(0.05),
}
