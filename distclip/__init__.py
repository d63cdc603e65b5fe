"""distclip: gradient clipping by the true global norm, whatever the parallelism."""

from .attached import attach as attach
from .clipper import Clipper as Clipper
from .errors import LayoutError as LayoutError, NonFiniteError as NonFiniteError
from .functional import (
    clip_grad_norm_ as clip_grad_norm_,
    clip_grad_value_ as clip_grad_value_,
    clip_grads_with_norm_ as clip_grads_with_norm_,
    get_total_norm as get_total_norm,
)
from .layouts.layout import Layout as Layout
from .plan.source import find_source as find_source
from .policies import (
    AGC as AGC,
    AdaGC as AdaGC,
    AutoClip as AutoClip,
    Chain as Chain,
    Cosine as Cosine,
    Decision as Decision,
    MaxNorm as MaxNorm,
    MaxRMS as MaxRMS,
    Normalize as Normalize,
    PerGroup as PerGroup,
    PerParameter as PerParameter,
    Policy as Policy,
    QuantileTracker as QuantileTracker,
    Shadow as Shadow,
    Signal as Signal,
    SkipSpikes as SkipSpikes,
    Smooth as Smooth,
    Statistic as Statistic,
    Statistics as Statistics,
    Units as Units,
    ValueClip as ValueClip,
    Warmup as Warmup,
    ZClip as ZClip,
)
from .report import Report as Report

__version__ = "0.1.0"
