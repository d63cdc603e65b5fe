"""Comparing the copies of gradients in the calls in which the host looks at them, before anything is decided."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..plan.build import Plan
from ..plan.drift import compare_now
from ..plan.measured import Measured
from ..plan.split import compare_axes
from .calls import Call, Calls


def compared(plan: Plan, measured: Measured, call: Call, calls: Calls, axes_of: Sequence[Tensor] | None) -> Measured:
    """``measured``, once its copies are compared: in a ``call`` that does so, or that tells that they have drifted.

    ``axes_of``: the parameters that may be one along `split_over`; None without that.
    """
    if not (call.compares or measured.reduced.drift is True) or not compare_now(plan, measured, call.name):
        return measured
    if call.compares:
        if axes_of is not None:
            compare_axes(plan, axes_of, measured)
        calls.compared()
    return replace(measured, reduced=measured.reduced.judged())
