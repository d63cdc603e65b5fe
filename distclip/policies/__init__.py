"""From the reduced norm to a decision: one file, one idea, one paper.

Sees reduced numbers and its own state, never a gradient. What a policy returns is checked here, in one place.
"""

from .autoclip import AutoClip as AutoClip
from .max_norm import MaxNorm as MaxNorm
from .protocol import Decision as Decision, Policy as Policy, State as State
from .statistics import Statistic as Statistic, Statistics as Statistics, Units as Units
from .value_clip import ValueClip as ValueClip
