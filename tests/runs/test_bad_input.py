"""What cannot be read is one clear line; what a crash leaves behind can."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from distclip.runs import Names, RunError, open_runs

LINE = json.dumps({"step": 1, "norm": 2.0, "max_norm": 1.0, "coef": 0.5, "skip": False, "loss": 3.0})


def complaint(path: Path, **names) -> str:
    with pytest.raises(RunError) as caught:
        open_runs(path, Names(**names))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


BAD = {  # name of the file, content, part of the message
    "nothing": ("log.jsonl", "", "is empty: no step is logged in it yet"),
    "blank lines": ("log.jsonl", "\n\n", "is empty"),
    "a first line cut short": ("log.jsonl", '{"step": 1, "no', "is empty"),
    "a bad line": ("log.jsonl", f"{LINE}\nstep 2: norm 3.0\n{LINE}\n", "line 2: is no JSON object"),
    "a line that is no object": ("log.jsonl", f"{LINE}\n[1, 2]\n", "line 2: is no JSON object: it holds [1, 2]"),
    "two objects in a line": ("log.jsonl", f"{LINE}\n{LINE},{LINE}\n", "line 2: is no JSON object"),
    "a deep line": ("log.jsonl", f"{LINE}\n{'[' * 100_000}\n", "line 2: is no JSON object"),
    "a document cut short": ("trainer_state.json", '{\n  "log_history": [\n    {"step"', "line 3: is no JSON object"),
    "a document of something else": ("config.json", '{\n"hidden_size": 5\n}', "holds no steps"),
    "an empty history": ("trainer_state.json", '{"log_history": []}', "holds no steps"),
    "no norm": ("log.jsonl", '{"step": 1, "speed": 2.0}\n', "say which by --norm (it has step, speed)"),
    "two norms": ("log.jsonl", '{"a/grad_norm": 1, "b/grad_norm": 2}\n', "several columns may be the gradient norm"),
    "a norm that is a word": ("log.jsonl", '{"norm": "big"}\n', "column 'norm' holds 'big', which is no number"),
    "a norm without a step": ("log.jsonl", '{"step": 1}\n{"norm": 2.0}\n', "column 'norm' holds no number in any step"),
    "a step below 0": ("log.jsonl", '{"step": -1, "norm": 1.0}\n', "column 'step' holds -1.0, which is no step"),
    "half a step": ("log.csv", "step,norm\n1.0,2\n1.5,3\n", "column 'step' holds 1.5, which is no step"),
    "a step that is true": ("log.jsonl", '{"step": true, "norm": 1.0}\n', "column 'step' holds True, which is no step"),
    "true among steps": (
        "log.jsonl",
        '{"step": 1, "norm": 1.0}\n{"step": true}\n{"norm": 1}\n',
        "column 'step' holds True",
    ),
    "a step that is NaN": ("log.jsonl", '{"step": NaN, "norm": 1.0}\n', "column 'step' holds nan"),
    "a table without rows": ("log.csv", "step,grad_norm\n", "is empty"),
    "a ragged table": ("log.csv", "step,grad_norm\n1,2\n1,2,3\n4,5\n", "line 3: is no CSV: it has 3 cells"),
    "a cell that is no number": ("log.csv", "step,grad_norm\n1,2\n2,two\n", "column 'grad_norm' holds 'two'"),
    "an image": ("log.csv", b"\x89PNG\r\n\x1a\n\0\0", "no format of a run"),
    "another encoding": ("log.csv", "schritt,größe\n".encode("latin-1"), "no format of a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_run_is_one_line(case, tmp_path: Path):
    name, content, part = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert part in complaint(path)


def test_what_is_not_there_is_one_line(tmp_path: Path):
    assert "there is no such file or folder" in complaint(tmp_path / "gone")
    assert "holds no run: none of metrics.jsonl" in complaint(tmp_path)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("step,grad_norm\n1,2\n")
    assert "holds several logs (a.csv, b.csv): name one of them" in complaint(tmp_path)


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("it,gnorm,train_loss\n1,2,3\n")
    assert "no column is called 'gnrom' (--norm): did you mean 'gnorm'?" in complaint(path, norm="gnrom")
    assert "no column is called 'its' (--step): did you mean 'it'?" in complaint(path, step="its", norm="gnorm")
    assert "no column is called 'x' (--loss): it has it, gnorm, train_loss" in complaint(path, norm="gnorm", loss="x")


def test_columns_are_named_by_the_user(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"it": 10, "g": 2.0, "l": 3.0, "layer.a": 1.0}\n{"it": 20, "g": 1.0, "l": 2.0, "layer.a": 0.5}\n')
    (run,) = open_runs(path, Names(step="it", norm="g", loss="l", layers="layer.", max_norm=1.5))
    assert (run.step.tolist(), run.norm.tolist(), run.loss.tolist()) == ([10, 20], [2.0, 1.0], [3.0, 2.0])
    assert run.clipped.tolist() == [True, False]
    assert (run.layers.names, run.layers.norms.tolist()) == (("a",), [[1.0], [0.5]])


def test_a_short_row_is_cut_only_at_the_end(tmp_path: Path):
    rows = [f"{step},1.0" for step in range(20_000)]
    rows[9_999] = "9999"  # the last of the first that are read at once
    (tmp_path / "log.csv").write_text("\n".join(["step,grad_norm", *rows]))
    assert "line 10001: is no CSV: it has 1 cells" in complaint(tmp_path / "log.csv")


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_a_crash_loses_the_last_line_at_most(name, tmp_path: Path):
    path = tmp_path / name
    head = "" if name == "log.jsonl" else "norm,loss,step\n"
    rows = [LINE] * 3 + [LINE[:20]] if name == "log.jsonl" else ["2.0,3.0,1"] * 3 + ["2.0"]
    path.write_text(head + "\n".join(rows))
    (run,) = open_runs(path)
    assert run.norm.tolist() == [2.0]  # the same step thrice
    assert any("cut short" in note for note in run.notes)
    assert any("2 steps were logged more than once" in note for note in run.notes)


def test_a_file_of_events_that_ends_within_a_record_is_read_up_to_there(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(5):
            writer.add_scalar("grad_norm", float(step), step)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    (run,) = open_runs(tmp_path)
    assert run.norm.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_restarted_run_counts_what_was_logged_last(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    steps = [1, 2, 3, 4, 3, 4, 5]
    path.write_text("".join(f'{{"step": {step}, "norm": {k}}}\n' for k, step in enumerate(steps)))
    (run,) = open_runs(path)
    assert (run.step.tolist(), run.norm.tolist()) == ([1, 2, 3, 4, 5], [0, 1, 4, 5, 6])


def test_what_is_not_finite_is_kept_and_what_is_missing_is_not(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 1, "norm": NaN}', '{"step": 2}', '{"step": 3, "norm": "Infinity"}', '{"step": 4, "norm": null}']
    path.write_text("\n".join(lines))
    (run,) = open_runs(path)
    assert run.step.tolist() == [1, 3]
    assert np.isnan(run.norm[0])
    assert run.norm[1] == np.inf


def test_what_is_logged_without_a_step_is_left_out(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "norm": 2.0}\n{"loss": 3.0, "coef": 0.5}\n')
    (run,) = open_runs(path)
    assert (run.norm.tolist(), run.bounded, np.isnan(run.loss).all()) == ([2.0], False, True)


def test_two_runs_of_one_chart_are_two(tmp_path: Path):
    path = tmp_path / "chart.csv"
    path.write_text('"Step","a - grad_norm","a - grad_norm__MIN","b - grad_norm"\n1,1,1,5\n2,2,2,\n3,,,7\n')
    one, two = open_runs(path)
    assert (one.name, one.step.tolist(), one.norm.tolist()) == ("a", [1, 2], [1, 2])
    assert (two.name, two.step.tolist(), two.norm.tolist()) == ("b", [1, 3], [5, 7])


def test_columns_of_pandas_are_read(tmp_path: Path):
    path = tmp_path / "frame.json"
    path.write_text('{"step": {"0": 1, "1": 2}, "grad_norm": {"0": 0.5, "1": null}}')
    (run,) = open_runs(path)
    assert (run.step.tolist(), run.norm.tolist()) == ([1], [0.5])


def test_a_pipe_is_not_called_empty():
    read, write = os.pipe()
    os.write(write, f"{LINE}\n".encode())
    os.close(write)
    assert "can be read only once: save what it gives as a file" in complaint(Path(f"/dev/fd/{read}"))
    os.close(read)
