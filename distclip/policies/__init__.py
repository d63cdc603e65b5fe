"""Policies: one file, one idea, one paper."""

from .autoclip import AutoClip as AutoClip
from .max_norm import MaxNorm as MaxNorm
from .protocol import Decision as Decision, Policy as Policy, State as State
from .value_clip import ValueClip as ValueClip
