"""A sample of many cases for every run; the others are marked ``thorough``."""

from collections.abc import Iterable
from itertools import chain, product
from typing import Any

import pytest


def rare(*values: Any, id: str | None = None) -> Any:
    """A case that not every run takes."""
    return pytest.param(*values, id=id, marks=pytest.mark.thorough)


def sample(cases: Iterable[Any], *ids: str) -> list[Any]:
    """All of these ``pytest.param``, of which every run takes those with these ids."""
    cases = list(cases)
    assert {case.id for case in cases} >= set(ids), "a sample of cases that are not there"
    return [case if case.id in ids else rare(*case.values, id=case.id) for case in cases]


def most(cases: Iterable[Any], *but: str) -> list[Any]:
    """All of these ``pytest.param``, of which every run takes all but those with these ids."""
    cases = list(cases)
    assert {case.id for case in cases} >= set(but), "cases that are not there"
    return sample(cases, *(case.id for case in cases if case.id not in but))


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """The product of axes, of which every run takes so many cases that each value of each axis is in one.

    The first value of each, the second of each, and so on, where shorter axes begin anew. A tuple is several arguments.
    """
    listed = [[value if isinstance(value, tuple) else (value,) for value in axis] for axis in axes]
    kept = {tuple(k % len(axis) for axis in listed) for k in range(max(map(len, listed)))}
    cases = []
    for places in product(*(range(len(axis)) for axis in listed)):
        values = chain(*(axis[k] for axis, k in zip(listed, places, strict=True)))
        cases.append(pytest.param(*values) if places in kept else rare(*values))
    return cases
