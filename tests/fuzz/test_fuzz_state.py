"""Any state: a Clipper takes it over and clips on, or raises ValueError and is as it was."""

from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import distclip
from fuzz.documents import values
from fuzz.promise import fuzz
from support.ranks import same_bits

POLICIES = [
    distclip.MaxNorm(1.0),
    distclip.ValueClip(0.5),
    distclip.AutoClip(10, window=4),
    distclip.AutoClip(100, 1, 2.0),
    distclip.MaxNorm(distclip.Warmup(1.0, 2.0, 3)),
    distclip.QuantileTracker(),
    distclip.ZClip(warmup_steps=4),
    distclip.SkipSpikes(window=4, patience=4),
]
COUNTS = [0, 1, 7, -1, 2**31, 2**61, 2**62, 2**63, 10**400, True, 1.5, nan, inf, "1", None, torch.tensor(3), [1]]
NUMBERS = [0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 1e308, -1e308, 5e-324]


def made(policy: distclip.Policy) -> tuple[torch.nn.Module, distclip.Clipper]:
    model = torch.nn.Linear(2, 1)
    return model, distclip.Clipper(model, policy)


def tensors(own: torch.Tensor) -> st.SearchStrategy[Any]:
    """A tensor as the state has it, with any numbers in it, or one of another kind, or none."""
    numbers: st.SearchStrategy[Any] = st.sampled_from([0, 1, 4, -1, -(2**63), 2**63 - 1])
    if own.is_floating_point():
        numbers = st.one_of(st.sampled_from(NUMBERS), st.floats(width=64))
    right = st.lists(numbers, min_size=own.numel(), max_size=own.numel()).map(
        lambda found: torch.tensor(found, dtype=own.dtype).reshape(own.shape)
    )
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float16])
    shapes = st.lists(st.integers(0, 4), max_size=3)
    others = st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), shapes, dtypes)
    ways = [
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: t.double().requires_grad_(),
        lambda t: t.tolist(),
    ]
    odd = st.builds(lambda way, t: way(t), st.sampled_from(ways), st.just(torch.ones_like(own)))
    return st.one_of(right, right, right, others, odd, values)


@st.composite
def states(draw: st.DrawFn, own: dict[str, Any]) -> Any:
    """A Clipper's state after some changes, or anything at all."""
    if draw(st.integers(0, 20)) == 0:
        return draw(values)
    policy: Any = {name: draw(tensors(value)) for name, value in own["policy"].items()}
    if draw(st.integers(0, 9)) == 0:
        policy = draw(st.one_of(values, st.just(policy | {"other": torch.ones(1)}), st.just({})))
    counts = st.one_of(st.integers(0, 9), st.sampled_from(COUNTS))
    state = {"policy": policy, "steps": draw(counts), "consecutive_skips": draw(counts)}
    if draw(st.integers(0, 9)) == 0:
        state.pop(draw(st.sampled_from(sorted(state))))
    if draw(st.integers(0, 9)) == 0:
        state[draw(st.one_of(st.text(max_size=3), st.integers(), st.none()))] = 1
    return state


@fuzz(150)
@given(data=st.data())
def test_any_state(data):
    policy = data.draw(st.sampled_from(POLICIES))
    model, clipper = made(policy)
    before = clipper.state_dict()
    state = data.draw(states(before))
    try:
        clipper.load_state_dict(state)
    except ValueError:
        assert same_bits([before, clipper.state_dict()])
        return
    assert same_bits([clipper.state_dict()["policy"], {name: v.detach() for name, v in state["policy"].items()}])
    for _ in range(6):
        model.zero_grad()
        (model(torch.ones(1, 2)) * 3).sum().backward()
        report = clipper.clip_()
        assert 0 <= report.coef <= 1
        assert report.norm == pytest.approx(3 * 3**0.5)
        assert all(p.grad.isfinite().all() for p in model.parameters())
