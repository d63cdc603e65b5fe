"""metrics.jsonl is JSON whatever the numbers are, and holds every step once; the line of a step says what it can."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from distclip.train.metrics import MetricsFile, read_until, to_json
from distclip.train.progress import Display, Tally
from distclip.train.trainer import Trainer


def test_numbers_that_json_does_not_know_are_strings_that_float_reads():
    line = to_json({"a": math.inf, "b": -math.inf, "c": math.nan, "d": 0.5, "e": False, "f": 3})
    read = json.loads(line, parse_constant=lambda name: f"not JSON: {name}")
    assert read == {"a": "Infinity", "b": "-Infinity", "c": "NaN", "d": 0.5, "e": False, "f": 3}
    assert [float(read[name]) for name in "ab"] == [math.inf, -math.inf]
    assert math.isnan(float(read["c"]))


def test_going_on_drops_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "coef": 1.0, "skip": False}) for step in range(1, 8)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "co')
    with MetricsFile(path, read_until(path, 5)) as file:
        file.write({"step": 6, "coef": 0.5, "skip": False})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    tally = Tally(read_until(path, 6))
    assert (tally.steps, tally.clipped, tally.share(tally.clipped)) == (6, 1, 1 / 6)


def test_of_steps_in_a_row_without_a_finite_norm_the_first_is_blamed_in_a_line():
    shown = io.StringIO()
    display = Display(Console(file=shown), start=0, steps=9, unit="characters", log_every=100)
    for step, key in enumerate([None, "culprit", "culprit", None, "culprit_before", "culprit_before"], 1):
        display.blame({"step": step} | ({} if key is None else {key: f"parameter {step}"}))
    assert shown.getvalue().splitlines() == ["step 2: parameter 2", "step 4: parameter 5"]


def test_on_an_accelerator_the_culprit_is_in_the_record_of_the_next_step():
    """The meta device stands for one: nothing of it can be read."""
    late = SimpleNamespace(source=None, held=SimpleNamespace(clipper=SimpleNamespace(culprit="head.weight on rank 1")))
    report = SimpleNamespace(culprit=None, norm=torch.empty((), device="meta"))
    assert Trainer.blamed(late, report, finite=True) == {"culprit_before": "head.weight on rank 1"}
    late.held.clipper.culprit = None
    assert Trainer.blamed(late, report, finite=False) == {}
    late.source = SimpleNamespace(culprit=lambda: "head.weight on rank 0")
    assert Trainer.blamed(late, report, finite=False) == {"culprit": "head.weight on rank 0"}
    assert Trainer.blamed(late, report, finite=True) == {}


def test_a_skipped_step_is_not_a_clipped_one():
    tally = Tally([{"coef": "NaN", "skip": True}, {"coef": 0.5, "skip": False}, {"coef": 1.0, "skip": False}])
    assert (tally.steps, tally.clipped, tally.skipped) == (3, 1, 1)


@pytest.mark.parametrize(
    ("scales", "said"), [(True, " norm 2 coef 0.5 clipped 50% skipped 1 300 "), (False, " norm 2 skipped 1 300 ")]
)
def test_a_line_counts_clipped_steps_only_where_a_coefficient_tells(scales, said):
    record = {"step": 3, "loss": 0.25, "norm": 2.0, "coef": 0.5, "skip": False, "per_second": 300.0}
    display = Display(Console(file=io.StringIO()), start=2, steps=9, unit="characters", log_every=1)
    line = display.line(record, Tally([record | {"skip": True}, record], scales=scales))
    assert line.startswith(f"step 3/9 loss 0.2500{said}characters/s eta ")
