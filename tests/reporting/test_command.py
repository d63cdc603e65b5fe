"""`distclip report`: where it writes, what it says, and that a mistake is one line and leaves nothing."""

import json
import os
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest

from distclip.cli import main
from distclip.reporting import writing
from distclip.reporting.thin import thinned
from reporting.made import CULPRIT, write_run
from support.programs import play
from support.ranks import LIMIT
from train.commands import ROOT


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def refused(capsys, *words: object) -> str:
    assert main(["report", *map(str, words)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("distclip: ")
    assert errors.count("\n") == 1
    return errors


def test_the_report_lies_in_the_folder_of_the_run_and_the_terminal_sums_it_up(run, capsys):
    assert main(["report", str(run)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "The norm is not finite in 1 step, first in step 400" in output
    assert CULPRIT in output
    assert f"report {run}/report.html" in output
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "report.html"}
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_the_report_lies_where_it_is_wanted_and_replaces_an_older_one(run, tmp_path, capsys):
    out = tmp_path / "here.html"
    for _ in range(2):
        assert main(["report", str(run / "metrics.jsonl"), "--out", str(out)]) == 0
    assert out.exists()
    assert not (run / "report.html").exists()


def test_a_bound_that_was_not_logged_is_given(tmp_path, capsys):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": k, "grad_norm": 1 + k % 5} for k in range(100)]}))
    assert main(["report", str(path)]) == 0
    assert "Transformers clips at 1.0 if not told otherwise" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(path), "--max-norm", "2.5"]) == 0
    assert "clipped │ 60 % bound 2.5" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_cannot_be_read_leaves_nothing(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "norm": 2.0}\nnonsense\n{"step": 2, "norm": 1.0}\n')
    assert "line 2: is no JSON object" in refused(capsys, tmp_path / "log.jsonl")
    assert "there is no such file" in refused(capsys, tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_target_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert "is no folder to write in" in refused(capsys, run, "--out", tmp_path / "gone" / "report.html")
    assert "it is a folder" in refused(capsys, run, "--out", tmp_path)
    assert "is no report of distclip's and stays as it is" in refused(capsys, run, "--out", run / "metrics.jsonl")
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "report.html").write_text("<html>of another program</html>")
    assert "name another file by --out" in refused(capsys, run)
    assert (run / "report.html").read_text() == "<html>of another program</html>"


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    target = tmp_path / "caf\xe9.html"
    with open(tmp_path / "said", "w", encoding="ascii") as said:
        monkeypatch.setattr("sys.stdout", said)
        assert main(["report", str(write_run(tmp_path / "run")), "--out", str(target)]) == 0
    assert target.is_file()
    assert "caf\\xe9.html" in (tmp_path / "said").read_text().replace("\n", "")


def test_a_disk_that_is_full_leaves_the_older_report(run, capsys, monkeypatch):
    assert main(["report", str(run)]) == 0
    capsys.readouterr()
    before = (run / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    assert "cannot be written: No space left on device" in refused(capsys, run)
    assert (run / "report.html").read_bytes() == before
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "report.html"}


@pytest.mark.parametrize("words", [["--max-norm", "0"], ["--max-norm", "-1"], ["--max-norm", "x"], ["--nrom", "x"]])
def test_a_bad_option_is_one_line(words, run, capsys):
    try:
        code = main(["report", str(run), *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["numpy", "plotly", "rich"])
def test_a_missing_package_is_one_line(name, run, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.modules[{name!r}] = None\nfrom distclip.cli import main\n"
        f"sys.exit(main(['report', {str(run)!r}]))\n"
    )
    said = f'distclip: a report needs {name}: pip install "distclip[report]"\n'
    assert play(program, None, [str(ROOT)], LIMIT) == ([2], said)


SLOW = """
import sys, time
from distclip.cli import main
from distclip.runs import recognise

def read(*found):
    print("reading", flush=True)
    time.sleep(600)

recognise.read_json = read
sys.exit(main(["report", sys.argv[1]]))
"""


def test_control_c_ends_it_and_leaves_nothing(tmp_path):
    log, environment = tmp_path / "log.jsonl", os.environ | {"PYTHONPATH": str(ROOT)}
    log.write_text('{"step": 1, "norm": 2.0}\n')
    with Popen([sys.executable, "-c", SLOW, log], env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, output, errors) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_long_run_is_opened_whole(tmp_path, capsys):
    """docs/howto/report.md has the time that a million steps take."""
    path = tmp_path / "log.jsonl"
    with path.open("w") as file:
        for step in range(60_000):
            norm = 50.0 if step == 43_210 else 1 + (step * 7919 % 1000) / 1000
            file.write(
                f'{{"step": {step}, "epoch": 1, "loss": 2.345678, "accuracy": 0.5, "norm": {norm}, "max_norm": 1.5, '
                f'"coef": {min(1.0, 1.5 / norm):.6f}, "skip": false, "lr": 0.001, "seconds": 0.01, "per_second": 99}}\n'
            )
    assert main(["report", str(path)]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "1 spike in 60,000 steps" in output
    assert "in step 43,210" in " ".join(output.split())
    assert (tmp_path / "report.html").stat().st_size < 6_000_000


def test_a_million_steps_are_drawn_by_a_few_that_have_every_spike():
    norms = np.exp(np.random.default_rng(0).normal(0, 0.3, 1_000_000))
    norms[[77_777, 654_321]] = [50, 1e-6]
    places = thinned(norms, 4000)
    assert len(places) <= 4002
    assert {0, 77_777, 654_321, 999_999} <= {*places.tolist()}
    assert (np.diff(places) > 0).all()
