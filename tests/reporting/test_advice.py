"""The advice on runs whose right answer is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distclip.reporting import replay as replaying
from distclip.reporting.advice import Advice, advice_on
from distclip.reporting.analysis import Analysis
from distclip.reporting.comparison import advice_on_all
from distclip.reporting.replay import POLICIES, replay
from distclip.runs import Layers, Run

STEPS = 2000


@pytest.fixture(autouse=True)
def one_policy(monkeypatch):
    """Five take two seconds a run."""
    monkeypatch.setattr(replaying, "POLICIES", {name: POLICIES[name] for name in ["AutoClip(percentile=90)"]})


def run_of(norm, bound=1.0, layers=None, culprits=None) -> Run:
    norm = np.asarray(norm, float)
    finite = np.isfinite(norm)
    columns = dict(layers or {})
    matrix = np.stack(list(columns.values()), 1).astype(np.float32) if columns else np.zeros((0, 0), np.float32)
    return Run(
        name="run",
        path=Path("run"),
        program="distclip train",
        step=np.arange(1, len(norm) + 1),
        norm=norm,
        max_norm=np.full(len(norm), float(bound)),
        coef=np.where(finite, np.minimum(1.0, bound / norm), np.nan),
        skip=~finite,
        loss=np.linspace(3, 2, len(norm)),
        layers=Layers(tuple(columns), np.arange(len(norm) if columns else 0), matrix),
        culprits=culprits or {},
    )


def noise(seed=0, steps=STEPS):
    """Norms about 1, half of them between 0.87 and 1.14, larger in the first hundred steps."""
    ordinary = np.exp(np.random.default_rng(seed).normal(0, 0.2, steps))
    return ordinary * (1 + 5 * np.exp(-np.arange(steps) / 40))


def advice(run: Run) -> dict[str, Advice]:
    return {each.kind: each for each in advice_on(Analysis.of(run, lambda done: None))}


def suggested(run: Run) -> float:
    return Analysis.of(run, lambda done: None).suggested


def test_a_run_that_was_only_measured_is_told_a_bound():
    found = advice(run_of(noise(), bound=np.inf))["suggested"]
    assert found.title == "A bound to begin with: max_norm=1.4"
    assert found.reason.endswith(" Nothing bounded the norm of this run.")


@pytest.mark.parametrize("bound", [0.03, 0.1, 1.0, 10.0, 300.0])
def test_the_suggestion_is_of_the_run_and_not_of_its_bound(bound):
    """0.95 of ordinary norms lie below exp(1.645 * 0.2) = 1.39."""
    assert suggested(run_of(noise(), bound)) == 1.4


def test_a_bound_ten_times_too_small_normalises():
    found = advice(run_of(noise(), 0.14))
    assert found["normalises"].title == "100 % of the steps are clipped: this normalises"
    assert "max_norm=1.4" in found["normalises"].reason
    assert "suits" not in found
    assert "never" not in found


def test_a_bound_ten_times_too_large_never_acts():
    norms = noise()[200:]
    found = advice(run_of(norms, 14.0))
    assert found["never"].title == "The bound of 14 never acts"
    assert f"The largest norm of 1,800 steps is {norms.max():.3g}" in found["never"].reason
    assert "max_norm=1.4" in found["never"].reason
    assert "suits" not in found


def test_a_good_bound_is_called_one():
    found = advice(run_of(noise(), 1.4))
    assert found["suits"].weight == "good"
    assert found.keys() & {"normalises", "never", "often", "shift", "layer", "spikes"} == set()


def test_a_bound_that_moves_is_told_and_whether_it_normalises():
    norms, moving = noise(), np.linspace(1.2, 1.6, STEPS)
    found = advice(replace(run_of(norms), max_norm=moving, coef=np.minimum(1, moving / norms)))
    assert found["moves"].weight == "good"
    assert found["moves"].title.startswith("The bound moves between 1.2 and 1.6, and clips ")
    low = moving / 10
    found = advice(replace(run_of(norms), max_norm=low, coef=np.minimum(1, low / norms)))
    assert found["moves"].weight == "warning"
    assert "this normalises" in found["moves"].reason


def test_one_layer_that_explodes_is_named():
    usual, layers = noise(), {}
    for k in range(10):
        layers[f"blocks.{k}"] = usual / 10**0.5
    at = [300, 700, 701, 1500]
    layers["blocks.6"] = layers["blocks.6"].copy()
    layers["blocks.6"][at] *= 40
    norm = np.sqrt(sum(each**2 for each in layers.values()))
    found = advice(run_of(norm, 1.4, layers))
    assert found["layer"].title.startswith("blocks.6 makes 99.")
    assert "10 %" in found["layer"].reason
    assert found["spikes"].title == "3 spikes in 2,000 steps"
    assert found["suits"]


def test_a_group_of_all_parameters_explodes_with_each_and_is_not_named():
    usual = noise()
    usual[[300, 900]] *= 30
    found = advice(run_of(usual, 1.4, {"*": usual, "blocks.*": usual / 2}))
    assert "layer" not in found


def test_a_shift_of_the_level_is_found_and_the_suggestion_is_of_what_is_after():
    norms = noise()
    norms[1200:] *= 6
    found = advice(run_of(norms, 1.4))
    assert "rises from" in found["shift"].title
    step = int(found["shift"].title.rpartition(" ")[2].replace(",", ""))
    assert abs(step - 1200) <= 50
    assert suggested(run_of(norms, 1.4)) == pytest.approx(1.4 * 6, rel=0.05)
    assert found["normalises"].title.startswith("100 % of the steps since step 1,2")
    assert "spikes" not in found


def test_norms_that_fall_slowly_are_no_shift_but_a_bound_that_acts_less_and_less():
    found = advice(run_of(noise() * np.geomspace(20, 1, STEPS), 4))
    assert "shift" not in found
    assert found["drift"].title.startswith("The bound of 4 acts on 9")
    assert "drift" not in advice(run_of(noise(), 1.0))


def test_one_spike_blames_no_layer():
    usual = noise()
    layers = {"a": usual.copy(), "b": usual.copy()}
    layers["a"][500] *= 30
    found = advice(run_of(np.sqrt(layers["a"] ** 2 + layers["b"] ** 2), 2.0, layers))
    assert found["spikes"].title == "1 spike in 2,000 steps"
    assert "layer" not in found


def test_a_nan_is_named_with_its_step():
    norms = noise()
    norms[[511, 900]] = np.nan
    found = advice(run_of(norms, 1.4, culprits={512: "head.weight on rank 1 has NaN in its gradient"}))
    assert found["nonfinite"].title == "The norm is not finite in 2 steps, first in step 512"
    assert found["nonfinite"].reason == "Step 512: head.weight on rank 1 has NaN in its gradient."


def test_norms_that_stay_nan_are_a_run_that_is_lost():
    norms = noise()
    norms[1000:] = np.nan
    assert "go back to a checkpoint" in advice(run_of(norms))["nonfinite"].reason


def test_norms_measured_after_clipping_are_known():
    run = run_of(np.minimum(noise(), 1.0), 1.0)
    assert "after-clipping" in advice(run)
    assert "after-clipping" not in advice(run_of(noise(), 1.0))


def together(*runs: Run) -> list[Advice]:
    return advice_on_all([Analysis.of(run, lambda done: None) for run in runs])


def test_the_norm_of_one_shard_is_known_by_its_factor():
    norms = noise()
    ddp, fsdp = replace(run_of(norms), name="ddp"), replace(run_of(norms / 2 * noise(seed=1) ** 0.01), name="fsdp")
    for pair in ((ddp, fsdp), (fsdp, ddp)):
        (found,) = together(*pair)
        assert found.title == "The norms of ddp are 2 times those of fsdp, in every step"
        assert "It is the square root of 4" in found.reason
    assert not together(ddp, replace(run_of(norms), name="again"))
    assert not together(ddp, replace(run_of(2 * noise(seed=1)), name="another"))
    assert not together(ddp)


def test_a_replay_is_the_policy():
    """AutoClip at the 90th percentile clips about a tenth of norms that have no trend."""
    norms = noise(seed=3)[500:]
    found = replay("AutoClip(percentile=90)", POLICIES["AutoClip(percentile=90)"], norms)
    assert 0.08 < found.clipped < 0.12
    assert found.bound == pytest.approx(np.exp(1.2816 * 0.2), rel=0.03)
    assert advice(run_of(noise()))["autoclip"].title.endswith("%")
