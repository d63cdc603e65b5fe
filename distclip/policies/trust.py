"""Policies that are known here: which keep the rules of decisions by construction, and which are inside which."""

from collections.abc import Mapping
from typing import TypeVar

from .protocol import Policy

K = TypeVar("K", bound=type)
_KINDS: set[type] = set()  # exact classes: a subclass may decide otherwise


def trusted(kind: K) -> K:
    """Mark a class whose answers keep the rules of :class:`Decision`, as long as those of the policies inside do."""
    _KINDS.add(kind)
    return kind


def inner_of(policy: Policy) -> Mapping[str, Policy]:
    """The policies inside one that is known here, by the names of their parts of its state; empty for others."""
    return getattr(policy, "inner", {}) if type(policy) in _KINDS else {}


def is_trusted(policy: Policy) -> bool:
    """Whether no device needs to check its numbers, and it writes to nothing that it is shown."""
    schedule = callable(getattr(policy, "max_norm", None))  # which may say anything
    return type(policy) in _KINDS and not schedule and all(map(is_trusted, inner_of(policy).values()))


def name_of(policy: Policy) -> str:
    """As errors call it: ``Chain(AdaGC, MaxNorm)``."""
    inside = ", ".join(map(name_of, inner_of(policy).values()))
    return f"{type(policy).__qualname__}({inside})" if inside else type(policy).__qualname__
