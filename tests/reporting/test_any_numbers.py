"""Whatever numbers a run has logged, there is a report, in JSON that every browser reads, and it holds what it says."""

import json
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from distclip.reporting.advice import advice_on
from distclip.reporting.analysis import Analysis, longest
from distclip.reporting.document import document_of, heat_map
from distclip.reporting.thin import thinned
from distclip.reporting.words import percent, short
from distclip.runs import Layers, Run

ORDINARY = st.floats(1e-3, 1e3)
ANY = st.one_of(ORDINARY, st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, nan, inf, -1.0, 1e300]))


def run_of(norm: list[float], bound: float, skip: list[bool], layers: bool = True) -> Run:
    norms = np.array(norm, np.float64)
    with np.errstate(all="ignore"):
        coef = np.minimum(1.0, bound / norms)
        parts = np.stack([norms / 2, norms / 3], 1).astype(np.float32) if layers else np.zeros((0, 0), np.float32)
    return Run(
        name="run",
        path=Path("run"),
        program="JSON lines",
        step=np.arange(len(norms)) * 10,
        norm=norms,
        max_norm=np.full(len(norms), bound),
        coef=coef,
        skip=np.resize(np.array(skip, np.bool_), len(norms)),
        loss=norms[::-1].copy(),
        layers=Layers(("a", "b"), np.arange(len(norms)), parts) if layers else Layers(),
    )


def numbers_in(value: object):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, float):
        yield value


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.lists(ANY, min_size=1, max_size=40), st.lists(ORDINARY, min_size=30, max_size=49)),
    st.sampled_from([nan, 1e-9, 1.0, 1e30]),
    st.lists(st.booleans(), min_size=1, max_size=3),
    st.booleans(),
)
def test_there_is_a_report_of_any_numbers(norm, bound, skip, layers):
    with np.errstate(all="raise", under="ignore"):
        found = Analysis.of(run_of(norm, bound, skip, layers), lambda done: None)
        document = document_of([found], "0")
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert all(np.isfinite(list(numbers_in(document))))
    assert all(each.title and each.reason for each in advice_on(found))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_the_extremes_the_first_and_the_last(values, most):
    numbers = np.array(values)
    places = thinned(numbers, most)
    assert (np.diff(places) > 0).all()
    assert len(places) <= max(most, 4) + 2
    assert {0, len(values) - 1} <= {*places.tolist()}
    assert numbers[places].max() == numbers.max()
    assert numbers[places].min() == numbers.min()


@given(st.lists(st.booleans(), min_size=1))
def test_the_longest_row_of_skips(flags):
    assert longest(np.array(flags)) == max(map(len, "".join("x" if flag else " " for flag in flags).split()), default=0)


def test_a_heat_map_of_many_layers_stays_small_and_keeps_the_largest():
    steps, names = 3000, 400
    norms = np.ones((steps, names), np.float32)
    norms[1234, 77] = 1e4
    layers = Layers(tuple(f"layer {k}" for k in range(names)), np.arange(steps), norms)
    run = run_of([1.0] * steps, 1.0, [False], layers=False)
    drawn = heat_map(Run(**{field: getattr(run, field) for field in Run.__slots__} | {"layers": layers}), 20_000)
    assert "layer 77" in drawn["names"]
    assert len(drawn["names"]) == 150
    assert len(drawn["z"]["base64"]) < 60_000


SHARES = {0: "0 %", 1: "100 %", 0.5: "50 %", 0.05: "5.0 %", 0.004: "0.4 %", 1e-5: "0.001 %", 1e-9: "< 0.001 %"}
LARGE = {0.97: "97 %", 0.997: "99.7 %", 0.99917: "99.9 %", 0.9995: "99.950 %", 1 - 1e-9: "> 99.999 %"}
NUMBERS = {0.012345: "0.0123", 48213: "48,200", 3e38: "3e+38", nan: "NaN", -inf: "-inf", 1: "1"}


@pytest.mark.parametrize(("share", "said"), (SHARES | LARGE).items())
def test_a_share_is_told_from_none_and_from_all(share, said):
    assert percent(share) == said


@pytest.mark.parametrize(("number", "said"), NUMBERS.items())
def test_a_number_has_three_digits(number, said):
    assert short(number) == said
