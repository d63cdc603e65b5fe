"""Statistics: the norms that a policy decides on.

[Note: units and slots]
* **level**: how finely gradients are told apart: the model, groups of parameters, parameters, rows. A **row** is an
  index of a parameter's first dimension; a parameter of fewer than two dimensions is one row.
* **unit**: what has one number at a level: the model, one group, one parameter, one row. The units of a level, their
  names and their order are the same on every rank.
* **statistic**: the norm of each unit of a level, of gradients or of parameters' values.
* **slot**: one place of the vector that travels (see [Note: what travels] in ranks/message.py). It has the sum of
  powers, or for p = inf the maximum, of one unit of the finest level that anybody asked for. Where groups are the
  finest, the parameters that are in the same groups share a slot. Units of coarser levels, the model too, are sums of
  slots.
* **local sum**: what this rank has of one parameter or row, before the weights 1 / replicas. It goes into one slot,
  into which other local sums may go too; a slot to which a rank has nothing to add gets 0 from it.
"""

from collections.abc import Mapping
from math import inf, nan

import torch
from torch import Tensor

from ..ranks.message import combined, root
from .statistic import MODEL, Per, Statistic, asked, not_asked_for
from .units import Units


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
        """``norm``: of the model's gradients, 0-d float64. ``slots``: of gradients, and of parameters' values and zeros
        where asked for, (slots,) float64. ``scale``: by which gradients are multiplied in them, and in ``norm`` no
        more. ``signals``: by name, 0-d float64.
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
        if wanted is MODEL or wanted == MODEL:  # the first takes no time
            return self._norm
        slots = self._slots.get(wanted.of)
        if slots is None:
            raise not_asked_for(wanted)
        per_model = wanted.per == "model"
        sums = combined(slots, self._p) if per_model else self.units.level(wanted).of_slots(slots, self._p)
        norms = self._root(sums if member is None else sums[member])
        return norms / self._scale if wanted.of == "gradient" and self._scale != 1.0 else norms

    def zeros(self, statistic: Statistic) -> Tensor | None:
        """Which share of the elements of each unit is 0, (units,) float64; None where nobody asked.

        NaN for a unit of which there is no gradient, as no rank has seen a zero nor anything else; and of unknown size.
        """
        counts = self._slots.get("zeros")
        if counts is None:
            return None
        zeros, sizes = self.units.level(statistic).of_slots(counts, 1), self.units.sizes(statistic)
        seen = (zeros > 0) | (self.norm(statistic) != 0)
        return torch.where(seen & (sizes > 0), zeros / sizes, nan)

    def signal(self, name: str) -> Tensor:
        """The mean over ranks of what ``signals=`` gave by this name: 0-d float64, may be NaN or inf, a copy."""
        if name not in self._signals:
            raise ValueError(
                f"{name!r} is none of the signals that were asked for: return Signal({name!r}) from needs()"
            )
        return self._signals[name].clone()

    def at(self, whole: Statistic, member: int | None = None) -> "Statistics":
        """The same for a policy whose whole are the units of ``whole``, or the one with this number."""
        units = self.units.at(whole, member)
        return Statistics(self._norm, units, self._slots, self._p, self._scale, self._signals)

    def after(self, coefs: Tensor, per: Statistic | Per = MODEL) -> "Statistics":
        """As they are once the gradients of each unit were multiplied by its coefficient: 0-d, or (units,)."""
        slots, factors = dict(self._slots), self.units.by_slot(per, coefs)
        if "gradient" in slots:
            slots["gradient"] = self._times(slots["gradient"], factors)
        norm = self._root(combined(slots["gradient"], self._p)) / self._scale if factors.dim() else self._norm * factors
        return Statistics(norm, self.units, slots, self._p, self._scale, self._signals)

    def shrunk(self, factors: Tensor) -> Tensor:
        """What the norm of all gradients is multiplied by where those of each slot are by one of (slots,) ``factors``.

        0-d float64: exactly 1 where all factors are, and a factor that is 0-d itself. No host sync.
        """
        if not factors.dim():
            return factors
        slots = self._slots["gradient"]
        before, after = combined(slots, self._p), combined(self._times(slots, factors), self._p)
        if slots.is_cpu:  # in numbers, and in a third of the time
            under, over = before.item(), after.item()
            nothing = under == 0 or (not over < inf and bool((factors == 1).all()))
            ratio = 1.0 if nothing else root(over / under, self._p)
            assert not isinstance(ratio, Tensor)
            return torch.scalar_tensor(ratio, dtype=torch.float64)
        nothing_is_scaled = (before == 0) | (factors == 1).all()  # also of what is not finite, where a ratio is NaN
        return torch.where(nothing_is_scaled, 1.0, self._root(after / before))

    def copy(self) -> "Statistics":
        """The same, whose tensors are of its own: for a policy that may write to them."""
        return Statistics(self._norm.clone(), self.units, self._slots, self._p, self._scale, self._signals)

    def _times(self, slots: Tensor, factors: Tensor) -> Tensor:
        return slots * (factors if self._p == inf else factors.pow(self._p))

    def _root(self, sums: Tensor) -> Tensor:
        norms = sums.clone() if self._p == inf else root(sums, self._p)
        assert isinstance(norms, Tensor)
        return norms
