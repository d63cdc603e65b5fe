"""From the reduced norm to a decision: one file, one idea, one paper.

Sees reduced numbers and its own state, never a gradient. What a policy returns is checked here, in one place.
"""

from .autoclip import AutoClip as AutoClip
from .chain import Chain as Chain
from .max_norm import MaxNorm as MaxNorm
from .per_group import PerGroup as PerGroup
from .per_parameter import PerParameter as PerParameter
from .protocol import Decision as Decision, Policy as Policy, State as State
from .shadow import Shadow as Shadow
from .statistics import Signal as Signal, Statistic as Statistic, Statistics as Statistics, Units as Units
from .value_clip import ValueClip as ValueClip
