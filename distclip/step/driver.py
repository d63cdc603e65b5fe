"""Who makes the calls of a Clipper in its user's place."""

from collections.abc import Callable
from dataclasses import dataclass

from ..report import Report


@dataclass(frozen=True, slots=True)
class Driver:
    """What the methods of a Clipper do where something else than its user's loop makes its calls.

    * ``name``: of what makes them, as errors say it: ``"optimizer.step()"``.
    * ``measure``, ``verify``: in place of the engine's; None for these.
    * ``clip_``, ``step``: where the user still makes these; None where calling them would clip twice (RuntimeError).
    * ``detach``: gives up driving; None where that cannot be (RuntimeError).
    """

    name: str
    measure: Callable[[], Report] | None = None
    verify: Callable[[], None] | None = None
    clip_: Callable[[], Report] | None = None
    step: Callable[..., Report] | None = None
    detach: Callable[[], None] | None = None
