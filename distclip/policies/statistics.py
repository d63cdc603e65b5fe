"""Statistics: the norms that a policy decides on, and the units that they are norms of.

A *statistic* is a norm of each unit of one level. A *unit* is what has one number: the model, a group of parameters, a
parameter, or a row of one. What travels between ranks are *slots*, the sums of powers of the finest level that anybody
asked for, one for each of its units; the units of coarser levels are sums of slots.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from ..ranks.message import combined, root

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


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """How numbers are put together: ``order`` them, (n,) int64, and combine the first ``lengths[0]``, and so on.

    ``order``: None where they are in order. ``lengths``: (units,) int64; None where each is a unit.
    """

    order: Tensor | None = None
    lengths: Tensor | None = None

    def __call__(self, numbers: Tensor, p: float) -> Tensor:
        """Sums of powers (their maximum for p = inf) of each unit; 0 for a unit without numbers. No host sync.

        The order of additions is fixed, and what is not finite stays in its unit.
        """
        if self.order is not None:
            numbers = numbers.index_select(0, self.order)
        if self.lengths is None:
            return numbers
        how = "max" if p == inf else "sum"
        return torch.segment_reduce(numbers, how, lengths=self.lengths, unsafe=True, initial=0)

    def firsts(self) -> Tensor | None:
        """The first number of each unit, (units,) int64; None where each number is a unit. None may be empty."""
        if self.lengths is None:
            return self.order
        places = self.lengths.cumsum(0) - self.lengths
        return places if self.order is None else self.order.index_select(0, places)


class RowNames(Sequence[str]):
    """Names of rows, made when they are asked for: there may be millions. ``parameters`` have ``counts`` rows each."""

    __slots__ = ("_starts", "counts", "parameters")

    def __init__(self, parameters: Sequence[str], counts: Sequence[int]) -> None:
        self.parameters, self.counts = parameters, counts
        self._starts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def parameter_of(self, index: int) -> str:
        """The name of the parameter whose row this is."""
        return self.parameters[bisect_right(self._starts, index) - 1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        k = bisect_right(self._starts, index) - 1
        name = self.parameters[k]
        return name if self.counts[k] == 1 else f"{name}[{index - self._starts[k]}]"


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The units of one level.

    * ``names``: of the units, the same on every rank; of rows :class:`RowNames`.
    * ``sizes``: (units,) float64, how many elements each has.
    * ``of_slots``: how slots make them up.
    * ``unit_of_slot``: (slots,) int64, the unit that a slot is in, ``len(names)`` for one in no unit; None where groups
      overlap. ``shared``: says which parameter is in two of them, and which these are.
    """

    names: Sequence[str]
    sizes: Tensor
    of_slots: Gather
    unit_of_slot: Tensor | None
    shared: str = ""


class Units:
    """What the statistics of one Clipper are norms of: agreed when it is built, the same on every rank.

    Inside a policy that wraps another, the *whole* of the inner one may be other units than the model: of all
    parameters at once, or one group. It is what is meant where no statistic is named.
    """

    __slots__ = ("_levels", "_member", "_whole", "size")

    def __init__(self, size: float = 0.0, levels: Mapping[Statistic, Level] | None = None) -> None:
        """``size``: how many elements the model has; 0 where nobody asked for more than its norm."""
        self.size = size
        self._levels = dict(levels or {})
        self._whole = MODEL
        self._member: int | None = None

    def at(self, whole: Statistic, member: int | None = None) -> "Units":
        """The same for a policy whose whole are the units of ``whole``, or the one with this number."""
        inner = Units(self.size, self._levels)
        inner._whole, inner._member = whole, member
        return inner

    @property
    def levels(self) -> tuple[Statistic, ...]:
        """The statistics of gradients that have units, in an order that is the same on every rank."""
        return tuple(self._levels)

    def level(self, statistic: Statistic | Per) -> Level:
        """The units of a statistic; ValueError where it was not asked for."""
        level = self._levels.get(asked(statistic).level)
        if level is None:
            raise not_asked_for(statistic)
        return level

    def shape(self, statistic: Statistic | Per | None = None) -> tuple[int, ...]:
        """The shape of a statistic: () for the model and for one group, else (units,). None: of the whole."""
        wanted = self._whole if statistic is None else asked(statistic)
        one = wanted.per == "model" or (statistic is None and self._member is not None)
        return () if one else (len(self.names(wanted)),)

    def names(self, statistic: Statistic | Per) -> Sequence[str]:
        """What its units are called: a parameter's name, ``name[row]``, or a group's name.

        Parameters that differ between ranks and share a name say where they are: ``experts.w1[ep=3]``.
        """
        return self.level(statistic).names

    def sizes(self, statistic: Statistic | Per) -> Tensor:
        """How many elements each unit has: (units,) float64."""
        return self.level(statistic).sizes

    def by_slot(self, per: Statistic | Per, coefs: Tensor) -> Tensor:
        """Of one coefficient for each unit, (units,), that of each slot, (slots,): 1 for those in no unit."""
        places = self.level(per).unit_of_slot
        assert places is not None, "groups that overlap are refused"
        return torch.cat([coefs, coefs.new_ones(1)]).index_select(0, places)

    def spread(self, coefs: Tensor, per: Statistic | Per, finer: Statistic | Per) -> Tensor:
        """Of one coefficient for each unit, that of each unit of a ``finer`` level; ValueError where units are cut."""
        level = self.level(finer)
        if asked(finer).per == "group":
            raise ValueError(f"{per!r} and {finer!r} group parameters differently: decide by the same groups")
        slots = self.by_slot(per, coefs)
        firsts = level.of_slots.firsts()
        return slots if firsts is None else slots.index_select(0, firsts.clamp(max=len(slots) - 1))

    def must_not_overlap(self, per: Statistic) -> None:
        """ValueError where a parameter is in two groups."""
        shared = self.level(per).shared
        if shared:
            raise ValueError(f"{shared}: give each parameter to one group")


class Statistics:
    """The reduced norms of one step: the same bits on every rank."""

    __slots__ = ("_norm", "_p", "_scale", "_signals", "_slots", "units")

    def __init__(
        self,
        norm: Tensor,
        units: Units,
        slots: Mapping[str, Tensor] | None = None,
        p: float = 2.0,
        scale: float = 1.0,
        signals: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``norm``: of the model's gradients, 0-d float64. ``slots``: of gradients, and of parameters where asked for,
        (slots,) float64. ``scale``: by which gradients are multiplied in them, and in ``norm`` no more. ``signals``: by
        name, 0-d float64.
        """
        self._norm, self.units, self._slots, self._p, self._scale = norm, units, slots or {}, p, scale
        self._signals = signals or {}

    def norm(self, statistic: Statistic | Per | None = None) -> Tensor:
        """Its norms: 0-d float64 for the model and for one group, else (units,). May be NaN or inf. No host sync.

        ``statistic``: None for that of what the policy clips as a whole: the model, but inside :class:`PerParameter`
        all parameters, each by itself, and inside :class:`PerGroup` one group. ValueError for one that was not asked
        for.
        """
        wanted, member = (self.units._whole, self.units._member) if statistic is None else (asked(statistic), None)
        if wanted == MODEL:
            return self._norm
        slots = self._slots.get(wanted.of)
        if slots is None:
            raise not_asked_for(wanted)
        per_model = wanted.per == "model"
        sums = combined(slots, self._p) if per_model else self.units.level(wanted).of_slots(slots, self._p)
        norms = self._root(sums if member is None else sums[member])
        return norms / self._scale if wanted.of == "gradient" and self._scale != 1.0 else norms

    def signal(self, name: str) -> Tensor:
        """The mean over ranks of what ``signals=`` gave by this name: 0-d float64, may be NaN or inf."""
        if name not in self._signals:
            raise ValueError(
                f"{name!r} is none of the signals that were asked for: return Signal({name!r}) from needs()"
            )
        return self._signals[name]

    def at(self, whole: Statistic, member: int | None = None) -> "Statistics":
        """The same for a policy whose whole are the units of ``whole``, or the one with this number."""
        units = self.units.at(whole, member)
        return Statistics(self._norm, units, self._slots, self._p, self._scale, self._signals)

    def after(self, coefs: Tensor, per: Statistic | Per = MODEL) -> "Statistics":
        """As they are once the gradients of each unit were multiplied by its coefficient: 0-d, or (units,)."""
        slots, norm = dict(self._slots), self._norm
        by_model = asked(per) == MODEL
        if "gradient" in slots:
            factors = coefs if by_model else self.units.by_slot(per, coefs)
            slots["gradient"] = slots["gradient"] * (factors if self._p == inf else factors.pow(self._p))
        norm = norm * coefs if by_model else self._root(combined(slots["gradient"], self._p)) / self._scale
        return Statistics(norm, self.units, slots, self._p, self._scale, self._signals)

    def shrunk(self, factors: Tensor) -> Tensor:
        """What the norm of all gradients is multiplied by where those of each slot are by one of (slots,) ``factors``.

        0-d float64: exactly 1 where all factors are. No host sync.
        """
        slots = self._slots["gradient"]
        before = combined(slots, self._p)
        after = combined(slots * (factors if self._p == inf else factors.pow(self._p)), self._p)
        return torch.where(before == 0, 1.0, self._root(after / before))

    def _root(self, sums: Tensor) -> Tensor:
        norms = sums.clone() if self._p == inf else root(sums, self._p)
        assert isinstance(norms, Tensor)
        return norms


def not_asked_for(statistic: Statistic | Per) -> ValueError:
    return ValueError(f"{statistic!r} is none of the statistics that were asked for: return it from needs()")
