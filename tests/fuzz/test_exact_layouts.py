"""Few of the layouts of exact_layouts.py, and that it would see a bit that is wrong."""

from fractions import Fraction
from math import inf, nan, nextafter

import pytest
import torch

from fuzz import exact_layouts
from fuzz.exact_layouts import BEYOND, gradients, is_nearest, look_at


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "dtype"), [("1e-45 to 3e38", "mixed"), ("half -0.0", "complex64"), ("one NaN", "fp32")]
)
def test_random_layouts_have_one_exact_norm_and_coefficient(kind, dtype):
    row = look_at(kind, dtype, layouts=10, seed=1)
    assert row.norms > 30
    assert (row.distinct, row.right) == (1, True)


@pytest.mark.filterwarnings("ignore")
def test_a_norm_of_another_bit_in_one_layout_is_seen(monkeypatch):
    one = exact_layouts.simulated

    def other(case, wholes, bounds):
        found = one(case, wholes, bounds)
        if case.size > 1:
            found[-1] = {p: (nextafter(norm, inf), coef) for p, (norm, coef) in found[-1].items()}
        return found

    monkeypatch.setattr(exact_layouts, "simulated", other)
    monkeypatch.setattr(exact_layouts, "run_ranks", lambda *_: [])
    assert look_at("ordinary", "fp32", layouts=4, seed=1).distinct > 1


@pytest.mark.parametrize("p", [1.0, 2.0, inf])
@pytest.mark.parametrize("kind", [kind for kind in BEYOND if not kind.startswith(("one", "all"))])
def test_only_the_nearest_number_is_taken_for_the_norm(kind, p):
    wholes = gradients(kind, "fp32", 0)
    numbers = [Fraction(abs(x)) for whole in wholes for x in whole.double().flatten().tolist()]
    norm = float(max(numbers) if p == inf else sum(n ** int(p) for n in numbers))
    norm = norm**0.5 if p == 2 else norm
    near = [x for x in (nextafter(norm, 0.0), norm, nextafter(norm, inf)) if is_nearest(x, wholes, p)]
    assert len(near) == 1
    assert not any(is_nearest(x, wholes, p) for x in (0.0, inf, nan, 2 * norm))


def test_half_way_the_even_number_is_the_nearest():
    wholes = [torch.tensor([2.0**53, 1.0], dtype=torch.float64)]
    assert is_nearest(2.0**53, wholes, 1.0)
    assert not is_nearest(2.0**53 + 2, wholes, 1.0)
