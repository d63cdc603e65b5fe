"""Finding: what came of one check, the same on every rank; a record is what one rank has seen of it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from distclip.doctor.meeting import Record

State: TypeAlias = Literal["ok", "wrong", "left out"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Finding:
    """What a check has found.

    * ``text``: in a line; ``more``: lines below; ``columns``: of the table of layouts.
    * ``facts``: the numbers behind it, for JSON.
    * ``ends``: nothing can be checked after it. ``code``: what the command then exits with.
    """

    name: str
    state: State = "ok"
    text: str = ""
    columns: Sequence[str] = ()
    more: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    ends: bool = False
    code: int = 0

    @property
    def wrong(self) -> bool:
        return self.state == "wrong"

    @property
    def says_nothing(self) -> bool:
        return not (self.text or self.columns or self.more)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True, slots=True, frozen=True)
class Check:
    """One check: every rank runs it, and rank 0 judges the records of all, none of which has an error.

    ``patience``: seconds more than others that ranks may be late for it.
    """

    name: str
    run: Callable[[], Record]
    judge: Callable[[str, Sequence[Record]], Finding]
    patience: float = 0.0


class Unfit(Exception):
    """This check cannot be made here; the message says what it needs, and is the same on every rank."""


class Unusable(ValueError):
    """What the user gave cannot be used: one line, and exit code 2."""
