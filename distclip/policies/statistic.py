"""What a policy may ask for: norms of the units of one level, and numbers of the user.

What units and levels are: [Note: units and slots] in policies/statistics.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Per: TypeAlias = Literal["model", "group", "parameter", "row"]
Groups: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
LEVELS: tuple[Per, ...] = ("model", "group", "parameter", "row")  # from coarse to fine


def _groups(given: Groups | Mapping[str, str | Sequence[str]]) -> Groups:
    pairs = given.items() if isinstance(given, Mapping) else given
    found = [(name, (each,) if isinstance(each, str) else each) for name, each in pairs]
    for name, patterns in found:
        listed = isinstance(patterns, Sequence) and all(isinstance(each, str) for each in patterns)
        if not isinstance(name, str) or not patterns or not listed:  # of a set ranks would see different orders
            raise ValueError(
                "groups must be patterns by name, such as {'norms': '*norm*'} or {'ends': ['embed.*', 'head.*']}, got "
                f"{name!r}: {patterns!r}"
            )
    return tuple((name, tuple(patterns)) for name, patterns in found)


@dataclass(frozen=True, slots=True)
class Statistic:
    """A norm that a policy needs beside that of all gradients.

    * ``per``: what has one number. ``"parameter"``: each parameter, whoever holds parts of it. ``"row"``: each index of
      its first dimension (an output of a Linear or a Conv); a parameter of fewer than two dimensions is one row.
      ``"group"``: each of ``groups``.
    * ``of``: ``"gradient"``, before clipping, or ``"parameter"``, the values as they are before the step.
    * ``groups``: for ``"group"``, patterns by name: ``{"experts": "*.experts.*", "rest": ("embed*", "head.*")}``. A
      pattern is a parameter's name, or one with the wildcards of a shell (``fnmatch``). Groups may overlap, and leave
      parameters out.

    >>> Statistic("parameter")
    Statistic(per='parameter', of='gradient', groups=())
    >>> Statistic("group", groups={"norms": "*norm*"}).groups
    (('norms', ('*norm*',)),)
    """

    per: Per = "model"
    of: Literal["gradient", "parameter"] = "gradient"
    groups: Groups | Mapping[str, str | Sequence[str]] = ()

    def __post_init__(self) -> None:
        if self.per not in LEVELS:
            raise ValueError(f"per must be one of {', '.join(LEVELS)}, got {self.per!r}")
        if self.of not in ("gradient", "parameter"):
            raise ValueError(f"of must be gradient or parameter, got {self.of!r}")
        object.__setattr__(self, "groups", _groups(self.groups))
        if bool(self.groups) != (self.per == "group"):
            raise ValueError(f"groups must be given for per='group' and for nothing else, got per={self.per!r}")

    @property
    def named(self) -> Groups:
        """The groups, each with its patterns."""
        return _groups(self.groups)

    @property
    def level(self) -> "Statistic":
        """That of gradients with the same units."""
        return self if self.of == "gradient" else Statistic(self.per, groups=self.groups)


MODEL = Statistic()


def asked(statistic: Statistic | Per) -> Statistic:
    """``"row"`` is short for ``Statistic("row")``."""
    return Statistic(statistic) if isinstance(statistic, str) else statistic


@dataclass(frozen=True, slots=True)
class Signal:
    """A number of the user's that a policy needs: the mean over ranks of ``step(..., signals={name: number})``."""

    name: str


def not_asked_for(statistic: Statistic | Per) -> ValueError:
    return ValueError(f"{statistic!r} is none of the statistics that were asked for: return it from needs()")
