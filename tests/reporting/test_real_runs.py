"""The advice on real training: a bound ten times too small and one ten times too large, by what a free run suggests."""

from pathlib import Path

import pytest

from distclip.reporting.advice import Advice, advice_on
from distclip.reporting.analysis import Analysis
from distclip.runs import open_runs
from support.ranks import run_ranks
from train.commands import TINY, train_here

STEPS = 120


def found(folder: Path, clip: list[str]) -> tuple[Analysis, dict[str, Advice]]:
    words = [*TINY, *clip, f"train.steps={STEPS}", "parallel.strategy=none", f"run.dir={folder}"]
    assert run_ranks(train_here, 1, "quickstart.yaml", words) == [0]
    (run,) = open_runs(folder)
    analysis = Analysis.of(run, lambda done: None)
    return analysis, {each.kind: each for each in advice_on(analysis)}


def test_a_bound_is_judged_by_the_run_that_it_clips(tmp_path: Path):
    free, advice = found(tmp_path / "free", ["clip.policy=none"])
    assert free.clipped == 0
    assert "normalises" not in advice
    right = free.suggested
    assert right == pytest.approx(free.quantiles[0.95], rel=0.5)

    tight, advice = found(tmp_path / "tight", [f"clip.max_norm={right / 10}"])
    assert tight.clipped == 1
    assert f"max_norm={tight.suggested:.3g}" in advice["normalises"].reason
    assert tight.suggested > 2 * right / 10

    loose, advice = found(tmp_path / "loose", [f"clip.max_norm={10 * free.largest}"])
    assert loose.clipped == 0
    assert loose.suggested == right  # nothing was clipped: it is the same run
    assert f"max_norm={right:.3g}" in advice["never"].reason

    fitting, advice = found(tmp_path / "fitting", [f"clip.max_norm={right}"])
    assert 0 < fitting.clipped < 0.3
    assert advice["suits"].weight == "good"
