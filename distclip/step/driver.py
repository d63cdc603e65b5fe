"""Driver: what calls a Clipper in its user's place."""

from collections.abc import Callable
from dataclasses import dataclass

from ..report import Fingerprint, Report


@dataclass(frozen=True, slots=True)
class Driver:
    """What the methods of a Clipper do where a framework or an optimizer calls it, not its user's loop.

    * ``name``: of the caller, as errors spell it: ``"optimizer.step()"``.
    * ``measure``, ``fingerprint``, ``verify``: in place of the engine's; None for the engine's.
    * ``clip_``, ``step``: where the user still calls these; None where that would clip twice (RuntimeError).
    * ``detach``: stops the caller; None where that is impossible (RuntimeError).
    """

    name: str
    measure: Callable[[], Report] | None = None
    fingerprint: Callable[[], Fingerprint] | None = None
    verify: Callable[[], None] | None = None
    clip_: Callable[[], Report] | None = None
    step: Callable[..., Report] | None = None
    detach: Callable[[], None] | None = None
