"""What a rank says of itself where ranks do not agree, and how one that has failed lets the others know."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LayoutError, and_more
from ..ranks.agreement import Drift
from ..ranks.compare import who_differs
from ..ranks.digits import no_words, reduce_digits
from ..ranks.group import ClippingGroup
from ..ranks.message import Scalar, reduce_norm
from .build import Plan


def missing_in(plan: Plan, gradients: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Gradients that are not here, of parameters that every rank holds whole, by their places in ``plan.known``."""
    return tuple(k for k, source in plan.on_all_or_none if gradients[source] is None)


def account(plan: Plan, call: str, missing: Sequence[int], error: LayoutError | None) -> str:
    """What this rank has to say for itself in ``call``: what it holds and lacks, or its ``error``."""
    if error is not None:
        return f"stopped: {str(error).partition(': ')[0]}"  # what to do about it is said on that rank
    known = plan.known
    held = f"{len(known)} parameters (hash {plan.code:x})"
    lacks = f"without a gradient of {and_more([plan.label(known[k]) for k in missing])}" if missing else ""
    return ", ".join(filter(None, [call, held, lacks]))


def tell_others(
    group: ClippingGroup,
    device: torch.device,
    p: float,
    flags: Sequence[bool],
    error: Exception,
    call: str,
    length: int | None = None,
    exact: bool = False,
    drift: Drift | None = None,
) -> None:
    """Take part in the all-reduce of the others without an own sum, so that they raise as well: here it was ``error``.

    ``device``, the number of ``flags``, ``length``, that of the vector (None where a number travels), whether the sum
    is ``exact``, and what says nothing of copies, must be those of the others.
    """
    if exact:
        reduce_digits(group, no_words(device), p, 0, True, flags, call, drift)
        who_differs(group, device, stopped_by(error))
        return
    nothing: Scalar = 0.0
    if length is not None or device.type != "cpu":
        nothing = torch.zeros(() if length is None else length, dtype=torch.float64, device=device)
    reduced = reduce_norm(group, nothing, p, 0, True, flags, call=call, drift=drift)
    if reduced.disagree is True:
        who_differs(group, device, stopped_by(error))


def stopped_by(error: Exception) -> str:
    """What a rank says of an error of its own; what to do about it is said on that rank."""
    kind = "" if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__} "
    return f"stopped: {kind}{str(error).partition(chr(10))[0]}"
