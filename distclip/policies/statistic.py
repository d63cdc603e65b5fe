"""What a policy may ask for: norms of the units of one level, and numbers of the user.

What units and levels are: [Note: units and slots] in policies/statistics.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Per: TypeAlias = Literal["model", "group", "parameter", "row"]
Groups: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
Dims: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
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


def dims_by_pattern(given: Dims | Mapping[str, int | Sequence[int]], name: str = "dims") -> Dims:
    """``given`` as pairs; ValueError, of an argument with this ``name``, for what are no dimensions by pattern."""
    pairs = given.items() if isinstance(given, Mapping) else given
    found = [(pattern, (each,) if isinstance(each, int) else each) for pattern, each in pairs]
    for pattern, dims in found:
        listed = isinstance(dims, Sequence) and all(type(each) is int and each >= 0 for each in dims)
        if not isinstance(pattern, str) or not listed or len({*dims}) < len(dims):
            raise ValueError(
                f"{name} must be different dimensions from 0 by pattern, such as {{'*.experts.w2': (0, 2)}}, got "
                f"{pattern!r}: {dims!r}"
            )
    return tuple((pattern, tuple(sorted(dims))) for pattern, dims in found)


@dataclass(frozen=True, slots=True)
class Statistic:
    """A norm that a policy needs beside that of all gradients.

    * ``per``: what has one number. ``"parameter"``: each parameter, whoever holds parts of it. ``"row"``: what one
      output of a layer has of it (below). ``"group"``: each of ``groups``.
    * ``of``: ``"gradient"``, before clipping, or ``"parameter"``, the values as they are before the step.
    * ``groups``: for ``"group"``, patterns by name: ``{"experts": "*.experts.*", "rest": ("embed*", "head.*")}``. A
      pattern is a parameter's name, or one with the wildcards of a shell (``fnmatch``). Groups may overlap, and leave
      parameters out.
    * ``dims``: for ``"row"``, the dimensions whose indices number the rows, by patterns of which the first that matches
      counts: ``{"*.experts.w2": (0, 2)}``; ``()`` makes a parameter one row. For all others they are those of outputs:
      (1,) in a transposed convolution, (0, 1) in a parameter of three dimensions that is none of a convolution (experts
      by their outputs), and else (0,): an output of a Linear or a Conv, a token of an Embedding. A parameter of fewer
      than two dimensions is always one row.

    >>> Statistic("parameter")
    Statistic(per='parameter', of='gradient', groups=(), dims=())
    >>> Statistic("group", groups={"norms": "*norm*"}).groups
    (('norms', ('*norm*',)),)
    >>> Statistic("row", dims={"head.weight": 1}).dims
    (('head.weight', (1,)),)
    """

    per: Per = "model"
    of: Literal["gradient", "parameter"] = "gradient"
    groups: Groups | Mapping[str, str | Sequence[str]] = ()
    dims: Dims | Mapping[str, int | Sequence[int]] = ()

    def __post_init__(self) -> None:
        if self.per not in LEVELS:
            raise ValueError(f"per must be one of {', '.join(LEVELS)}, got {self.per!r}")
        if self.of not in ("gradient", "parameter"):
            raise ValueError(f"of must be gradient or parameter, got {self.of!r}")
        object.__setattr__(self, "groups", _groups(self.groups))
        if bool(self.groups) != (self.per == "group"):
            raise ValueError(f"groups must be given for per='group' and for nothing else, got per={self.per!r}")
        object.__setattr__(self, "dims", dims_by_pattern(self.dims))
        if self.dims and self.per != "row":
            raise ValueError(f"dims may be given for per='row' and for nothing else, got per={self.per!r}")

    @property
    def named(self) -> Groups:
        """The groups, each with its patterns."""
        return _groups(self.groups)

    @property
    def along(self) -> Dims:
        """The dimensions of rows, by patterns."""
        return dims_by_pattern(self.dims)

    @property
    def level(self) -> "Statistic":
        """That of gradients with the same units."""
        return self if self.of == "gradient" else Statistic(self.per, groups=self.groups, dims=self.dims)


MODEL, PARAMETERS = Statistic(), Statistic("parameter")


def asked(statistic: Statistic | Per) -> Statistic:
    """``"row"`` is short for ``Statistic("row")``."""
    return Statistic(statistic) if isinstance(statistic, str) else statistic


@dataclass(frozen=True, slots=True)
class Signal:
    """A number of the user's that a policy needs: the mean over ranks of ``step(..., signals={name: number})``."""

    name: str


def not_asked_for(statistic: Statistic | Per) -> ValueError:
    return ValueError(f"{statistic!r} is none of the statistics that were asked for: return it from needs()")
