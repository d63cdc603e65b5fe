"""States with an entry for each parameter or row: saved with the names of these units, and loaded by them.

So a state means the same on any number of ranks, whatever order the units are in there. Models and groups have one
order everywhere.
"""

from collections.abc import Mapping
from itertools import accumulate
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from .checks import count
from .protocol import Policy, State
from .statistic import Statistic
from .units import RowNames, Units

KEPT = ("parameter", "row")  # the levels whose units are saved by name


def labelled(policy: Policy, units: Units) -> dict[str, Any]:
    """What a Clipper's state says of the units that ``policy`` needs: ``{"units": ...}``, or nothing.

    * ``"parameter"``: names of parameters. ``"row"``, ``"rows"``: of those that the rows are of, and how many each has.
    """
    needed, found = _levels(policy), dict[str, Any]()
    if "parameter" in needed:
        found["parameter"] = list(units.names("parameter"))
    if "row" in needed:
        rows = units.names(needed["row"])
        assert isinstance(rows, RowNames)
        found |= {"row": list(rows.parameters), "rows": list(rows.counts)}
    return {"units": found} if found else {}


def orders_of(given: Any, own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where units of ``own`` are in a state that says ``given`` of them: int64, by level.

    ValueError for other parameters, or other numbers of rows.
    """
    if not isinstance(given, dict) or set(given) != set(own):
        raise ValueError(f"the units of a state are a dictionary of {', '.join(sorted(own))}, got {short(given)}")
    return {level: _order(_counts(given, level), _counts(own, level)) for level in KEPT if level in own}


def in_order(policy: Policy, units: Units, state: State, orders: Mapping[str, Tensor]) -> State:
    """``state`` with the entries of each unit where it is here.

    Dimensions of units are those that are longer where ``policy`` makes a state for one unit more.
    """
    for level, order in orders.items():
        longer = policy.init(units.with_one_more(level), order.device)
        state = {name: _moved(value, longer[name], order) for name, value in state.items()}
    return state


def _levels(policy: Policy) -> dict[str, Statistic]:
    return {each.per: each for each in policy.needs() if isinstance(each, Statistic)}


def _moved(value: Tensor, longer: Tensor, order: Tensor) -> Tensor:
    for dim, (size, other) in enumerate(zip(value.shape, longer.shape, strict=True)):
        if other == size + 1:
            value = value.index_select(dim, order.to(value.device))
    return value


def _counts(said: Mapping[str, Any], level: str) -> dict[str, int]:
    """How many entries each parameter has; ValueError for what is no list of names, and of as many whole numbers."""
    names, counts = said[level], said["rows"] if level == "row" else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError(f"state units {level} must be a list of different names, got {short(names)}")
    if counts is None:
        return dict.fromkeys(names, 1)
    if not isinstance(counts, list) or len(counts) != len(names):
        raise ValueError(f"state units rows must be a list of {len(names)} numbers, got {short(counts)}")
    return {name: count(f"state units rows of {name}", number) for name, number in zip(names, counts, strict=True)}


def _order(given: dict[str, int], own: dict[str, int]) -> Tensor:
    if given.keys() != own.keys():
        raise ValueError(
            f"this state is of other parameters than this Clipper's: it lacks {_some(own, given)}, and has "
            f"{_some(given, own)} that this one does not know: load it into a Clipper of the model it was saved from"
        )
    for name, number in own.items():
        if given[name] != number:
            raise ValueError(f"this state has {given[name]} rows of {name}, not {number}: load it into the same model")
    starts = dict(zip(given, accumulate(given.values(), initial=0), strict=False))
    shifts = [starts[name] - start for name, start in zip(own, accumulate(own.values(), initial=0), strict=False)]
    lengths = torch.tensor(list(own.values()), dtype=torch.int64)
    return torch.tensor(shifts, dtype=torch.int64).repeat_interleave(lengths) + torch.arange(sum(own.values()))


def _some(names: Mapping[str, int], without: Mapping[str, int]) -> str:
    found = [name for name in names if name not in without]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{', '.join(found[:3])}{more}" if found else "none"
