"""Every error about what a policy returned: the policy, the field and the unit, and what to return instead."""

from reprlib import repr as short
from typing import Any

from torch import Tensor

from .checks import is_dense
from .protocol import Policy, State
from .statistic import Per, Statistic, asked
from .trust import name_of
from .units import Units

RULES = {
    "max_norm": "a number above 0, or inf for no bound",
    "coef": "a finite number above 0",
    "bounds": "two numbers, low <= 0 <= high, not both 0",
    "skip": "a bool, a 0-d tensor or None",
    "per": "'model', or a statistic of gradients that needs() lists, whose groups do not overlap",
    "extra": "numbers by names of their own, other than norm, max_norm, coef and skip",
}
FIELDS = tuple(RULES)
_BASE = 4  # above the fields that a device checks, which count from 1


def fault_code(field: str, per: Statistic, units: Units) -> tuple[int, int]:
    """``(a, b)``: ``a + b * unit`` is the number that tells :func:`refusal_of` of a field that is bad for a unit."""
    known = units.levels
    return FIELDS.index(field) + 1 + _BASE * (1 + known.index(per)), _BASE * len(known)


def refusal_of(fault: float, policy: Policy, units: Units) -> ValueError:
    """The error for what :meth:`.answer.Tensors.fault` found."""
    place, field = divmod(int(fault), _BASE)
    if not place:
        return refusal(FIELDS[field - 1], policy)
    unit, level = divmod(place - 1, len(units.levels))
    return refusal(FIELDS[field - 1], policy, where=units.where(unit, units.levels[level]))


def refusal(
    field: str, policy: Policy, *value: Any, where: str = "", shape: tuple[int, ...] = (), because: str = ""
) -> ValueError:
    """The error for a ``field`` of a decision, with its value if it is known.

    ``where``: of which unit. ``shape``: which a tensor may have instead. ``because``: what is wrong with it.
    """
    what = f"{field} = {shown(*value)}{where}" if value else f"a {field}{where} that no step can use"
    rule = f"{RULES[field]}, or a tensor of shape {shape}" if shape else RULES[field]
    if not shape and field in ("max_norm", "coef") and isinstance(next(iter(value), None), Tensor):
        rule += ", or say by per= for which units these are"
    return ValueError(f"{name_of(policy)}.decide returned {what}{because}, and no step was made: return {rule}")


def no_decision(policy: Policy, answer: Any) -> ValueError:
    got = [type(part).__name__ for part in answer] if isinstance(answer, (tuple, list)) else type(answer).__name__
    return ValueError(f"{name_of(policy)}.decide returned {got}, and no step was made: return a Decision and the state")


def other_keys(policy: Policy, after: Any, state: State) -> ValueError:
    got = f"the keys {sorted(map(str, after))}" if isinstance(after, dict) else f"a {type(after).__name__} for it"
    return ValueError(
        f"{name_of(policy)}.decide returned a state with {got}, and no step was made: return those of init, "
        f"{sorted(state)}"
    )


def other_state(policy: Policy, name: str, value: Any, own: Tensor) -> ValueError:
    return ValueError(
        f"{name_of(policy)}.decide returned state {name} as {shown(value)}, and no step was made: return it as init "
        f"made it, {shown(own)}"
    )


# ---- policies inside others ---------------------------------------------------------------------------------


def finer_inside(policy: Policy, wrapper: str, asks: Statistic) -> ValueError:
    return ValueError(
        f"{wrapper} gives a policy another norm in place of the model's, and {name_of(policy)} asks for norms of its "
        f"own (of {asks.of}s per {asks.per}): use it as it is, or in a Chain"
    )


def clamps_inside(policy: Policy, wrapper: str) -> ValueError:
    return ValueError(
        f"{wrapper} takes policies that decide on a norm, and {name_of(policy)} clamps elements: put it last in a Chain"
    )


def clamps_before(policy: Policy) -> ValueError:
    return ValueError(f"{name_of(policy)} clamps elements, after which no norm is known: put it last in the Chain")


def clamps_in_shadow(policy: Policy) -> ValueError:
    return ValueError(
        f"Shadow reports coefficients, and {name_of(policy)}, which is not to act, clamps elements: leave it out"
    )


def no_groups(groups: object) -> ValueError:
    return ValueError(
        "PerGroup takes patterns and a policy for each group, {'name': ('*.weight', 1.0)}, with None for a policy that "
        f"leaves it alone, got {short(groups)}"
    )


def by_unit_inside(policy: Policy, wrapper: str, per: Statistic | Per) -> ValueError:
    return ValueError(
        f"{name_of(policy)}.decide returned per = {asked(per).per!r} inside {wrapper}, and no step was made: decide on "
        "the norm that it is given, per='model'"
    )


# ---- both ---------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return short(value)
    kind = "a dense tensor" if is_dense(value) else f"a {type(value).__name__} that is not dense"
    return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"  # its numbers may have to be waited for
