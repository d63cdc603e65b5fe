"""ZClip: what is wrong in its own code, and is not here."""

from math import inf, nan
from random import Random

import pytest

from distclip import ZClip
from policies import reference
from policies.streams import norms_of, run


def test_zclip_is_its_own_code_where_nothing_is_wrong():
    random = Random(4)
    norms = [random.uniform(0.8, 1.2) for _ in range(200)]
    norms[100] = 50.0
    found, _ = run(ZClip(max_norm=inf, eps=1e-6), norms)
    theirs = reference.zclip([(norm,) for norm in norms], max_norm=inf, fixed=False)
    assert [bound for bound, _, _ in found] == [pytest.approx(bound, rel=1e-5) for bound, _, _ in theirs]
    assert found[100][0] < 1.3


def test_zclip_is_not_poisoned_by_a_norm_of_nan():
    """Its own code: one NaN, and a norm of 1000 passed unclipped."""
    norms = norms_of(seed=100, steps=120, shift=500)
    norms[10] = norms[60] = nan
    assert run(ZClip(max_norm=inf), [*norms, 1000.0])[0][-1][0] < 1.3


def test_zclip_keeps_its_sight_after_a_spike_in_warmup():
    """Of norms 1, 1, 1e4, 1, 1 its own code had a mean of 2000.8 and a deviation of 3999.6."""
    _, state = run(ZClip(max_norm=inf, warmup_steps=5), [1.0, 1.0, 1e4, 1.0, 1.0])
    assert (state["mean"], state["std"]) == (1.0, 0.0)
    noise = norms_of(seed=100, steps=60, shift=500)
    spiked = [*noise[:12], 1e4, *noise[12:]]
    assert run(ZClip(max_norm=inf), [*spiked, 10.0])[0][-1][1] < 0.2


def test_zclip_bounds_its_warmup_by_max_norm():
    assert [coef for _, coef, _ in run(ZClip(2.0 / 4, max_norm=2.0), [4.0, 1.0, 8.0])[0]] == [0.5, 1.0, 0.25]


def test_zclip_takes_many_outliers_in_a_row_for_a_new_level():
    norms = norms_of(seed=100, steps=400, shift=200)
    answers, _ = run(ZClip(max_norm=inf), norms)
    cut = [coef < 0.99 for _, coef, _ in answers]
    assert cut[200:225] == [True] * 25
    assert sum(cut[225:]) <= 10
    theirs = reference.zclip([(norm,) for norm in norms], max_norm=inf, fixed=False)
    assert all(coef < 0.7 for _, coef, _ in theirs[200:]), "its own code does"
