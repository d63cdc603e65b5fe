"""Policies on one norm: their papers' numbers, step by step, for the model and for a vector of units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import inf, isfinite, nan

import pytest
import torch

from distclip import (
    AutoClip,
    Clipper,
    Cosine,
    MaxNorm,
    Normalize,
    PerParameter,
    Policy,
    QuantileTracker,
    SkipSpikes,
    Smooth,
    Units,
    Warmup,
    ZClip,
)
from distclip.policies.answer import Numbers, Tensors
from distclip.policies.trust import is_trusted
from policies import reference
from policies.reference import Answer, Row
from policies.streams import CPU, coef_of, norms_of, of_units, per_unit, read, run, statistics, units_of
from support.accelerator import DEVICE, EXISTS, no_waits, raw, use_accelerator
from support.ranks import run_ranks

SHORT = SkipSpikes(window=32, patience=8)


@dataclass(frozen=True)
class Case:
    policy: Policy
    reference: Callable[[Sequence[Row]], list[Answer]]
    scales: bool = True  # whether scaled norms have scaled answers


CASES = {
    "autoclip": Case(AutoClip(window=50), partial(reference.autoclip, percentile=10, window=50)),
    "autoclip of one": Case(AutoClip(50, window=1), partial(reference.autoclip, percentile=50, window=1)),
    "median": Case(QuantileTracker(), partial(reference.quantile_tracker, quantile=0.5, eta=0.2)),
    "tracker": Case(
        QuantileTracker(0.9, 0.05, max_norm=1.1),
        partial(reference.quantile_tracker, quantile=0.9, eta=0.05, max_norm=1.1),
        scales=False,
    ),
    "zclip": Case(ZClip(max_norm=inf), partial(reference.zclip, max_norm=inf)),
    "zclip and a bound": Case(ZClip(), reference.zclip, scales=False),
    "zclip of few": Case(
        ZClip(0.9, 3.0, inf, 1e-3, 4),
        partial(reference.zclip, alpha=0.9, z_thresh=3.0, max_norm=inf, eps=1e-3, warmup_steps=4),
    ),
    "skip": Case(SkipSpikes(), reference.skip_spikes),
    "skip of few": Case(SHORT, partial(reference.skip_spikes, window=32, patience=8)),
    "skip above 3": Case(
        SkipSpikes(3.0, 4.0, 16, 5),
        partial(reference.skip_spikes, max_norm=3.0, sigma=4.0, window=16, patience=5),
        scales=False,
    ),
    "skip above 2": Case(
        SkipSpikes(2.0, inf), partial(reference.skip_spikes, max_norm=2.0, window=10**9), scales=False
    ),
    "smooth": Case(Smooth(0.7), partial(reference.smooth, max_norm=0.7), scales=False),
    "normalize": Case(Normalize(3.0), partial(reference.normalize, target=3.0), scales=False),
    "warmup": Case(MaxNorm(Warmup(5.0, 0.5, 100)), reference.scheduled(reference.warmup(5.0, 0.5, 100)), scales=False),
    "cosine": Case(MaxNorm(Cosine(0.5, 5.0, 70)), reference.scheduled(reference.cosine(0.5, 5.0, 70)), scales=False),
    "function": Case(
        MaxNorm(lambda step: 0.5 + step % 3), reference.scheduled(lambda step: 0.5 + step % 3), scales=False
    ),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LEARNING = {name: case for name, case in CASES.items() if case.scales and case.policy.init(Units(), CPU)}


def near(found: Sequence[Answer], wanted: Sequence[Answer], norms: Sequence[float]) -> None:
    """The same answers; of a norm that is not finite any coefficient will do."""
    for step, (norm, ours, theirs) in enumerate(zip(norms, found, wanted, strict=True)):
        assert ours[2] == theirs[2], (step, norm)
        if isfinite(norm):
            assert ours[:2] == pytest.approx(theirs[:2], rel=1e-9), (step, norm)


@EACH
def test_it_is_its_paper_step_by_step(case):
    norms = norms_of()
    found, _ = run(case.policy, norms)
    near(found, case.reference([(norm,) for norm in norms]), norms)
    assert all(0 < coef < inf for (_, coef, _), norm in zip(found, norms, strict=True) if isfinite(norm))
    assert any(coef < 0.99 or skip for _, coef, skip in found), "nothing was clipped"


@EACH
def test_it_goes_on_from_a_saved_state(case):
    norms = norms_of()
    whole, end = run(case.policy, norms)
    for cut in (4, 98):
        first, state = run(case.policy, norms[:cut])
        rest, last = run(case.policy, norms[cut:], {name: value.clone() for name, value in state.items()})
        near([*first, *rest], whole, norms)
        assert all(torch.equal(last[name], value) for name, value in end.items())


def clipped(clipper: Clipper, model: torch.nn.Module, norms: Sequence[float]) -> list[tuple[float, bool]]:
    reports = []
    for norm in norms:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm / 8**0.5)
        reports.append(clipper.clip_().to_dict())
    return [(report["coef"], bool(report["skip"])) for report in reports]


@EACH
@pytest.mark.parametrize("wrap", [lambda policy: policy, PerParameter], ids=["model", "parameters"])
def test_a_clipper_is_resumed_from_a_checkpoint(case, wrap, clipper_of):
    norms, saved, model = norms_of()[:36], BytesIO(), torch.nn.Linear(3, 2)
    first, second = clipper_of(model, wrap(case.policy)), clipper_of(model, wrap(case.policy))
    clipped(first, model, norms[:18])
    torch.save(first.state_dict(), saved)
    second.load_state_dict(torch.load(BytesIO(saved.getvalue()), weights_only=True))
    assert str(clipped(second, model, norms[18:])) == str(clipped(first, model, norms[18:]))  # NaN included


@EACH
def test_norms_that_are_no_number_or_zero_change_no_state(case):
    """But for a schedule, which a step without gradients moves on."""
    good = norms_of()[50:90]
    _, before = run(case.policy, good)
    kept = {name: value.clone() for name, value in before.items()}
    _, after = run(case.policy, [nan, inf, nan] if "step" in before else [nan, 0.0, inf, 0.0, nan], before)
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    assert all(torch.equal(before[name], value) for name, value in kept.items()), "decide changed its argument"


@EACH
def test_a_vector_of_units_is_units_one_by_one(case):
    """A step that one of them skips, or in which one is not finite, leaves nothing in the state of the others."""
    policy, single = PerParameter(case.policy), case.policy
    state, apart = policy.init(units_of(3), CPU), [single.init(Units(), CPU) for _ in range(3)]
    for norms in zip(*(norms_of(seed)[:200] for seed in range(3)), strict=True):
        seen = of_units(norms)
        decision, state = policy.decide(seen, state)
        decided = [single.decide(statistics(norm), own) for norm, own in zip(norms, apart, strict=True)]
        wanted = [read(each, statistics(norm)) for (each, _), norm in zip(decided, norms, strict=True)]
        skipped = any(skip for _, _, skip in wanted)
        apart = [
            own if (skipped and not skip) or not all(map(isfinite, norms)) else after
            for own, (_, after), (_, _, skip) in zip(apart, decided, wanted, strict=True)
        ]
        assert bool(decision.skip) == skipped
        if isinstance(single, MaxNorm):  # whose steps are those of the model
            continue
        found = zip(per_unit(decision.max_norm), coef_of(decision, seen).tolist(), strict=True)
        for norm, ours, theirs in zip(norms, found, wanted, strict=True):
            assert not isfinite(norm) or ours == pytest.approx(theirs[:2], rel=1e-12)
        for unit, own in enumerate(apart):
            for name, value in own.items():
                torch.testing.assert_close(state[name][unit], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", LEARNING.values(), ids=LEARNING)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_scaled_norms_have_scaled_bounds_to_the_bit(case, factor):
    norms = norms_of()
    plain, _ = run(case.policy, norms)
    scaled, _ = run(case.policy, [norm * factor for norm in norms])
    for norm, (bound, coef, skip), (other, its_coef, its_skip) in zip(norms, plain, scaled, strict=True):
        assert not isfinite(norm) or (other, its_coef, its_skip) == (bound * factor, coef, skip)


@pytest.mark.parametrize("case", LEARNING.values(), ids=LEARNING)
@pytest.mark.parametrize("level", [2.0, 100.0])
def test_a_new_level_is_not_cut_for_good(case, level):
    """ZClip's own code cut all 2000 steps after norms had doubled, and so did a mean of norms that were not clipped."""
    norms = norms_of(seed=100, steps=1600, shift=200, level=level)
    answers, _ = run(case.policy, norms)
    cut = [skip or coef < 0.75 for _, coef, skip in answers]
    assert any(cut[200:240]) or isinstance(case.policy, AutoClip), "the shift was not noticed"
    assert sum(cut[1300:]) <= 0.2 * 300


@pytest.mark.parametrize("name", ["zclip", "skip", "skip of few", "median", "autoclip"])
def test_one_spike_neither_hides_the_next_nor_changes_what_is_ordinary(name):
    """OLMo-core let spikes of 10, 5 and 3 pass after one of 20."""
    noise = norms_of(seed=100, steps=200, shift=500)
    norms = [*noise, 20.0, *noise[:3], 10.0, *noise[:3], 5.0, *noise[:3], 3.0, *noise[:100]]
    answers, _ = run(CASES[name].policy, norms)
    for step in (200, 204, 208, 212):
        assert answers[step][2] or answers[step][1] < 1.3 / norms[step]
    assert sum(skip or coef < 0.8 for _, coef, skip in answers[213:]) <= 3


def test_the_cases_know_whose_answers_need_no_check():
    assert [name for name, case in CASES.items() if not is_trusted(case.policy)] == ["warmup", "cosine", "function"]


# ---- an accelerator ---------------------------------------------------------------------------------------------


def on_an_accelerator() -> list[tuple[str, int]]:
    """Where the accelerator answers otherwise than the host."""
    use_accelerator()
    norms, wrong = norms_of()[:24], []
    for name, case in CASES.items():
        if name in ("function", "zclip", "skip"):  # a Python number is read by itself; others are longer
            continue
        for policy in (case.policy, PerParameter(case.policy)):
            device = torch.device(DEVICE, 0)
            state, here = policy.init(units_of(2, DEVICE), device), policy.init(units_of(2), CPU)
            for step, norm in enumerate(norms):
                seen, known = of_units((norm, 1.0), DEVICE), of_units((norm, 1.0))
                with no_waits():
                    decision, state = policy.decide(seen, state)
                    answer = Tensors.of(decision, policy, seen, device)
                expected, here = policy.decide(known, here)
                numbers = Numbers.of(expected, policy, known)
                if not isfinite(norm):
                    continue
                for ours, theirs in ((answer.max_norm, numbers.max_norm), (answer.coef, numbers.coef)):
                    if theirs is None:
                        continue
                    found, on_host = (torch.as_tensor(each, dtype=torch.float64) for each in (raw(ours), theirs))
                    if not torch.equal(found, on_host.expand_as(found)):  # one number may be that of all units
                        wrong.append((name, step))
                if (answer.skip is not None and raw(answer.skip).item()) != numbers.skip:
                    wrong.append((name, step))
            wrong += [(f"{name}.{key}", -1) for key in here if not torch.equal(raw(state[key]), here[key])]
    return wrong


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_an_accelerator_decides_as_the_host_does_without_a_wait():
    assert run_ranks(on_an_accelerator, 1, fresh=True) == [[]]


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Smooth(inf), "max_norm must be finite"),
        (lambda: Smooth(0), "max_norm must be above 0"),
        (lambda: Normalize(nan), "norm must be above 0"),
        (lambda: Normalize(inf), "norm must be finite"),
        (lambda: QuantileTracker(1), "quantile must be above 0 and below 1, got 1"),
        (lambda: QuantileTracker(nan), "quantile must be above 0 and below 1"),
        (lambda: QuantileTracker(eta=0), "eta must be above 0"),
        (lambda: QuantileTracker(max_norm=-1), "max_norm must be above 0"),
        (lambda: ZClip(alpha=1.0), "alpha must be above 0 and below 1"),
        (lambda: ZClip(z_thresh=inf), "z_thresh must be finite"),
        (lambda: ZClip(max_norm=0), "max_norm must be above 0"),
        (lambda: ZClip(eps=0), "eps must be above 0"),
        (lambda: ZClip(warmup_steps=0), "warmup_steps must be a whole number of at least 1"),
        (lambda: SkipSpikes(0), "max_norm must be above 0"),
        (lambda: SkipSpikes(sigma=nan), "sigma must be above 0"),
        (lambda: SkipSpikes(window=1), "window must be a whole number of at least 2"),
        (lambda: SkipSpikes(patience=1), "patience must be a whole number of at least 2"),
        (lambda: SkipSpikes(window=8), "patience must be at most window, 8, got 16"),
        (lambda: SkipSpikes(on=()), "on must be different names"),
        (lambda: SkipSpikes(on=("norm", "norm")), "on must be different names"),
        (lambda: SkipSpikes(on=(1,)), "on must be different names"),
        (lambda: Warmup(0.0, 1.0, 10), "start must be above 0"),
        (lambda: Warmup(1.0, inf, 10), "end must be finite"),
        (lambda: Cosine(1.0, 2.0, 0), "steps must be a whole number of at least 1"),
    ],
)
def test_settings_that_are_wrong_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
