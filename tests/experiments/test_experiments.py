"""examples/experiments shows what it says, with every policy; its figures stand in docs/howto/policy.md."""

import importlib
import json
from math import inf, isfinite, nan
from pathlib import Path

import pytest

import distclip
from distclip import MaxNorm

FOLDER = Path(__file__).parents[2] / "examples/experiments"
AROUND_OTHERS = {"Chain", "PerGroup", "Shadow"}


@pytest.fixture(autouse=True)
def found_by_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def policies():
    return importlib.import_module("catalogue").POLICIES


def test_temporal_order_is_learnt_with_norm_clipping_alone():
    order = importlib.import_module("temporal_order")
    assert min(order.run(None, seed, steps=150) for seed in (0, 1)) > 0.5
    assert max(order.run(MaxNorm(1.0), seed, steps=150) for seed in (0, 1)) < 0.01


def test_the_table_has_every_policy_of_the_catalogue():
    every = {name for name, each in vars(distclip.policies).items() if isinstance(each, type) and hasattr(each, "init")}
    shown = {type(policy).__name__ for policy in policies().values() if policy is not None}
    assert every - AROUND_OTHERS - {"Policy"} == shown - AROUND_OTHERS


@pytest.mark.parametrize("name", ["none", "AGC()", "AdaGC()", "Chain(SkipSpikes(), 1.0)"])
def test_each_experiment_runs(name):
    policy = policies()[name]
    assert 0 <= importlib.import_module("temporal_order").run(policy, 0, steps=3) <= 1
    assert isfinite(importlib.import_module("poisoned").run(policy, 0, factor=1.0, steps=3))


def test_digits_are_read():
    pytest.importorskip("sklearn")
    digits = importlib.import_module("digits")
    assert 0 < digits.run(MaxNorm(1.0), 0, epochs=1) < 1


def results():
    return {name: {"order": [0.0, 0.5], "digits": [0.5, 1.0], "clean": [2.0], "poisoned": [nan]} for name in policies()}


def test_a_row_says_how_many_seeds_were_solved():
    lines = importlib.import_module("table").table(results()).splitlines()
    assert len(lines) == 2 + len(policies())
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["none", "1/2", "0.750 (0.500)", "2.000", "nan"]


def test_json_has_null_for_what_is_not_finite():
    table = importlib.import_module("table")
    found = {"none": {"clean": [inf, nan, 2.0]}}
    assert json.loads(table.as_json(found, {"clean": [0, 1, 2]}, {}))["results"] == {
        "none": {"clean": [None, None, 2.0]}
    }


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    importlib.import_module("plot").draw(results(), tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def looks(*f1: float) -> list[dict]:
    """Records of a run with these scores after each step."""
    seen = [{f"held_out_{key}": each for key in ("loss", "accuracy", "f1", "auc")} for each in f1]
    return [{"step": k, "loss": "NaN", "norm": k, "coef": 0.5, "skip": False, **each} for k, each in enumerate(seen, 1)]


def test_a_row_of_the_classifier_has_the_median_and_the_worst_of_all_seeds():
    row = importlib.import_module("classifier").row
    assert row("x", [looks(0, 0.5), looks(0, 0.25), looks(0, 1.0)]) == (
        "| x | 0.5 (1) | 0.5 (0.25) | 0.5 (0.25) | 0.5 (0.25) | 100% | 0% | 2 |"
    )
    assert "| 1 (nan) |" in row("x", [looks(0.5), looks(nan), looks(1.0)])


def test_the_classifier_is_trained_and_drawn(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # which run() sets, and this takes back
    classifier = importlib.import_module("classifier")
    short = ("train.epochs=null", "train.steps=2", "data.max_rows=200", "data.length=10")
    records = classifier.run("both", 0, short)
    assert [record["step"] for record in records] == [1, 2]
    assert "held_out_f1" in records[-1]
    pytest.importorskip("matplotlib")
    runs = {name: [looks(0.5, 0.6)] for name in classifier.CLIPPED}
    importlib.import_module("classifier_plot").draw(runs, tmp_path / "classifier.png")
    assert (tmp_path / "classifier.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_the_experiments_is_short():
    assert max(file.read_text(encoding="utf-8").count("\n") for file in FOLDER.glob("*.py")) <= 150
