"""From the reduced norm to a decision: one file, one idea, one paper.

Sees reduced numbers and its own state, never a gradient. What a policy returns is checked here, in one place.
"""

from .adagc import AdaGC as AdaGC
from .agc import AGC as AGC
from .autoclip import AutoClip as AutoClip
from .chain import Chain as Chain
from .max_norm import MaxNorm as MaxNorm
from .max_rms import MaxRMS as MaxRMS
from .normalize import Normalize as Normalize
from .per_group import PerGroup as PerGroup
from .per_parameter import PerParameter as PerParameter
from .protocol import Decision as Decision, Policy as Policy, State as State
from .quantile_tracker import QuantileTracker as QuantileTracker
from .schedules import Cosine as Cosine, Warmup as Warmup
from .shadow import Shadow as Shadow
from .skip_spikes import SkipSpikes as SkipSpikes
from .smooth import Smooth as Smooth
from .statistic import Signal as Signal, Statistic as Statistic
from .statistics import Statistics as Statistics
from .units import Units as Units
from .value_clip import ValueClip as ValueClip
from .zclip import ZClip as ZClip
